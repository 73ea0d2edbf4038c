"""What torch puts around a model, and the model inside."""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: Any) -> Any:
    """The model inside `torch.compile`, `DistributedDataParallel` and `DataParallel`, or the model itself."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):
            # By the name of the part, for to import the class is to import the compiler.
            model = model._orig_mod
        else:
            return model
