"""The contract of a memory-augmented module: `y, memory = module(x, memory)`.

`MemoryModule.forward` does what is the same for every member: it checks the input, supplies fresh
memories, turns resets inside a call into rows of their own and padding into ragged rows. A member
implements three methods: `init_memory`, `read` and `write`.
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memory_models.checks import check_flags, check_reset, check_tensor
from memory_models.pretrained import Pretrained
from memory_models.state import Memory

M = TypeVar("M", bound=Memory)


class MemoryModule(Pretrained, nn.Module, Generic[M]):
    """A network over embeddings that carries a memory from segment to segment.

    Attributes:
        dim: width of input and output.
        segment_length: most tokens of one segment.
        differentiable_memory: whether a loss in a later segment reaches, through the memory, what an
            earlier segment wrote.
    """

    dim: int
    segment_length: int
    differentiable_memory: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # torch.compile keeps eight graphs for each code object; the classes must not share them.
        if isinstance(cls.forward, FunctionType) and "forward" not in vars(cls):
            cls.forward = _with_own_code(cls.forward)  # type: ignore[method-assign]

    def init_memory(self, batch_size: int) -> M:
        """A fresh memory of `batch_size` rows on the module's device and in its dtype."""
        raise NotImplementedError

    def read(self, x: Tensor, memory: M, lengths: Tensor | None) -> tuple[Tensor, M]:
        """Process the next piece of an open segment; what members implement, not what users call.

        Args:
            x: `[batch, time, dim]`, finite at padding.
            memory: as left by the piece before.
            lengths: int64 `[batch]`, row `b`'s first `lengths[b]` tokens are real and the others
                padding; None means that all are. With None and `time == segment_length` the open
                segment is empty.

        Returns:
            The output `[batch, time, dim]` (anything at padding), and the memory with a longer open
            segment.
        """
        raise NotImplementedError

    def write(self, memory: M) -> M:
        """End the segment: write its tokens into the memory and leave an empty open segment.

        A row whose open segment is empty keeps its memory.
        """
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        memory: M | None = None,
        *,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        close: bool | Tensor = True,
    ) -> tuple[Tensor, M]:
        """Read one segment, or a piece of one, and write it if it ends here.

        Args:
            x: `[batch, time, dim]`, `time` at most `segment_length` less what the open segment holds.
            memory: what the last call returned; None starts afresh.
            mask: bool `[batch, time]`, false at padding, which is neither attended nor written.
            reset: bool `[batch]` or `[batch, time]`, true where a new document begins: what follows
                sees neither the memory nor the earlier tokens of its row.
            close: whether the segment ends with this call; bool `[batch]` to end it row by row.

        Returns:
            The output `[batch, time, dim]`, zero at padding, and the next memory. The memory given is
            not changed.

        Raises:
            TypeError: if an argument is no tensor, a dtype is wrong or the memory is another module's.
            ValueError: if shapes or devices disagree or the segment gets longer than `segment_length`.
        """
        batch, time = self._check_input(x, mask, reset, close)
        if memory is None:
            memory = self.init_memory(batch)
        else:
            self._check_memory(memory, x)
        if reset is not None:
            first = reset if reset.dim() == 1 else reset[:, 0] if time else reset.new_zeros(batch)
            memory = self.reset_memory(memory, first)
        if reset is not None and reset.dim() == 2 and _may_be_true(reset[:, 1:]):
            y, memory = self._read_documents(x, memory, mask, reset)
        else:
            y, memory = self._read_masked(x, memory, mask)
        if isinstance(close, Tensor):
            return y, self.write(memory).where(close, memory)
        return y, self.write(memory) if close else memory

    if TYPE_CHECKING:
        # torch's own says Any of what comes out.
        def __call__(
            self,
            x: Tensor,
            memory: M | None = None,
            *,
            mask: Tensor | None = None,
            reset: Tensor | None = None,
            close: bool | Tensor = True,
        ) -> tuple[Tensor, M]: ...

    def reset_memory(self, memory: M, rows: Tensor) -> M:
        """The memory with the rows marked true in bool `rows` `[batch]` fresh again.

        Raises:
            TypeError: if `rows` is not boolean.
            ValueError: if it has another shape.
        """
        check_tensor("rows", rows)
        check_flags("rows", rows, (memory.batch_size,))
        if _has_no_values(rows):
            return self.init_memory(memory.batch_size).where(rows, memory)
        fresh = rows.nonzero().squeeze(1)
        return memory.replace(fresh, self.init_memory(len(fresh))) if len(fresh) else memory

    def commit(self, memory: M) -> M:
        """Flush writes that wait for a store outside the memory; between segments. Default: none."""
        return memory

    def outside_bytes(self, memory: M) -> int:
        """Bytes that a store outside the memory sets aside for its rows. Default: 0."""
        return 0

    def _read_masked(self, x: Tensor, memory: M, mask: Tensor | None) -> tuple[Tensor, M]:
        time = x.shape[1]
        if time == 0:
            return x, memory
        if mask is None or not _may_be_true(~mask):
            self._check_room(memory, time, None)
            return self.read(x, memory, None)
        lengths = mask.sum(1)
        self._check_room(memory, time, lengths)
        # where, not multiply: padding may hold NaN.
        x = torch.where(mask[..., None], x, 0)
        # Real tokens move to the front, so that members see ragged rows and nothing else.
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        y, memory = self.read(x[rows, order], memory, lengths)
        back = torch.argsort(order, dim=1)
        return torch.where(mask[..., None], y[rows, back], 0), memory

    def _read_documents(self, x: Tensor, memory: M, mask: Tensor | None, reset: Tensor) -> tuple[Tensor, M]:
        # A reset inside the call: each document becomes a row of its own, the first with the row's
        # memory, the others with fresh ones. Exact for every member, NaN included, at the cost of one
        # more row for each document that begins inside the segment.
        batch, time = reset.shape
        document = torch.cat([torch.zeros_like(reset[:, :1]), reset[:, 1:]], 1).long().cumsum(1)
        count = document[:, -1] + 1
        start = count.cumsum(0) - count
        rows = torch.repeat_interleave(torch.arange(batch, device=x.device), count)
        number = torch.arange(rows.shape[0], device=x.device) - start[rows]
        own = document[rows] == number[:, None]
        if mask is not None:
            own = own & mask[rows]
        spread = self.reset_memory(memory.select(rows), number > 0)
        y, spread = self._read_masked(x[rows], spread, own)
        y = y[start[:, None] + document, torch.arange(time, device=x.device)]
        return y, spread.select(start + count - 1)

    def _check_input(
        self, x: Tensor, mask: Tensor | None, reset: Tensor | None, close: bool | Tensor
    ) -> tuple[int, int]:
        name = type(self).__name__
        check_tensor("x", x)
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{name} takes x [batch, time, {self.dim}], got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} takes floating-point embeddings, got {x.dtype}")
        weight = next(self.parameters(), None)
        if weight is not None:
            # The meta device has no autocast; asking about it raises.
            autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
            if not autocast and x.dtype != weight.dtype:
                raise TypeError(
                    f"x is {x.dtype} but {name}'s weights are {weight.dtype}; "
                    f"convert one: x.to({weight.dtype}) or module.to({x.dtype})"
                )
            if x.device != weight.device:
                raise ValueError(f"x is on {x.device} but {name}'s weights are on {weight.device}")
        batch, time = x.shape[:2]
        if time > self.segment_length:
            raise ValueError(
                f"the input has {time} tokens, more than segment_length ({self.segment_length}); cut it "
                "with memory_models.unroll(module, x) or build the module with a longer segment"
            )
        check_flags("mask", mask, (batch, time), x.device)
        check_reset(reset, batch, time, x.device)
        if isinstance(close, Tensor):
            check_flags("close", close, (batch,), x.device)
        elif not isinstance(close, bool | np.bool_):
            raise TypeError(f"close must be a bool or a bool tensor [{batch}], got {type(close).__name__}")
        return batch, time

    def _check_memory(self, memory: Any, x: Tensor) -> None:
        if not isinstance(memory, Memory):
            raise TypeError(f"memory must be what init_memory or the last call returned, got {type(memory)}")
        if memory.batch_size != x.shape[0]:
            raise ValueError(
                f"x has {x.shape[0]} rows but the memory has {memory.batch_size}; take the memory's rows "
                "with memory.select(indices)"
            )
        if torch.compiler.is_compiling():
            return
        fresh = self._memory_template()
        if type(memory) is not type(fresh):
            raise TypeError(
                f"{type(self).__name__} carries a {type(fresh).__name__}, got a {type(memory).__name__}"
            )
        leaves = memory.tensors()
        for path, leaf in fresh.tensors().items():
            if path not in leaves:
                raise ValueError(f"the memory has no {path}: it comes from a module with other options")
            if leaves[path].shape[1:] != leaf.shape[1:]:
                raise ValueError(
                    f"the memory's {path} is {tuple(leaves[path].shape)}, this module needs [batch, "
                    f"{', '.join(map(str, leaf.shape[1:]))}]: it comes from a module with other options"
                )
            if leaves[path].dtype != leaf.dtype:
                raise TypeError(
                    f"the memory's {path} is {leaves[path].dtype}, this module keeps it in {leaf.dtype}; "
                    "use memory.to(module.init_memory(1))"
                )
            if leaves[path].device != x.device:
                raise ValueError(
                    f"the memory's {path} is on {leaves[path].device}, x on {x.device}; "
                    f"use memory.to({str(x.device)!r})"
                )
        if pytree.tree_structure(memory) != pytree.tree_structure(fresh):
            odd = ", ".join(sorted(leaves.keys() - fresh.tensors().keys())) or "other fixed fields"
            raise ValueError(
                f"the memory has {odd} beyond this module's: it comes from a module with other options"
            )

    def _memory_template(self) -> M:
        # An empty memory, for its paths, shapes and dtypes. Kept until the module's dtype changes; it
        # is configuration, not the state of a stream.
        weight = next(self.parameters(), None)
        dtype = None if weight is None else weight.dtype
        kept = self.__dict__.get("_template")
        if kept is None or kept[0] != dtype:
            # No graph: within a checkpoint the first run would save tensors that the second does not.
            with torch.no_grad():
                kept = (dtype, self.init_memory(0).detach().to(device="meta"))
            self.__dict__["_template"] = kept
        return kept[1]

    def _check_room(self, memory: M, time: int, lengths: Tensor | None) -> None:
        open_length = memory.open_length
        if _has_no_values(open_length) or memory.batch_size == 0:
            return
        needed = int((open_length + (time if lengths is None else lengths)).max())
        if needed > self.segment_length:
            raise ValueError(
                f"the open segment would hold {needed} tokens, more than segment_length "
                f"({self.segment_length}); end it earlier with close=True"
            )


def _with_own_code(function: FunctionType) -> FunctionType:
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    own.__annotations__, own.__doc__ = function.__annotations__, function.__doc__
    own.__module__, own.__qualname__ = function.__module__, function.__qualname__
    return own


def _may_be_true(flags: Tensor) -> bool:
    # Where the answer must not depend on data it is always "maybe".
    return _has_no_values(flags) or bool(flags.any())


def _has_no_values(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or tensor.device.type == "meta"
