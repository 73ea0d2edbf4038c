"""The documentation: its code runs, what it says of options, costs and names is so, and the site builds."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.cost.flops import flop_counter
from benchmarks.members import all_models
from benchmarks.study import TASKS as STUDIED
from benchmarks.task import tasks
from memory_models import create, unroll
from memory_models.models import info
from memory_models.registry import import_target
from memory_models.testing import RULES
from tests.members import OURS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Pages that docs/hooks.py makes of files elsewhere.
ELSEWHERE = ("readme.md", "changelog.md", "contributing.md", "examples.md")
PACKAGES = ("memory_models", "memory_models.hf", "htm", "memformer", "memorizing", "memxl")
# What a page's code takes for granted: its inputs, and for a published model the sizes of a test.
GIVEN = {
    "memorizing-published.md": """
import torch
from memorizing import MemorizingTransformer as _Published
stream = [(torch.randint(2, 9, (2, 6)),) * 2 for _ in range(2)]
prompt = torch.randint(2, 9, (2, 6))
def MemorizingTransformer(**options):
    model = _Published(**options | {"num_tokens": 9, "dim": 8, "dim_head": 4, "heads": 2})
    whole = model.generate
    model.generate = lambda prompt, tokens, segment_length: whole(prompt, 4, segment_length=segment_length)
    return model
""",
    "how-to/train-on-your-files.md": """
from memory_models import create_lm
create_lm("memorizing", vocab_size=256, dim=16, depth=1, memories=64).save_pretrained("runs/notes/model")
""",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    code: str


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)(.*)\n((?:.*\n)*?)```$", page.read_text(encoding="utf-8"), re.M)
    return [
        Block(language, (re.findall(r'title="(.*?)"', rest) or [""])[0], code)
        for language, rest, code in found
    ]


def python(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def section(page: Path, heading: str) -> str:
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {heading}.*?\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found


def commands() -> list[str]:
    return [
        line
        for page in (*PAGES, ROOT / "README.md")
        for block in blocks(page)
        if block.language == "sh"
        for line in block.code.splitlines()
    ]


# What the pages show.


def test_every_block_is_of_a_kind_that_is_looked_at() -> None:
    assert {block.language for page in PAGES for block in blocks(page)} == {
        "python",
        "sh",
        "text",
        "toml",
        "",
    }
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page)), name_of(page)


@pytest.mark.parametrize("page", [page for page in PAGES if python(page)], ids=name_of)
def test_the_python_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("transformers" in block.code for block in python(page)):
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    namespace: dict[str, Any] = {}
    exec(GIVEN.get(name_of(page), ""), namespace)
    files = [block for block in python(page) if block.title]
    for block in files:
        (tmp_path / block.title).write_text(block.code, encoding="utf-8")
    try:
        for block in python(page):
            if not block.title:
                exec(compile(block.code, name_of(page), "exec"), namespace)
    finally:
        for block in files:
            sys.modules.pop(block.title.removesuffix(".py"), None)


def test_commands_name_options_models_and_tasks_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.cli import main

    helps: dict[str, str] = {}
    for line in commands():
        words = [word for word in shlex.split(line) if "=" not in word or word.startswith("-")]
        if words[0] in ("make", "pip"):
            continue
        start = next(i for i, word in enumerate(words) if word in ("memory-bench", "benchmarks.cli"))
        command, *rest = words[start + 1 :]
        if command not in helps:
            with contextlib.suppress(SystemExit):
                main([command, "--help"])
            helps[command] = capsys.readouterr().out
        option = ""
        for word in rest:
            if word.startswith("--"):
                option = word
                assert re.search(rf"{word}\b", helps[command]), f"{line}: no option {word}"
            elif option in ("--model", "--models"):
                assert word in all_models() or ":" in word or "/" in word, f"{line}: no model {word}"
            elif option == "--task":
                assert word in tasks or ":" in word, f"{line}: no task {word}"


@pytest.mark.slow
def test_the_commands_with_a_task_and_a_model_of_ones_own_run(tmp_path: Path) -> None:
    for page in PAGES:
        for block in python(page):
            if block.title:
                (tmp_path / block.title).write_text(block.code, encoding="utf-8")
    own = [line for line in commands() if line.startswith("PYTHONPATH=. ")]
    assert len(own) == 2
    bench = (
        f'{shlex.quote(sys.executable)} -c "import sys; from benchmarks.cli import main; sys.exit(main())"'
    )
    for line in own:
        command = line.replace("PYTHONPATH=.", f"PYTHONPATH=.:{shlex.quote(str(ROOT))}", 1)
        command = command.replace("memory-bench", bench, 1) + " --smoke"
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


# What the pages say.


def options_of(config: type) -> list[str]:
    """A row for each option that the class itself declares: name, default and the line of doc below it."""
    tree = ast.parse(inspect.getsource(config))
    body = tree.body[0].body  # type: ignore[attr-defined]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    rows = []
    for field, doc in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            name = ast.unparse(field.target)
            default = repr(defaults[name]).replace("'", '"')
            rows.append(f"| `{name}` | `{default}` | {' '.join(ast.literal_eval(doc.value).split())} |")
    return rows


@pytest.mark.parametrize("name", OURS)
def test_the_options_of_every_member_are_told_as_the_code_has_them(name: str) -> None:
    page = DOCS / "members" / f"{name if 'family' in info(name).tags else 'controls'}.md"
    text = page.read_text(encoding="utf-8")
    rows = options_of(import_target(info(name).target).config_class)
    assert rows
    assert not [row for row in rows if row not in text]


def test_every_task_of_the_study_has_its_line_in_the_table_of_tasks() -> None:
    # Not every task there is: a new one is a file in the folder, and nothing else need know of it.
    table = section(DOCS / "how-to" / "compare-on-your-task.md", "The tasks")
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    told = [name for cell in cells for name in re.findall(r"`([\w-]+)`", cell)]
    assert len(told) == len(set(told))
    assert set(STUDIED) <= set(told) <= set(tasks.names())


def test_the_rules_of_the_contract_are_told_as_the_code_has_them() -> None:
    told = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", section(DOCS / "contract.md", "`check_model`"), re.M)
    assert told == [(rule.name, rule.law) for rule in RULES.values()]


SIZES = {"dim": 24, "depth": 2, "heads": 2, "segment_length": 6}
SHARED: list[dict[str, Any]] = [{}, {"token_shift": True}, {"token_shift": True, "matching_layer": True}]
# Options of each member for which its formulas are checked: those of the state, then those of the operations.
COSTS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "htm": (
        [{"chunk_size": 4, "chunks": 5}, {"chunk_size": 3, "chunks": 2, "memory_layers": (0,)}],
        [
            {"chunk_size": 4, "chunks": 5, "topk": 3},
            {"chunk_size": 3, "chunks": 2, "topk": 8, "positions": False},
            {"memory_layers": (0,), "memory_heads": 3, "memory_dim_head": 5},
        ],
    ),
    "memformer": (
        [{"slots": 5}, {"slots": 9, "write_heads": 1}],
        [{"slots": 5}, {"slots": 9, "write_iterations": 2, "memory_layers": (0, 1), "dim_head": 5}],
    ),
    "memorizing": (
        [
            {"memories": 7},
            {"memories": 7, "kv_heads": 1, "memory_layers": (0, 1)},
            {"memories": 0, "xl_cache": 4, "xl_shift": True},
        ],
        [{"memories": 20, "topk": 3}, {"memories": 9, "kv_heads": 1}, {"memories": 4, "xl_cache": 5}],
    ),
    "memxl": (
        [{"mem_len": 9, "lmem_len": 4}, {"memory_layers": (1,), "lmem_len": 0}],
        [
            {"mem_len": 9, "lmem_len": 4},
            {"memory_layers": (1,), "write_heads": 2, "write_features": 5, "write_iterations": 3},
            {"lmem_len": 0},
        ],
    ),
}


def formulas(name: str) -> dict[str, Any]:
    """The functions of the page's section on cost."""
    found: dict[str, Any] = {}
    page = DOCS / "members" / f"{name}.md"
    exec(next(block.code for block in python(page) if "def " in block.code), found)
    return found


def state(name: str, options: dict[str, Any]) -> int:
    return create(name, **SIZES, **options).init_memory(1).nbytes


def config_of(name: str, options: dict[str, Any]) -> Any:
    return import_target(info(name).target).config_class(**SIZES, **options)


def operations(name: str, options: dict[str, Any]) -> float:
    """Multiply-adds a token, counted over two segments of a stream that is under way."""
    torch.manual_seed(0)
    model = create(name, **SIZES, **options).eval()
    x = torch.randn(1, 2 * model.segment_length, model.dim)
    with torch.no_grad():
        memory = unroll(model, x)[1]
        with flop_counter() as counter:
            unroll(model, x, memory)
    return counter.get_total_flops() / 2 / x.shape[1]


@pytest.mark.parametrize("name", COSTS)
def test_the_formula_of_a_members_state_is_right(name: str) -> None:
    formula = formulas(name)["state_bytes"]
    for own in COSTS[name][0]:
        for shared in SHARED:
            options = own | shared
            told, seen = formula(config_of(name, options)), state(name, options) - state("window", shared)
            assert told == seen, options


@pytest.mark.parametrize("name", COSTS)
def test_the_formula_of_a_members_operations_is_right(name: str) -> None:
    formula = formulas(name)["operations"]
    for options in COSTS[name][1]:
        shared = {key: value for key, value in options.items() if key == "dim_head"}
        seen = operations(name, options) - operations("window", shared)
        assert formula(config_of(name, options)) == pytest.approx(seen, rel=1e-12), options


def test_the_formulas_of_the_controls_are_right() -> None:
    told = formulas("controls")
    for options in SHARED:
        window = config_of("window", options)
        assert told["open_segment_bytes"](window) == state("window", options)
        full = options | {"context": 9}
        beyond = state("full", full) - state("window", options)
        assert told["full_state_bytes"](config_of("full", full)) == beyond
    assert told["gru_state_bytes"](config_of_gru()) == create("gru", **GRU).init_memory(1).nbytes
    base = operations("window", {})
    assert told["window_operations"](config_of("window", {})) == base
    shifted = {"token_shift": True}
    assert told["window_operations"](config_of("window", shifted)) == operations("window", shifted)
    full = {"context": 9}
    assert told["full_operations"](config_of("full", full)) == operations("full", full) - base
    cached = {"cache": 4}
    config = config_of("transformer-xl", cached)
    assert told["transformer_xl_state_bytes"](config) == state("transformer-xl", cached)
    assert told["transformer_xl_operations"](config) == operations("transformer-xl", cached) - base


GRU = {"dim": 24, "depth": 2, "hidden": 10}


def config_of_gru() -> Any:
    return import_target(info("gru").target).config_class(**GRU)


@pytest.mark.parametrize("name", [*COSTS, "controls"])
def test_figures_of_the_advice_stand_in_the_readme_or_the_results(name: str) -> None:
    measured = "".join((ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "docs/RESULTS.md"))
    figures = re.findall(r"\d+[.,]\d+", section(DOCS / "members" / f"{name}.md", "When to use"))
    assert not [figure for figure in figures if figure not in measured]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_place_in_the_reference(package: str) -> None:
    if package == "memory_models.hf":
        pytest.importorskip("transformers")
    public = importlib.import_module(package).__all__
    page = DOCS / "api" / f"{'hf' if package.endswith('.hf') else package}.md"
    told = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.M)
    assert sorted(told) == sorted(f"{package}.{name}" for name in public)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", text)
    named = re.findall(r"`((?:tests|examples|docs|benchmarks|htm|memorizing|memxl)/[\w/.-]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not [*missing, *(name for name in named if not (ROOT / name).exists())]


# The site.


def in_nav(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from in_nav(part)


def test_every_page_is_in_the_navigation_once() -> None:
    yaml = pytest.importorskip("yaml")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["strict"]
    assert sorted(in_nav(settings["nav"])) == sorted([*map(name_of, PAGES), *ELSEWHERE])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    # Not --quiet: warnings that are not shown do not count as errors.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_its_links_lead_somewhere(site: Path) -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    names = {page: {*re.findall(r'\sid="([^"]+)"', text)} for page, text in pages.items()}
    assert {page.relative_to(site).as_posix() for page in pages} == {
        *(name.removesuffix(".md") + ".html" for name in (*map(name_of, PAGES), *ELSEWHERE)),
        "404.html",
    }
    lost = []
    for page, text in pages.items():
        if page.name == "404.html":
            continue  # its links count from the root of a server
        for target in re.findall(r'(?:href|src)="(?![a-z]+:)([^"]*)"', text):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (anchor and not anchor.startswith("__") and anchor not in names[file]):
                lost.append(f"{page.relative_to(site)}: {target}")
    assert not lost


def test_the_site_fetches_nothing_from_other_hosts(site: Path) -> None:
    fetched = []
    for page in site.rglob("*.html"):
        for tag in re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text(encoding="utf-8")
        ):
            fetched += [f"{page.name}: {tag}" for _ in re.findall(r'(?:src|href)="?(?:https?:)?//', tag)]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        fetched += [
            f"{style.name}: {use}"
            for use in re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//.{40}", text)
        ]
    assert not fetched
    assert any(site.rglob("*.css"))
