"""What a run was made with: versions, commit, processor, and a digest of the code that makes its numbers."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path


def versions() -> dict[str, str]:
    """What the run was made with: Python, libraries, commit of the working tree, processor."""
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
    }
    for distribution in ("torch", "memory-models", "x-transformers"):
        found[distribution] = version_of(distribution)
    commit = _git_commit()
    if commit:
        found["commit"] = commit
    return found


def version_of(distribution: str) -> str:
    """Version of an installed distribution, or `"not installed"`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Model name of the processor, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """Most bytes of memory that this process has held, or None where the system does not tell."""
    # Not getrusage: on Linux a fresh process inherits the peak of the one that started it.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def source_digest(modules: Sequence[str], *, reached_from: Sequence[str] = (), afresh: bool = False) -> str:
    """Hash of code; comments, docstrings and layout do not count.

    Part of a run's id: without it a corrected model would be "finished" with the old model's numbers.
    Names that cannot be found count by name only.

    Args:
        modules: modules or whole packages.
        reached_from: modules that count with all of `imported_modules`.
        afresh: read all files again, which may have changed since this process read them.
    """
    if afresh:
        _digest_of.cache_clear()
        _imports_of.cache_clear()
    digest = hashlib.sha256()
    for module in sorted(set(modules)):
        digest.update(_digest_of(module))
    for module in imported_modules(reached_from):
        digest.update(_digest_of(module, alone=True))
    return digest.hexdigest()[:16]


def imported_modules(modules: Sequence[str]) -> list[str]:
    """The modules and all that they import, at any depth, of their own top-level package and of `benchmarks`.

    Imports in functions count, imports for type checkers do not. `memory_models` and the members are not
    followed: they count as whole packages. What is left out of `benchmarks` is in `_ASIDE`.
    """
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found and module not in _ASIDE:
            found.add(module)
            waiting += _imports_of(module)
    return sorted(found)


# What a run is made of stands in the fields of its spec, and what is said beside its scores changes none.
_ASIDE = frozenset(
    f"benchmarks.{name}" for name in ("defaults", "settings", "members", "provenance", "results", "diagnose")
)


@functools.cache
def _imports_of(module: str) -> tuple[str, ...]:
    package = module if _is_package(module) else module.rpartition(".")[0]
    followed = {module.partition(".")[0], "benchmarks"}
    found: list[str] = []
    for path in _source_files(module, alone=True):
        for level, base, names in _import_statements(path.read_bytes()):
            if names is None:
                found.append(base)
                continue
            base = importlib.util.resolve_name("." * level + base, package) if level else base
            found.append(base)
            if base.partition(".")[0] in followed and _is_package(base):
                # Its names may be modules.
                found += [f"{base}.{name}" for name in names]
    return tuple(name for name in found if name.partition(".")[0] in followed and _find(name) is not None)


# By content: to read a file again takes little, to parse it much more.
@functools.lru_cache(maxsize=1024)
def _import_statements(source: bytes) -> tuple[tuple[int, str, tuple[str, ...] | None], ...]:
    """Level, module and names of each `from ... import ...`; names None for a plain `import`."""
    found: list[tuple[int, str, tuple[str, ...] | None]] = []
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found += [(0, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
    return tuple(found)


def _find(module: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _is_package(module: str) -> bool:
    spec = _find(module)
    return spec is not None and spec.submodule_search_locations is not None


@functools.cache
def _digest_of(module: str, *, alone: bool = False) -> bytes:
    digest = hashlib.sha256(module.encode())
    for path in _source_files(module, alone=alone):
        digest.update(path.name.encode())
        digest.update(_code_of(path.read_bytes()))
    return digest.digest()


def _source_files(module: str, *, alone: bool = False) -> list[Path]:
    # Of a package all its files, or alone the one that runs when it is imported.
    spec = _find(module)
    if spec is None:
        return []
    if spec.submodule_search_locations and not alone:
        roots = [Path(root) for root in spec.submodule_search_locations]
        return sorted(path for root in roots for path in root.rglob("*.py"))
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


@functools.lru_cache(maxsize=1024)
def _code_of(source: bytes) -> bytes:
    """Digest of the code in a file."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return hashlib.sha256(ast.dump(tree).encode()).digest()


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _git_commit() -> str | None:
    # Only when this very package is what the working tree holds: an installed wheel that lies inside
    # somebody else's repository has no commit of ours.
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    git = ["git", "-C", str(here)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
        # Documents do not count: a study writes its tables into them while it goes on.
        code = ["--", "*.py", "pyproject.toml", "constraints.txt"]
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", *code], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
