"""The processes that train together: one with plain torch, several through Accelerate.

Rows are shared out in order: with 2 processes and 8 rows the second has rows 4 to 7. Gradients are the
mean over the processes, as `DistributedDataParallel` and FSDP2 make it.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memory_models.state import Memory

# What torchrun (and `accelerate launch`, which calls it) or the kinds of mpirun tell a process.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class Processes:
    """This process alone.

    Args:
        device: where to train; `"auto"`: an accelerator if there is one and `accelerate launch` was not told
            `--cpu`.
    """

    rank = 0
    count = 1
    sharded = False
    """Whether a process holds only a part of each weight."""

    def __init__(self, device: str = "auto") -> None:
        if device == "auto":
            found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
            usable = found is not None and torch.accelerator.is_available()
            device = str(found) if usable and not _told("ACCELERATE_USE_CPU") else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device {device!r} is none that torch knows: {error}") from error

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def share(self, rows: int) -> range:
        """The rows of this process.

        Raises:
            ValueError: if they cannot be shared out evenly.
        """
        if rows % self.count:
            raise ValueError(f"{rows} rows cannot be shared out evenly among {self.count} processes")
        each = rows // self.count
        return range(self.rank * each, (self.rank + 1) * each)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """What to call in place of the model, and the optimiser of its weights."""
        return model.to(self.device), optimizer

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Backward passes in here add to the gradients of this process only."""
        return nullcontext()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        return [float(value) for value in values]

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes, `[rows, ...]` each, in order."""
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        """What each process gave, in order."""
        return [value]

    def gather_memory(self, memory: Memory) -> Memory:
        """The memories of all rows of all processes."""

        def join(leaf: Tensor) -> Tensor:
            if not leaf.numel():
                return leaf.new_zeros(leaf.shape[0] * self.count, *leaf.shape[1:])
            return self.gather(leaf.contiguous())

        return memory.detach().map(join)

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight, or what belongs to one, put together from all processes."""
        full = getattr(tensor, "full_tensor", None)
        return tensor.detach() if full is None else full().detach()

    def wait(self) -> None:
        """Until all processes are here."""

    def close(self) -> None:
        """Nothing more comes."""


class AcceleratedProcesses(Processes):
    """Several processes on one machine or several, as `accelerate launch` or `torchrun` started them.

    Weights are whole in each process (DDP) or, with `--use_fsdp --fsdp_version 2`, shared out (FSDP2). Then
    each process keeps its part of weights, gradients and optimiser state, and puts the weights together for
    a step: a member reads and writes its memory by other methods of its layers than `forward`, so that they
    cannot be gathered layer by layer.

    Raises:
        ImportError: if accelerate is not installed.
        ValueError: if the device, or the way of sharing work, is not supported.
    """

    def __init__(self, device: str = "auto") -> None:
        accelerate = _import_accelerate()
        if device not in ("auto", "cpu"):
            raise ValueError(f"device ({device!r}) is chosen by Accelerate when several processes train")
        if _told("ACCELERATE_USE_DEEPSPEED") or _told("ACCELERATE_USE_MEGATRON_LM"):
            raise ValueError("DeepSpeed and Megatron-LM are not supported; take DDP or FSDP2")
        self.sharded = _told("ACCELERATE_USE_FSDP")
        if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("FSDP 1 is not supported; take version 2: accelerate launch --fsdp_version 2")
        on_cpu = Processes(device).device.type == "cpu"
        # Autocast and loss scaling are the loop's own, the same with one process as with several.
        self.accelerator = accelerate.Accelerator(cpu=on_cpu, mixed_precision="no")
        self.device = self.accelerator.device
        self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.sharded:
            return self._shard(model.to(self.device), optimizer), optimizer
        return self.accelerator.prepare_model(model), optimizer

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        # FSDP2 adds to the gradients of all, and would have to keep them whole to wait.
        return nullcontext() if self.sharded else self.accelerator.no_sync(model)

    def _shard(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        before = dict(model.named_parameters())
        fully_shard(
            model,
            mesh=init_device_mesh(self.device.type, (self.count,)),
            # A memory is given with each call and keeps its own dtype.
            mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
        )
        # The weights are other tensors now.
        after = {id(before[name]): parameter for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [after[id(parameter)] for parameter in group["params"]]
        return model

    def sum(self, *values: float) -> list[float]:
        # Double precision holds counts exactly; not every accelerator has it.
        kind = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        given = torch.tensor(values, dtype=kind, device=self.device)
        return self.accelerator.reduce(given, reduction="sum").tolist()

    def gather(self, tensor: Tensor) -> Tensor:
        return self.accelerator.gather(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        return _import_accelerate().utils.gather_object([value])

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()


def connect(device: str = "auto") -> Processes:
    """The processes this one was started with.

    Raises:
        ImportError: if there are several and accelerate is not installed.
        ValueError: if the device, or the way of sharing work, is not supported, or if several processes were
            asked for and one was started.
    """
    count = next((int(os.environ[name]) for name in _COUNTS if name in os.environ), None)
    if count is None and _told("ACCELERATE_USE_CPU") and "MASTER_PORT" in os.environ:
        # It gives the port if asked for several, and would leave one to train alone on all rows.
        raise ValueError(
            "accelerate launch --cpu starts one process, whatever --num_processes says, unless it has an MPI "
            "(--mpirun_hostfile). Start several on CPUs with torchrun --nproc-per-node N, or with accelerate "
            "launch --multi_gpu --num_processes N, which takes CPUs where there is no GPU"
        )
    if count is not None and count > 1:
        return AcceleratedProcesses(device)
    return Processes(device)


def _told(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _import_accelerate() -> Any:
    try:
        return importlib.import_module("accelerate")
    except ImportError as error:
        raise ImportError(
            "training with several processes needs the package accelerate: pip install 'memory-models[train]'"
        ) from error
