"""What a run was made with: versions, commit, processor, and a digest of the code that makes its numbers."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
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


def source_digest(modules: Sequence[str]) -> str:
    """Hash of the code of modules or whole packages; comments, docstrings and layout do not count.

    Part of a run's id: without it a corrected model would be "finished" with the old model's numbers.
    Names that cannot be found count by name only.
    """
    digest = hashlib.sha256()
    for module in sorted(set(modules)):
        digest.update(_digest_of(module))
    return digest.hexdigest()[:16]


@functools.cache
def _digest_of(module: str) -> bytes:
    digest = hashlib.sha256(module.encode())
    for path in _source_files(module):
        digest.update(path.name.encode())
        digest.update(_code_of(path))
    return digest.digest()


def _source_files(module: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations:
        roots = [Path(root) for root in spec.submodule_search_locations]
        return sorted(path for root in roots for path in root.rglob("*.py"))
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def _code_of(path: Path) -> bytes:
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [statement for statement in node.body if not _is_text(statement)]
    return ast.dump(tree).encode()


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
