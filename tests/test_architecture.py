"""Arrows between the packages point one way, imports stay cheap, and library code keeps quiet."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAMILIES = ("htm", "memformer", "memorizing", "memxl")
PACKAGES = ("memory_models", *FAMILIES, "benchmarks")
# What each package may import of ours, itself apart.
MAY_IMPORT = {
    "memory_models": set(),
    **{family: {"memory_models"} for family in FAMILIES},
    "benchmarks": {"memory_models", *FAMILIES},
}
SLOW = (
    "faiss",
    "x_transformers",
    "matplotlib",
    "tokenizers",
    "rich",
    "tyro",
    "jinja2",
    "hypothesis",
    "transformers",
    "accelerate",
    "huggingface_hub",
    "ray",
    "gymnasium",
    "popgym",
)
# Imported by name only, by those who have transformers.
OPTIONAL = ROOT / "memory_models" / "hf"


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, *, at_import: bool = False, in_full: bool = False) -> Iterator[str]:
    """Dotted names of the modules that a file imports, relative ones resolved.

    With `at_import` only those that run when the file is imported: not in functions, nor for type checkers.
    With `in_full` those that run at any time, with what is taken: `a.b.c` for `from a.b import c`.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if (at_import or in_full) and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{source}.{alias.name}" for alias in node.names) if in_full else [source]
        stack.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package: str) -> None:
    assert files(package), f"{package} has no files: is the test looking in the right place?"
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        for name in imported(path)
        if name.partition(".")[0] in {*PACKAGES, "tests"} - allowed
    ]
    assert not wrong


def test_the_search_for_imports_finds_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "htm" / "case.py"
    path.parent.mkdir()
    path.write_text(
        "import memxl\nfrom memformer.x import y\nfrom . import memory\nfrom ..benchmarks import z\n"
        "def f():\n    import faiss\nif TYPE_CHECKING:\n    import rich\n"
    )
    early = {"memxl", "memformer.x", "htm", "benchmarks"}
    assert set(imported(path)) == early | {"faiss", "rich"}
    assert set(imported(path, at_import=True)) == early
    taken = {"memxl", "memformer.x.y", "htm.memory", "benchmarks.z", "faiss"}
    assert set(imported(path, in_full=True)) == taken


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_within(package: str) -> dict[str, set[str]]:
    """What each file imports of its package, in functions too; not for type checkers."""
    modules = {module_name(path): path for path in files(package)}

    def module_of(name: str) -> str:
        return name if name in modules else name.rpartition(".")[0]

    return {
        own: ({module_of(name) for name in imported(path, in_full=True)} & modules.keys()) - {own}
        for own, path in modules.items()
    }


def cycle_in(arrows: dict[str, set[str]]) -> list[str]:
    """A way from a module back to itself, or nothing."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (walk(other, [*way, name]) for other in sorted(arrows[name]))), [])
        done.add(name)
        return found

    return next(filter(None, (walk(name, []) for name in sorted(arrows))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_leads_back_to_itself(package: str) -> None:
    assert " -> ".join(cycle_in(imports_within(package))) == ""


def test_the_search_for_cycles_finds_one() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", ["memory_models", *FAMILIES])
def test_library_code_does_not_print(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "logging.basicConfig")
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_whose_it_is_and_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    names = {
        ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ast.unparse(node.target): node.value
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    }
    assert ast.literal_eval(names["__distribution__"]) == "memory-models"  # type: ignore[arg-type]
    assert "__all__" in names


@pytest.mark.parametrize("package", ["memory_models", "benchmarks"])
def test_no_slow_package_is_imported_with_ours(package: str) -> None:
    program = (
        "import sys, time, torch, safetensors.torch, einops, torch.utils.flop_counter\n"
        "begin, known = time.process_time(), set(sys.modules)\n"
        f"import {package}\n"
        "print(time.process_time() - begin)\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - known}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    seconds, loaded = done.stdout.splitlines()
    assert not set(loaded.split()) & {*SLOW, *(FAMILIES if package == "memory_models" else ())}
    # What ours adds to torch and the other base packages; it was seen to be a twentieth of a second.
    assert float(seconds) < 1


def test_no_optional_package_is_imported_by_a_librarys_files() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for package in ("memory_models", *FAMILIES)
        for path in files(package)
        for name in imported(path, at_import=True)
        if name.partition(".")[0] in SLOW and OPTIONAL not in path.parents
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_no_time_is_taken_from_a_clock_that_can_be_set(package: str) -> None:
    # What `time.time` tells jumps when the machine's clock is set; durations are results here.
    wrong = []
    for path in files(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name(id="time"), attr="time" | "time_ns"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
                case ast.ImportFrom(module="time", names=names):
                    if {"time", "time_ns", "*"} & {alias.name for alias in names}:
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong
