"""Weights, calls and laws of the classic Memformer.

`data/published.safetensors` was made by running memformer 0.3.1 with torch 2.13.0 (seed 0; LayerNorms and
biases moved by 0.3 randn) on a source of three segments, the last one ragged, with prefix masks:

- `short`: segments of 8, where all of the package's position buckets that are ever used hold one distance
  (or all tokens after the query), random weights;
- `long`: segments of 40, two updates of the memory, position buckets at zero, two holes in the mask as well;
- `encoder`: encoder only, segments of 8, random weights.

Each holds the weights, the input, `enc_out/i` and `mems/i` of every segment, and the gradients that the
package's replay left (`encoder`: of `sum_i (enc_out_i * mask).square().sum() + mems.square().sum()`); those
with a decoder the loss of the last segment's target and `masked_logits`, with a target mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from memformer import Memformer, load_published, memory_replay_backprop
from memformer.transformer import RelativePositions, bucket, bucket_bounds
from tests.reference import memformer_classic as reference

ENCODER = {"dim": 8, "num_memory_slots": 3, "mem_update_attn_heads": 2, "enc_num_tokens": 11, "enc_heads": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "short": ENCODER
    | {"enc_depth": 2, "enc_max_seq_len": 8}
    | {"dec_num_tokens": 13, "dec_depth": 2, "dec_heads": 4, "dec_max_seq_len": 8},
    "long": ENCODER
    | {"num_mem_updates": 2, "mem_update_attn_heads": 4, "enc_depth": 2, "enc_max_seq_len": 40}
    | {"dec_num_tokens": 13, "dec_depth": 1, "dec_heads": 2, "dec_max_seq_len": 40},
    "encoder": ENCODER | {"num_memory_slots": 4, "enc_depth": 1, "enc_max_seq_len": 8, "encoder_only": True},
}
SMALL = OPTIONS["short"]


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "published.safetensors")


def part(published: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in published.items() if name.startswith(prefix)}


def loaded(given: dict[str, Tensor], case: str) -> Memformer:
    return load_published(Memformer(**OPTIONS[case]), part(given, "weights/"))


def small(**options: Any) -> Memformer:
    return Memformer(**(SMALL | options)).double()


def ids(*shape: int, vocabulary: int = 11) -> Tensor:
    return torch.randint(0, vocabulary, shape)


@pytest.mark.parametrize("case", OPTIONS)
def test_outputs_and_memories_agree_with_the_published_package(
    published: dict[str, Tensor], case: str
) -> None:
    given = part(published, f"{case}/")
    model = loaded(given, case)
    length = OPTIONS[case]["enc_max_seq_len"]
    mems = None
    for index, (src, mask) in enumerate(
        zip(given["src"].split(length, 1), given["src_mask"].split(length, 1), strict=True)
    ):
        out = model(src, mems=mems, src_mask=mask)
        mems = out.mems
        torch.testing.assert_close(out.enc_out[mask], given[f"enc_out/{index}"][mask], rtol=0, atol=1e-5)
        torch.testing.assert_close(mems, given[f"mems/{index}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["short", "long"])
def test_logits_and_losses_agree_with_the_published_package(published: dict[str, Tensor], case: str) -> None:
    given = part(published, f"{case}/")
    model = loaded(given, case)
    length = OPTIONS[case]["enc_max_seq_len"]
    src, src_mask = given["src"][:, 2 * length :], given["src_mask"][:, 2 * length :]
    tgt, mask = given["tgt"], given["tgt_mask"]
    out = model(src, tgt, given["mems/1"], src_mask)
    torch.testing.assert_close(out.loss, given["loss"], rtol=0, atol=1e-5)

    assert model.decoder is not None
    logits = model.decoder(tgt[:, :-1], out.enc_out, mask=mask[:, :-1], context_mask=src_mask)
    real = mask[:, :-1]
    torch.testing.assert_close(logits[real], given["masked_logits"][real], rtol=0, atol=1e-5)

    asked = mask[:, 1:]
    expected = F.cross_entropy(given["masked_logits"][asked], tgt[:, 1:][asked])
    masked = model(src, tgt, given["mems/1"], src_mask, mask)
    torch.testing.assert_close(masked.loss, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", OPTIONS)
def test_replayed_gradients_agree_with_the_published_package(published: dict[str, Tensor], case: str) -> None:
    given = part(published, f"{case}/")
    model = loaded(given, case)
    src, mask = given["src"], given["src_mask"]
    if case == "encoder":
        enc_outs, mems = [], None
        for piece, kept in zip(src.split(8, 1), mask.split(8, 1), strict=True):
            out = model(piece, mems=mems, src_mask=kept)
            enc_outs.append(out.enc_out)
            mems = out.mems
        assert mems is not None
        (torch.cat(enc_outs, 1).square().sum() + mems.square().sum()).backward()
    else:
        loss = memory_replay_backprop(model, src, given["tgt"], mask)
        torch.testing.assert_close(loss, given["loss"], rtol=0, atol=1e-5)
    ours = {
        "memory_slots": model.get_parameter("write.start"),
        "gru.weight_hh": model.get_parameter("write.gru.weight_hh"),
        "encoder.token_emb.weight": model.encoder.embedding.weight,
        "encoder.layer_blocks.layers.0.1.fn.fn.to_kv.weight": model.get_parameter(
            "encoder.layers.0.cross.to_keys_values.weight"
        ),
    }
    for name, parameter in ours.items():
        expected = given[f"gradient/{name}"]
        scale = float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-5 * max(scale, 1.0))


def test_weights_come_back_through_our_own_state_dict(published: dict[str, Tensor]) -> None:
    given = part(published, "short/")
    model, again = loaded(given, "short"), Memformer(**SMALL)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(given["src"][:, :8]).mems, model(given["src"][:, :8]).mems)


def test_buckets_of_other_distances_get_the_mean_over_theirs(published: dict[str, Tensor]) -> None:
    weights = part(published, "short/weights/")
    name = "layer_blocks.rel_pos_emb.relative_attention_bias.weight"
    table = weights[f"encoder.{name}"]
    model = loaded(part(published, "short/"), "short")
    # Distances 8 to 11 share a bucket of ours before the query, and have one each in the package's.
    ours = model.encoder.positions.weight
    torch.testing.assert_close(ours[8], table[8:12].mean(0))
    # After the query the package has one bucket for all.
    torch.testing.assert_close(ours[17:], table[:1].expand(15, -1))
    assert model.decoder is not None
    # Before the query our decoder is finer from distance 8 on: 8 and 11 shared a bucket there.
    theirs, ours = weights[f"decoder.net.{name}"], model.decoder.positions.weight
    torch.testing.assert_close(ours[8:12], theirs[8:9].expand(4, -1))


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"gru.bias_hh": None}, r"missing \['gru.bias_hh'\]"),
        ({}, {"gate.weight": torch.zeros(1)}, r"unknown \['gate.weight'\]"),
        ({"enc_depth": 1}, {}, r"unknown \['encoder.layer_blocks.layers.1"),
        ({"num_memory_slots": 4}, {}, r"memory_slots has shape \[3, 8\], this model needs \[4, 8\]"),
        ({"write": "bmn"}, {}, r'build the model with write="gru"'),
        ({"encoder_only": True}, {}, r"unknown \['decoder.net"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    published: dict[str, Tensor], options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    weights = part(published, "short/weights/") | change
    weights = {name: value for name, value in weights.items() if value is not None}
    model = Memformer(**(SMALL | options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(model, weights)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_t5(bidirectional: bool) -> None:
    distances = torch.arange(-300, 301)
    expected = [reference.bucket(int(distance), bidirectional=bidirectional) for distance in distances]
    ours = bucket(distances, bucket_bounds(bidirectional=bidirectional), bidirectional=bidirectional)
    assert ours.tolist() == expected


def test_the_encoder_tells_the_order_of_later_tokens() -> None:
    # F1: in the package all tokens after the query share a bucket.
    model = small(enc_depth=1)
    src = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    swapped = src[:, [0, 1, 2, 6, 4, 5, 3, 7]]
    first = [model(each).enc_out[:, 0] for each in (src, swapped)]
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_the_decoder_uses_all_buckets_for_the_past() -> None:
    # F2: the package's uses half of them.
    positions = RelativePositions(2, bidirectional=False)
    table = positions(200, 200)
    assert table[:, :200].unique(dim=1).shape[1] == 32
    assert (table[:, 200:] == -torch.inf).all()


def test_encoder_and_decoder_equal_a_loop_over_heads_and_queries() -> None:
    model = small()
    assert model.decoder is not None
    src, tgt, mems = ids(1, 8), ids(1, 6, vocabulary=13), torch.randn(1, 3, 8, dtype=torch.float64)
    enc_out = model.encoder(src, mems)
    logits = model.decoder(tgt, enc_out)
    expected_out = reference.encode(model.encoder, src[0], mems[0])
    expected = reference.decode(model.decoder, tgt[0], expected_out)
    torch.testing.assert_close(enc_out[0], expected_out, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-10)
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    direction = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(logits[0], parameters, direction),
        torch.autograd.grad(expected, parameters, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("write", ["gru", "bmn"])
def test_padding_anywhere_changes_nothing(write: str) -> None:
    # F3, F4, F5: padded targets are neither read nor trained on; what they hold does not matter.
    model = small(write=write)
    assert model.decoder is not None
    src, tgt = ids(4, 8), ids(4, 7, vocabulary=13)
    src_mask = torch.ones(4, 8, dtype=torch.bool)
    src_mask[1, 5:], src_mask[2, :3], src_mask[3, 2:4] = False, False, False
    tgt_mask = torch.ones(4, 7, dtype=torch.bool)
    tgt_mask[1, 4:], tgt_mask[2, :2], tgt_mask[3, 3] = False, False, False
    src, tgt = src.masked_fill(~src_mask, 10**6), tgt.masked_fill(~tgt_mask, -7)
    mems = torch.randn(4, 3, 8, dtype=torch.float64)
    out = model(src, tgt, mems, src_mask, tgt_mask)
    assert not out.enc_out[~src_mask].any()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(4):
        own = src[row][src_mask[row]][None]
        alone = model(own, mems=mems[row : row + 1])
        expected = reference.encode(model.encoder, own[0], mems[row])
        torch.testing.assert_close(alone.enc_out[0], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(out.enc_out[row][src_mask[row]], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(out.mems[row], alone.mems[0], rtol=0, atol=1e-10)
        loss, tokens = reference.target_loss(model.decoder, tgt[row][tgt_mask[row]], expected)
        total, count = total + loss, count + tokens
    torch.testing.assert_close(out.loss, total / count, rtol=0, atol=1e-10)
    ignored = model(src, tgt.masked_fill(~tgt_mask, -100), mems, src_mask)
    assert torch.equal(ignored.loss, out.loss)


def test_logits_at_padding_are_zero_and_at_tokens_those_of_the_row_alone() -> None:
    model = small()
    assert model.decoder is not None
    tgt, context = ids(2, 6, vocabulary=13), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, False]])
    context_mask = torch.tensor([[True, False, True, True, True], [True, True, False, False, False]])
    context[~context_mask] = torch.nan
    logits = model.decoder(tgt, context, mask=mask, context_mask=context_mask)
    assert not logits[~mask].any()
    for row in range(2):
        expected = reference.decode(model.decoder, tgt[row][mask[row]], context[row][context_mask[row]])
        torch.testing.assert_close(logits[row][mask[row]], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("write", ["gru", "bmn"])
def test_a_row_that_is_all_padding_keeps_its_memory(write: str) -> None:
    # F10
    model = small(write=write)
    src, mems = ids(2, 8), torch.randn(2, 3, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 8, [False] * 8])
    out = model(src, ids(2, 5, vocabulary=13), mems, mask)
    assert torch.equal(out.mems[1], mems[1])
    assert not torch.equal(out.mems[0], mems[0])
    assert not out.enc_out[1].any()
    (out.loss + out.mems.square().sum()).backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None
    )


def test_rows_of_different_lengths_may_come_as_a_list() -> None:
    model = small()
    src, rows = ids(2, 8), [ids(7, vocabulary=13), ids(4, vocabulary=13)]
    padded = torch.full((2, 7), -100)
    padded[0], padded[1, :4] = rows[0], rows[1]
    assert torch.equal(model(src, rows).loss, model(src, padded).loss)


def test_a_target_without_anything_to_predict_has_zero_loss() -> None:
    model = small()
    tgt = torch.full((2, 5), -100)
    tgt[0, 0] = 3
    loss = model(ids(2, 8), tgt).loss
    assert loss == 0
    loss.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_a_call_without_target_returns_a_zero_that_backward_accepts() -> None:
    model = small()
    enc_out, mems, loss = model(ids(2, 8))
    assert (enc_out.shape, mems.shape, loss.item()) == ((2, 8, 8), (2, 3, 8), 0.0)
    loss.backward()


def test_the_packages_names_of_the_results_stay() -> None:
    out = small()(ids(2, 8), ids(2, 5, vocabulary=13))
    assert out.mem is out.mems
    assert out.dec_out is out.loss
    only = small(encoder_only=True)(ids(2, 8))
    assert len(only) == 2
    assert only.mem is only.mems


@pytest.mark.parametrize("write", ["gru", "bmn"])
def test_without_memory_it_starts_from_the_initial_one_and_writes_nothing_in_place(write: str) -> None:
    model = small(write=write)
    src = ids(2, 8)
    initial = model.get_initial_mem(2).detach().clone()
    given = initial.clone()
    out = model(src, mems=given)
    assert torch.equal(given, initial)
    torch.testing.assert_close(model(src).mems, out.mems, rtol=0, atol=1e-12)
    if write == "bmn":
        norms = torch.cat([initial, out.mems]).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_updates_repeat_the_write_with_the_same_tokens() -> None:
    once, twice = small(), small(num_mem_updates=2)
    twice.load_state_dict(once.state_dict())
    src = ids(2, 8)
    out = once(src)
    torch.testing.assert_close(twice(src).mems, once.write(out.mems, out.enc_out), rtol=0, atol=1e-12)


@pytest.mark.parametrize("write", ["gru", "bmn"])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_runs_in_bfloat16(write: str, autocast: bool) -> None:
    model = Memformer(**(SMALL | {"write": write}))
    if not autocast:
        model = model.bfloat16()
    src, tgt, mask = ids(2, 8), ids(2, 6, vocabulary=13), torch.ones(2, 8, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(src, tgt, None, mask)
        out = model(src, tgt, out.mems, mask)
    out.loss.backward()
    assert out.mems.dtype == next(model.parameters()).dtype
    for tensor in (*out, *(parameter.grad for parameter in model.parameters())):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_a_batch_without_rows_passes() -> None:
    out = small()(ids(0, 8), ids(0, 5, vocabulary=13), None, torch.zeros(0, 8, dtype=torch.bool))
    assert (out.enc_out.shape, out.mems.shape, out.loss.item()) == ((0, 8, 8), (0, 3, 8), 0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"src": ids(2, 9)}, ValueError, "src has 9 tokens, more than the 8 that max_seq_len allows"),
        ({"src": ids(2, 8).float()}, TypeError, "src must be int64 ids, got torch.float32"),
        ({"src": ids(8)}, ValueError, r"src must be \[batch, time\] with at least one token, got \(8,\)"),
        ({"src": torch.full((2, 8), 11)}, ValueError, r"src holds 11, outside the vocabulary \(0 to 10\)"),
        (
            {"src_mask": torch.ones(2, 7).bool()},
            ValueError,
            r"src_mask has shape \(2, 7\), expected \(2, 8\)",
        ),
        ({"src_mask": torch.ones(2, 8)}, TypeError, "src_mask must be a bool tensor"),
        ({"tgt": ids(2, 10)}, ValueError, "tgt has 10 tokens, more than the 9 that max_seq_len allows"),
        ({"tgt": ids(2, 1)}, ValueError, "a start token and at least one to predict"),
        ({"tgt": torch.full((2, 5), 13)}, ValueError, "tgt holds 13, outside the vocabulary"),
        ({"tgt": ids(3, 5)}, ValueError, "3 rows of tokens but 2 of context"),
        (
            {"tgt_mask": torch.ones(2, 4).bool()},
            ValueError,
            r"tgt_mask has shape \(2, 4\), expected \(2, 5\)",
        ),
        ({"tgt_mask": torch.ones(2, 5)}, TypeError, "tgt_mask must be a bool tensor"),
        ({"tgt": None, "tgt_mask": torch.ones(2, 5).bool()}, ValueError, "tgt_mask is given without tgt"),
        ({"mems": torch.zeros(3, 3, 8).double()}, ValueError, "2 rows of tokens but 3 of mems"),
        ({"mems": torch.zeros(2, 4, 8).double()}, ValueError, "mems holds 4 slots, the model has 3"),
        ({"mems": torch.zeros(2, 3, 9).double()}, ValueError, r"mems must be \[batch, length, 8\]"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"src": ids(2, 8), "tgt": ids(2, 5), "mems": None, "src_mask": None, "tgt_mask": None} | change
    with pytest.raises(error, match=message):
        small()(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dec_depth": None}, "needs dec_num_tokens, dec_depth and dec_max_seq_len"),
        ({"enc_heads": 3}, r"dim \(8\) must be divisible by enc_heads \(3\)"),
        ({"dec_heads": 0}, r"dim \(8\) must be divisible by dec_heads \(0\)"),
        ({"mem_update_attn_heads": 5}, r"divisible by mem_update_attn_heads \(5\)"),
        ({"enc_max_seq_len": 0}, r"enc_max_seq_len \(0\) must be at least 1"),
        ({"num_memory_slots": 0}, r"num_memory_slots \(0\) must be at least 1"),
        ({"num_mem_updates": 0}, r"num_mem_updates \(0\) must be at least 1"),
        ({"write": "lstm"}, r"write \('lstm'\) must be one of 'gru', 'bmn'"),
    ],
)
def test_wrong_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memformer(**(SMALL | change))


def test_a_target_needs_a_decoder() -> None:
    with pytest.raises(ValueError, match="encoder_only=True has no decoder"):
        small(encoder_only=True)(ids(2, 8), ids(2, 5))


@pytest.mark.slow
@pytest.mark.parametrize("write", ["gru", "bmn"])
def test_it_compiles_without_a_graph_break(write: str) -> None:
    model = small(write=write)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    given = (ids(2, 8), ids(2, 5, vocabulary=13), None, torch.rand(2, 8) < 0.7)
    for ours, expected in zip(compiled(*given), model(*given), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
