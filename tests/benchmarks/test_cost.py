"""`memory-bench cost`: what is counted, that the ways of the gradient agree, and the report."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cli import main
from benchmarks.cost import GRADIENTS, VOCABULARY, Case, command, plan
from benchmarks.cost import measure as measuring
from benchmarks.cost.flops import flop_counter
from benchmarks.cost.measure import _steps, measure, saved_bytes
from benchmarks.cost.report import DECODING, TRAINING, as_csv, exponent, table, write_report
from benchmarks.members import build_model
from benchmarks.results import FAILED, FINISHED

SMALL = {"dim": 16, "depth": 1, "heads": 2, "segment_length": 8}


def case(**changes: Any) -> dict[str, Any]:
    usual = {"model": "window", "length": 24, "rows": 2, "gradient": "bptt", "decode": True, "threads": 1}
    return {**usual, "options": SMALL, **changes}


@pytest.mark.parametrize("name", ["full", "gru"])
def test_every_way_of_the_gradient_but_truncation_gives_the_same(name: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dim": 16, "depth": 1, "segment_length": 8}
    model = build_model(name, options, VOCABULARY).double()
    tokens = torch.randint(VOCABULARY, (2, 32))
    gradients = {}
    for way, step in _steps(model, tokens).items():
        model.zero_grad()
        step()
        gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for way in ("checkpoint", "replay"):
        assert torch.allclose(gradients[way], gradients["bptt"], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(gradients["truncated"], gradients["bptt"], rtol=1e-3)
    assert gradients.keys() == set(GRADIENTS)


def test_every_way_of_the_gradient_writes_the_outside_store() -> None:
    # Room for all pairs: what computes a segment again needs those that it read.
    options = {**SMALL, "memories": 40, "topk": 4}
    tokens = torch.randint(VOCABULARY, (2, 40))
    gradients = {}
    for store in ("state", "outside"):
        torch.manual_seed(0)
        given = {**options, "store": store, **({"pending_segments": 1} if store == "outside" else {})}
        model = build_model("memorizing", given, VOCABULARY).double()
        for way, step in _steps(model, tokens).items():
            model.zero_grad()
            step()
            parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            gradients[store, way] = torch.cat(parts)
    for way in GRADIENTS:
        assert torch.allclose(gradients["outside", way], gradients["state", way], rtol=1e-9, atol=1e-12)


def test_autograd_s_bytes_are_those_of_its_tensors() -> None:
    x = torch.randn(10, 4)
    weight = nn.Parameter(torch.randn(4, 4))
    with saved_bytes() as most:
        y = torch.tanh(x @ weight)  # keeps x and tanh's result; the parameter does not count
    assert most[0] == 2 * 10 * 4 * 4
    with saved_bytes() as most:
        z = (y.view(40) * y.view(40)).sum()  # one storage, kept twice
    assert most[0] == 10 * 4 * 4
    z.backward()


def test_what_replay_holds_does_not_grow_with_the_segments() -> None:
    model = build_model("gru", {"dim": 16, "depth": 1, "segment_length": 8}, VOCABULARY)
    held: dict[str, list[int]] = {"bptt": [], "replay": []}
    for way, found in held.items():
        for segments in (2, 8, 32):
            step = _steps(model, torch.randint(VOCABULARY, (1, 8 * segments)))[way]
            with saved_bytes() as most:
                step()
            model.zero_grad(set_to_none=True)
            found.append(most[0])
    assert held["replay"][0] == held["replay"][1] == held["replay"][2]
    assert held["bptt"][2] > 10 * held["bptt"][0]


def test_operations_of_our_own_operators_are_counted() -> None:
    from memorizing.attend import attend

    queries = torch.randn(2, 3, 5, 4, requires_grad=True)
    pairs, total = torch.randn(2, 3, 7, 4), torch.full((2,), 7)
    with flop_counter() as counter:
        out = attend(queries, pairs, pairs, total, 2)[0]
    # each of 2 * 3 * 5 queries: the products with 7 keys, then the sum of 2 values
    assert counter.get_total_flops() == 2 * 3 * 5 * 2 * (7 * 4 + 2 * 4)
    with flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * 3 * 5 * 2 * 2 * (4 + 4)


def test_attention_on_the_processor_is_counted_like_its_matrix_products() -> None:
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    with flop_counter() as fused:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with flop_counter() as plain:
        torch.softmax(q @ k.transpose(-1, -2), -1) @ v
    assert fused.get_total_flops() == plain.get_total_flops() == 2 * 2 * 3 * 8 * 8 * (4 + 4)


def test_operations_of_a_member_are_six_per_weight_and_token_and_more() -> None:
    found = measure(case(length=16, rows=1))
    weights = found["parameters"] - VOCABULARY * 16  # an embedding is looked up, a tied head multiplied
    assert found["training"]["operations"] > 6 * 16 * 0.9 * weights


def test_a_case_has_all_figures() -> None:
    found = measure(case(model="gru", options={"dim": 8, "hidden": 16, "depth": 1, "segment_length": 8}))
    assert found["state_bytes"] == 16 * 4
    for quantity in (*TRAINING, *DECODING):
        value = quantity.of({**found, "case": case()})
        assert value is not None
        assert value >= 0
    assert found["training"]["tokens_per_second"] > 0
    assert measure(case(decode=False)).get("decoding") is None
    assert measure(case())["state_bytes"] == 0


def test_the_bytes_of_an_outside_store_are_state_too() -> None:
    options = {**SMALL, "memories": 20, "store": "outside", "pending_segments": 1}
    pair = 2 * 2 * 8 * 4  # key and value, of two heads of 8 floats
    # 8 pairs and three counters in the state, room for 20 + 8 pairs in the store
    found = measure(case(model="memorizing", options=options, decode=False))
    assert found["state_bytes"] == 8 * pair + 3 * 8 + (20 + 8) * pair


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, -0.5])
def test_the_exponent_of_a_power_is_found(power: float) -> None:
    lengths = [512, 2048, 8192]
    assert exponent(lengths, [3.7 * length**power for length in lengths]) == pytest.approx(power)
    assert exponent(lengths, [None, 5.0, None]) is None
    assert exponent(lengths, [0.0, 1.0, 4.0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["window"], [0]), {}, r"lengths \(0\) must be at least 1"),
        ((["window"], []), {}, r"lengths \(\) must be at least 1"),
        ((["window"], [8]), {"rows": 0}, r"rows \(0\) must be at least 1"),
        ((["window"], [8]), {"gradients": ["bppt"]}, "gradient 'bppt' is none of bptt"),
        ((["window"], [8]), {"changes": {"slots": 3}}, "none of these models has an option slots"),
    ],
)
def test_wrong_use_is_named(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(*arguments, **options)


def test_full_keeps_all_that_it_reads_and_decoding_is_measured_once() -> None:
    cases = plan(["full"], [512, 4096], gradients=["bptt", "replay"])
    assert {c.options["context"] for c in cases} == {4096}
    assert [(c.length, c.gradient, c.decode) for c in cases] == [
        (512, "bptt", True),
        (512, "replay", False),
        (4096, "bptt", True),
        (4096, "replay", False),
    ]
    assert len({c.id for c in cases}) == 4


def record(model: str, length: int, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "status": FINISHED,
        "case": case(model=model, length=length),
        "versions": {"cpu": "abacus", "torch": "2", "python": "3", "memory-models": "0"},
        "parameters": 1000,
        "state_bytes": 64.0,
        "training": {"seconds": seconds, "tokens_per_second": length / seconds, "peak_bytes": 2**20},
        "decoding": {"seconds": 0.001, "tokens_per_second": 1000.0},
        **changes,
    }


def test_the_table_has_a_line_for_each_model_and_the_exponent() -> None:
    records = [record("window", 100, 1.0), record("window", 200, 2.0), record("full", 200, 4.0)]
    step = next(quantity for quantity in TRAINING if quantity.name == "step")
    assert table(records, step) == [
        ["model", "parameters", "100", "200", "exponent"],
        ["window", "1.0 k", "1 s", "2 s", "1.00"],
        ["full", "1.0 k", "–", "4 s", "–"],
    ]
    lines = list(csv.reader(io.StringIO(as_csv(records))))
    assert len(lines) == 4
    assert lines[1][:3] == ["window", "bptt", "100"]


def test_state_is_told_per_row_and_per_token_read() -> None:
    records = [record("gru", length, 1.0) for length in (16, 32, 1024)]
    per_row, per_token = (q for q in DECODING if q.name.startswith("state"))
    assert table(records, per_row)[1][2:] == ["64 B", "64 B", "64 B", "0.00"]
    assert table(records, per_token)[1][2:] == ["4 B", "2 B", "0.062 B", "-1.00"]
    [_, *lines] = list(csv.DictReader(io.StringIO(as_csv(records))))
    assert [float(line["state per token"]) for line in lines] == [2.0, 0.0625]


def test_a_failed_case_stands_in_the_report(tmp_path: Path) -> None:
    bad = record("gru", 200, 1.0)
    records = [record("window", 100, 1.0), {"status": FAILED, "error": "out of memory", "case": bad["case"],
                                            "versions": bad["versions"]}]  # fmt: skip
    write_report(records, tmp_path, command="memory-bench cost")
    assert "gru at 200 tokens failed: out of memory" in (tmp_path / "table.md").read_text()
    page = (tmp_path / "index.html").read_text()
    assert "out of memory" in page
    assert "memory-bench cost" in page


def in_this_process(one: Case, *, timeout: float) -> dict[str, Any]:
    """In place of `measure_apart`, whose processes take seconds to begin."""
    assert timeout > 0
    return {"status": FINISHED, **measure(json.loads(json.dumps(one.to_json())))}


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["here", "apart"])
def test_the_command_measures_reports_and_does_not_measure_again(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not apart:
        monkeypatch.setattr(command, "measure_apart", in_this_process)
        monkeypatch.setattr(measuring, "SECONDS", 0.1)
    words = [
        "cost",
        "--models",
        "gru",
        "--gradients",
        "bptt",
        "replay",
        "--smoke",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all(json.loads(line)["status"] == FINISHED for line in lines)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"table.md", "table.csv", "index.html", "cost_by_length.png", "gradient_gru.png"} <= names
    assert "Training tokens/s" in capsys.readouterr().out
    assert main(words) == 0
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_every_case_is_measured_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = tmp_path / "shell"
    shell.write_text("""#!/bin/sh
