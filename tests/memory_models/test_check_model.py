"""Each rule of the contract catches the module that breaks it, by the rule's name."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_models import ContractError, Memory, MemoryModule, check_model, list_models, memory_state, static
from memory_models.testing import RULES
from tests.members import MEMBERS, VARIANTS, small
from tests.memory_models.toys import Average, AverageMemory, Mean, MeanMemory
from tests.plug_in import NAME, install

COMPILED = [name for name in MEMBERS if name != "gru"]


@memory_state
class WithScale(MeanMemory):
    scale: Tensor


class NotBatchFirst(Mean):
    def init_memory(self, batch_size: int) -> Any:
        return WithScale(**vars(super().init_memory(batch_size)), scale=torch.ones(self.dim))


class CountTurnsToFloat(Mean):
    def write(self, memory: Any) -> Any:
        written = super().write(memory)
        return replace(written, count=written.count.double())


class WritesInPlace(Mean):
    def write(self, memory: Any) -> Any:
        memory.total.add_(memory.open_total.detach())
        return super().write(memory)


class ChangesItsInput(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        return super().read(x.mul_(2), memory, lengths)


class Noisy(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x, memory, lengths)
        return y + 1e-6 * torch.rand_like(y), memory


class StartsElsewhere(Mean):
    def forward(self, x: Tensor, memory: Any = None, **options: Any) -> Any:
        if memory is None:
            memory = self.init_memory(x.shape[0])
            memory = replace(memory, total=memory.total + 1, count=memory.count + 1)
        return super().forward(x, memory, **options)


class ResetsByMultiplying(Mean):
    def reset_memory(self, memory: Any, rows: Tensor) -> Any:
        return memory.map(lambda leaf: leaf * ~(rows if leaf.dim() == 1 else rows[:, None]))


class ResetsAllRows(Mean):
    def reset_memory(self, memory: Any, rows: Tensor) -> Any:
        return self.init_memory(memory.batch_size) if rows.any() else memory


class MixesRows(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x, memory, lengths)
        return y - y.mean(0) if len(y) else y, memory


class KnowsItsRow(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x, memory, lengths)
        return y + torch.arange(len(y))[:, None, None], memory


class ForgetsTheOpenSegment(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        forgotten = replace(memory, open_total=torch.zeros_like(memory.open_total))
        return super().read(x, forgotten, lengths)


class ClosesAllRows(Mean):
    def forward(self, x: Tensor, memory: Any = None, *, close: bool | Tensor = True, **options: Any) -> Any:
        return super().forward(x, memory, close=bool(torch.as_tensor(close).any()), **options)


class CountsItsCalls(Mean):
    calls = 0

    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x, memory, lengths)
        self.calls += 1
        return y * self.calls, memory


class IgnoresTheMask(Mean):
    def forward(self, x: Tensor, memory: Any = None, *, mask: Tensor | None = None, **options: Any) -> Any:
        return super().forward(x.nan_to_num(), memory, **options)


class ReadsThePadding(Mean):
    def forward(self, x: Tensor, memory: Any = None, *, mask: Tensor | None = None, **options: Any) -> Any:
        y, memory = super().forward(x, memory, mask=mask, **options)
        return y if mask is None else torch.where(mask[..., None], y, x), memory


class WritesEmptyRows(Mean):
    def write(self, memory: Any) -> Any:
        return super().write(replace(memory, filled=memory.filled.clamp(min=1)))


class ResetsTooEarly(Mean):
    def forward(self, x: Tensor, memory: Any = None, *, reset: Tensor | None = None, **options: Any) -> Any:
        if reset is not None and reset.dim() == 2:
            reset = reset.any(1)
        return super().forward(x, memory, reset=reset, **options)


class SeesTheFuture(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x, memory, lengths)
        return y + x.mean(1, keepdim=True), memory


class SeesTheFutureDetached(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x, memory, lengths)
        return y + x.detach().mean(1, keepdim=True), memory


class PromisesGradient(Mean):
    def write(self, memory: Any) -> Any:
        return super().write(memory.detach())


class DeniesGradient(Mean):
    differentiable_memory = False


class KeepsStateOfItsOwn(Mean):
    kept: Tensor | float = 0.0

    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        y, memory = super().read(x + self.kept, memory, lengths)
        self.kept = y.mean()
        return y, memory


@memory_state
class WithSteps(MeanMemory):
    steps: int = static()


class CountsInPython(Mean):
    def init_memory(self, batch_size: int) -> Any:
        return WithSteps(**vars(super().init_memory(batch_size)), steps=0)

    def write(self, memory: Any) -> Any:
        return replace(super().write(memory), steps=memory.steps + 1)

    def _check_memory(self, memory: Any, x: Tensor) -> None:
        pass


class LosesItsWeights(Mean):
    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {name: torch.zeros_like(value) for name, value in super().state_dict(*args, **options).items()}


class AlwaysFloat32(Mean):
    def forward(self, x: Tensor, memory: Any = None, **options: Any) -> Any:
        y, memory = super().forward(x, memory, **options)
        return y.float() if y.dtype == torch.bfloat16 else y, memory


class MemoryInFloat32(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        return super().read(x, replace(memory, total=memory.total.to(x.dtype)), lengths)

    def write(self, memory: Any) -> Any:
        written = super().write(memory)
        return replace(written, total=written.total.float())

    def _check_memory(self, memory: Any, x: Tensor) -> None:
        pass


class Explodes(Mean):
    def write(self, memory: Any) -> Any:
        return replace(super().write(memory), total=memory.total * 10 + memory.open_total)


class Grows(Average):
    def forward(self, x: Tensor, memory: AverageMemory | None = None, **options: Any) -> Any:
        given = self.init_memory(len(x)) if memory is None else memory
        y, _ = super().forward(x, None, **options)
        return y, AverageMemory(average=torch.cat([given.average, given.average], 1))


class NeedsATokenThere(Mean):
    def forward(self, x: Tensor, memory: Any = None, **options: Any) -> Any:
        x[:, -1]
        return super().forward(x, memory, **options)


class LosesAnOpenSegment(Mean):
    def forward(self, x: Tensor, memory: Any = None, **options: Any) -> Any:
        return super().forward(x, memory, **options) if x.shape[1] else (x, memory)


class CutsInputSilently(Mean):
    def forward(self, x: Tensor, memory: Any = None, **options: Any) -> Any:
        return super().forward(x[:, : self.segment_length], memory, **options)


class AsksForAValue(Mean):
    def read(self, x: Tensor, memory: Any, lengths: Tensor | None) -> tuple[Tensor, Any]:
        return super().read(x if x.sum() > 0 else -x, memory, lengths)


BROKEN: list[tuple[str, type[nn.Module], str]] = [
    ("batch-first", NotBatchFirst, "scale is [4] for a batch of 2"),
    ("structure", CountTurnsToFloat, "count is torch.float64[3] after close=True, was torch.int64[3]"),
    ("pure", WritesInPlace, "the memory given's total differs"),
    ("pure", ChangesItsInput, "the input given differs"),
    ("deterministic", Noisy, "the output of a second call differs"),
    ("fresh", StartsElsewhere, "the output differs"),
    ("reset-fresh", ResetsByMultiplying, "the output of a row with reset [batch] differs by nan"),
    ("reset-others", ResetsAllRows, "the output of row 0 differs"),
    ("rows", MixesRows, "the output of rows one by one differs"),
    ("rows", KnowsItsRow, "the output of permuted rows differs"),
    ("pieces", ForgetsTheOpenSegment, "in pieces of 1 differs"),
    ("close-rows", ClosesAllRows, "the memory of row 1's count differs"),
    ("segments", CountsItsCalls, "the output of single segments differs"),
    ("padding", IgnoresTheMask, "the output at padding differs"),
    ("padding", ReadsThePadding, "the output at padding differs"),
    ("padding-row", WritesEmptyRows, "the memory of the row's count differs"),
    ("reset-inside", ResetsTooEarly, "the output before the reset differs"),
    ("causal", SeesTheFuture, "the output at token 0 has a gradient to a later token"),
    ("causal", SeesTheFutureDetached, "the output before a changed token differs"),
    ("gradient", PromisesGradient, "differentiable_memory is True, but no gradient"),
    ("gradient", DeniesGradient, "differentiable_memory is False, but a gradient"),
    ("detach", KeepsStateOfItsOwn, "the module keeps state of its own"),
    ("save-load", CountsInPython, "its fixed fields differ"),
    ("save-load", LosesItsWeights, "the output after load_state_dict differs"),
    ("dtype", AlwaysFloat32, "the output of a torch.bfloat16 module is torch.float32"),
    ("dtype", MemoryInFloat32, "total is torch.float32 after a segment, torch.bfloat16 before"),
    ("finite", Explodes, "not finite after segment"),
    ("finite", Grows, "the memory grew from 36 to 72 bytes"),
    ("empty", NeedsATokenThere, "IndexError"),
    ("empty", LosesAnOpenSegment, "a segment ended by a call without tokens"),
    ("rejects", CutsInputSilently, "a segment that is too long raised nothing"),
    ("compile", AsksForAValue, "Unsupported"),
    ("compile", Grows, "four segments of one shape took 4 graphs"),
]


@pytest.mark.parametrize(("rule", "broken", "seen"), BROKEN, ids=[f"{r}-{b.__name__}" for r, b, _ in BROKEN])
def test_a_broken_module_is_caught_by_the_name_of_the_rule(rule: str, broken: Any, seen: str) -> None:
    with pytest.raises(ContractError) as caught:
        check_model(broken(), only=[rule])
    assert caught.value.failures.keys() == {rule}
    assert seen in caught.value.failures[rule]
    assert f"{rule} ({RULES[rule].law})" in str(caught.value)


def test_every_rule_has_a_broken_module() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


def test_a_correct_module_passes_all_rules() -> None:
    check_model(Mean())


def test_a_module_that_is_no_subclass_can_be_checked() -> None:
    model = Average()
    assert not isinstance(model, MemoryModule)
    check_model(model)  # type: ignore[arg-type]


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(ContractError, match=r"MixesRows breaks \d+ of \d+ rules") as caught:
        check_model(MixesRows(), skip=["compile"])
    assert {"rows", "reset-inside"} <= caught.value.failures.keys()
    assert isinstance(caught.value, AssertionError)


def test_a_module_that_crashes_is_reported_and_the_other_rules_still_run() -> None:
    with pytest.raises(ContractError) as caught:
        check_model(NeedsATokenThere(), skip=["compile"])
    assert caught.value.failures.keys() == {"empty"}


@pytest.mark.parametrize("option", ["only", "skip"])
def test_an_unknown_rule_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=r"unknown rule 'causl'; known: .*causal"):
        check_model(Mean(), **{option: ["causl"]})


def test_the_module_checked_is_left_as_it_was() -> None:
    model = Mean().train()
    before = copy.deepcopy(model.state_dict())
    check_model(model, skip=["compile"])
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_memory_state_of_a_broken_module_is_a_memory_all_the_same() -> None:
    # Otherwise the module would be refused for a reason other than its rule.
    assert issubclass(WithScale, Memory)
    assert issubclass(WithSteps, Memory)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_keeps_the_contract(name: str) -> None:
    check_model(small(name), skip=["compile"])


@pytest.mark.parametrize("name", COMPILED)
def test_every_member_compiles(name: str) -> None:
    # Tracing is what takes the time, layer by layer: two layers are traced in the slow tests.
    check_model(small(name, depth=1), only=["compile"])


def test_the_models_of_other_packages_are_members_and_keep_the_contract(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(tmp_path, monkeypatch)
    assert list_models() == [*MEMBERS, NAME]
    check_model(small(NAME), skip=["compile"])


def test_torch_cannot_trace_gru_yet() -> None:
    # When this fails the rule "compile" holds for the gru control too: add it to COMPILED.
    layer = torch.compile(nn.GRU(2, 2), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="GRU"):
        layer(torch.randn(1, 1, 2))


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_every_option_keeps_the_contract(name: str, options: dict[str, Any]) -> None:
    check_model(small(name, **options), skip=["compile"])


BY_OPTION = [*((name, {}) for name in COMPILED), *((name, of) for name, of in VARIANTS if name != "gru")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), BY_OPTION, ids=str)
def test_every_option_compiles(name: str, options: dict[str, Any]) -> None:
    check_model(small(name, **options), only=["compile"])
