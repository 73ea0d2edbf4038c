"""Names for things imported on demand: clear errors, plug-ins, and packages that stand in the way."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from memory_models import Registry, UnknownNameError
from memory_models.registry import Named, import_target, nearest

ROOT = Path(__file__).parents[2]
GROUP = "memory_models.test_things"


def registry(*names: str, **options: Any) -> Registry[Named]:
    things: Registry[Named] = Registry("thing", **options)
    for name in names:
        things.register(Named(name, "math:pi"))
    return things


def test_an_entry_is_found_by_its_name_and_imported_on_demand() -> None:
    things = registry("pi")
    things.register(Named("broken", "no_such_package:x"))
    assert things.get("pi") == Named("pi", "math:pi")
    assert things.load("pi") == pytest.approx(3.14159, abs=1e-5)
    assert "pi" in things
    assert len(things) == 2
    with pytest.raises(ImportError, match="no_such_package"):
        things.load("broken")


def test_entries_come_in_order_of_registration_and_by_pattern() -> None:
    things = registry("mem-b", "mem-a", "other")
    assert things.names() == [entry.name for entry in things] == ["mem-b", "mem-a", "other"]
    assert things.names("mem-*") == ["mem-b", "mem-a"]
    assert things.names("nothing*") == []


def test_duplicate_names_raise_and_change_nothing() -> None:
    things = registry("pi")
    with pytest.raises(ValueError, match="thing 'pi' is registered already, as math:pi"):
        things.register(Named("pi", "math:tau"))
    assert things.get("pi").target == "math:pi"


def test_an_entry_can_be_taken_out_again() -> None:
    things = registry("pi", "e")
    things.unregister("pi")
    assert things.names() == ["e"]
    with pytest.raises(UnknownNameError):
        things.unregister("pi")
    things.register(Named("pi", "math:tau"))
    assert things.get("pi").target == "math:tau"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("memfomer", "unknown thing 'memfomer'. Did you mean 'memformer'? Known: htm, memformer"),
        ("HTM", "unknown thing 'HTM'. Known: htm, memformer"),
        ("zzz", "unknown thing 'zzz'. Known: htm, memformer"),
        ("", "unknown thing ''. Known: htm, memformer"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(asked: str, message: str) -> None:
    with pytest.raises(LookupError) as caught:
        registry("memformer", "htm").get(asked)
    assert str(caught.value) == message
    assert isinstance(caught.value, UnknownNameError)
    # A KeyError would show its message in quotes.
    assert not isinstance(caught.value, KeyError)


def test_an_empty_registry_says_so() -> None:
    assert nearest("x", []) == "Known: none"


def test_a_target_may_be_given_in_place_of_a_name() -> None:
    things = registry()
    assert things.load("fractions:Fraction").__name__ == "Fraction"
    assert things.get("fractions:Fraction") == Named("fractions:Fraction", "fractions:Fraction")
    assert len(things) == 0


@pytest.mark.parametrize("target", ["math", "math:", ":pi", ":", ""])
def test_a_target_must_name_a_package_and_an_attribute(target: str) -> None:
    with pytest.raises(ValueError, match=r"must look like 'package\.module:attribute'"):
        import_target(target)


def test_a_missing_attribute_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="module 'math' has no 'tu' "):
        import_target("math:tu")


class FakePoints:
    """Stands in for the entry points of installed distributions, and counts how often they are read."""

    def __init__(self, *points: tuple[str, str]) -> None:
        self.points = [importlib.metadata.EntryPoint(name, value, GROUP) for name, value in points]
        self.reads = 0

    def __call__(self, *, group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == GROUP
        self.reads += 1
        return self.points


def test_plug_ins_join_through_their_entry_point_group(monkeypatch: pytest.MonkeyPatch) -> None:
    points = FakePoints(("tau", "math:tau"), ("e", "math:e"))
    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    things = registry("pi", group=GROUP)
    assert points.reads == 0
    assert things.names() == ["pi", "tau", "e"]
    assert things.load("tau") == pytest.approx(6.28318, abs=1e-5)
    assert "e" in things
    assert points.reads == 1


@pytest.mark.parametrize("first", ["get", "contains", "len", "iter", "names"])
def test_plug_ins_are_known_whatever_is_asked_first(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", FakePoints(("tau", "math:tau")))
    things = registry(group=GROUP)
    asked = {
        "get": lambda: things.get("tau").name == "tau",
        "contains": lambda: "tau" in things,
        "len": lambda: len(things) == 1,
        "iter": lambda: [entry.name for entry in things] == ["tau"],
        "names": lambda: things.names() == ["tau"],
    }
    assert asked[first]()


def test_a_plug_in_that_takes_a_name_raises_every_time_until_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = FakePoints(("tau", "math:tau"), ("pi", "other:pi"))
    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    things = registry("pi", group=GROUP)
    for _ in range(2):
        with pytest.raises(ValueError, match="thing 'pi' is registered already, as math:pi"):
            things.names()
    points.points.pop()
    assert things.names() == ["pi", "tau"]


# The registry's module alone, without torch, to be quick.
PROGRAM = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("registry", {str(ROOT / "memory_models" / "registry.py")!r})
registry = sys.modules["registry"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(registry)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` where `folder` comes first among the places that packages are looked for."""
    program = f"{PROGRAM}sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n{textwrap.dedent(code)}"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, check=False
    )


@pytest.mark.parametrize("kind", ["package", "package with a model of its own", "module"])
def test_a_foreign_package_in_the_way_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "module":
        path = tmp_path / "htm.py"
        path.write_text("class HTM: ...")
    else:
        path = tmp_path / "htm" / "__init__.py"
        path.parent.mkdir()
        path.write_text("__version__ = '9.9'")
        if kind != "package":
            (path.parent / "model.py").write_text("class HTM: ...")
    done = run(
        """
        try:
            registry.import_target("htm.model:HTM")
        except ImportError as error:
            print(type(error).__name__, error)
        """,
        tmp_path,
    )
    assert done.stdout == (
        f"ImportError package 'htm' at {path} is not the one of memory-models: "
        "uninstall it, or install memory-models in an environment of its own\n"
    ), done.stderr


def test_an_import_error_of_our_own_code_is_told_as_it_is(tmp_path: Path) -> None:
    package = tmp_path / "htm"
    package.mkdir()
    (package / "__init__.py").write_text("__distribution__ = 'memory-models'")
    (package / "model.py").write_text("import a_package_that_is_missing")
    done = run(
        """
        registry.import_target("htm.model:HTM")
        """,
        tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("No module named 'a_package_that_is_missing'")
