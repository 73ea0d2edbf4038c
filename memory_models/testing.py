"""The contract as checks that anybody's module can be put to: `check_model(module)`.

Each rule is a law, tested on a float64 copy of the module in evaluation mode with random inputs. A module
that passes may be used wherever this library's own members are used.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from memory_models.contract import memory, sequence, use
from memory_models.contract.subject import Broken, Rule, Subject
from memory_models.module import MemoryModule

__all__ = ["RULES", "ContractError", "Rule", "check_model"]

RULES: dict[str, Rule] = {rule.name: rule for rule in (*memory.RULES, *sequence.RULES, *use.RULES)}


class ContractError(AssertionError):
    """A module breaks rules of the contract.

    Attributes:
        failures: what was seen, by the name of the rule.
    """

    def __init__(self, name: str, failures: dict[str, str]) -> None:
        self.failures = failures
        lines = "\n".join(f"  {rule} ({RULES[rule].law}): {seen}" for rule, seen in failures.items())
        super().__init__(f"{name} breaks {len(failures)} of {len(RULES)} rules:\n{lines}")


def check_model(model: MemoryModule[Any], *, only: Collection[str] = (), skip: Collection[str] = ()) -> None:
    """Put a module to every rule of the contract.

    Args:
        model: the module, which is copied and not changed. Small ones are checked fastest.
        only: names of rules to check; empty means all (see `RULES`).
        skip: names of rules to leave out, such as `compile`, the slowest.

    Raises:
        ContractError: with every rule that is broken, by name, and what was seen.
        ValueError: for an unknown rule.
    """
    for name in (*only, *skip):
        if name not in RULES:
            raise ValueError(f"unknown rule {name!r}; known: {', '.join(RULES)}")
    failures = {}
    for rule in RULES.values():
        if (only and rule.name not in only) or rule.name in skip:
            continue
        try:
            rule.check(Subject(model))
        except Broken as error:
            failures[rule.name] = str(error)
        except Exception as error:
            failures[rule.name] = f"{type(error).__name__}: {error}"
    if failures:
        raise ContractError(type(model).__name__, failures)
