"""The methods with which a model goes to a folder or to the Hub; `memory_models.hub` does the work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from memory_models.registry import import_target

if TYPE_CHECKING:
    import torch

    from memory_models.state import Memory


class Pretrained:
    """The methods of a model that is kept in a folder or on the Hub. Its class is a model's."""

    def save_pretrained(self, folder: str | os.PathLike[str], *, memory: Memory | None = None) -> None:
        """Write options and weights, and the memory beside them; as the function `save_pretrained`."""
        _of_hub("save_pretrained")(self, folder, memory=memory)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_classes: bool = False,
    ) -> Self:
        """Load a model of this class; as the function `from_pretrained`.

        Raises:
            CheckpointError: if it holds a model of another class, or as the function.
        """
        model = _of_hub("from_pretrained")(
            source,
            device=device,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            trust_classes=trust_classes,
        )
        if not isinstance(model, cls):
            raise _of_hub("CheckpointError")(
                f"{source} holds a {type(model).__name__}, not a {cls.__name__}; "
                "memory_models.from_pretrained loads either"
            )
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        memory: Memory | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Put the model on the Hub; as the function `push_to_hub`."""
        commit: str = _of_hub("push_to_hub")(
            self,
            repo_id,
            memory=memory,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            commit_message=commit_message,
        )
        return commit


def _of_hub(name: str) -> Any:
    # By name, as members are: what a model is must not depend on how it is kept.
    return import_target(f"memory_models.hub:{name}")