printf '{"process": %d, "parent": %d, "words": "%s", "case": %s}' $$ $PPID "$*" "$(cat)"
""")
    shell.chmod(0o755)
    monkeypatch.setattr(command, "sys", SimpleNamespace(executable=str(shell)))
    cases = plan(["window"], [8, 16], usual=SMALL)
    found = [command.measure_apart(one, timeout=60.0) for one in cases]
    assert [one["status"] for one in found] == [FINISHED] * 2
    assert [one["case"] for one in found] == [json.loads(json.dumps(one.to_json())) for one in cases]
    assert {one["words"] for one in found} == {"-m benchmarks.cost.measure"}
    assert {one["parent"] for one in found} == {os.getpid()}
    assert len({os.getpid(), *(one["process"] for one in found)}) == 3


def test_the_report_names_the_commit(tmp_path: Path) -> None:
    one = record("window", 100, 1.0)
    one["versions"] |= {"commit": "0123abc"}
    write_report([one], tmp_path, command="memory-bench cost")
    for name in ("table.md", "index.html"):
        assert "memory-models 0, commit 0123abc." in (tmp_path / name).read_text()


def test_wrong_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--models", "windw", "--smoke"]) == 2
    assert "Did you mean 'window'" in capsys.readouterr().err
    assert main(["cost", "--models", "window", "--set", "dim"]) == 2
    assert "not of the form key=value" in capsys.readouterr().err
