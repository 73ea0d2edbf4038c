"""Options of a member as a model of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from memory_models.models import config_fields


class MemoryModelConfig(PreTrainedConfig):
    """Which member, with which options, around how many tokens.

    Args:
        memory: name of a member, or `"package.module:Class"`.
        options: fields of the member's config; the model fills in those not given.
        vocab_size: number of token ids.
        tie_word_embeddings: whether the head is the embedding transposed.
        embedding_std: as in `MemoryLM`.
        embedding_scale: as in `MemoryLM`.
        use_cache: whether a call returns its memory as `past_key_values`.
    """

    model_type = "memory-models"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (as the base class has it)

    memory: str = "memorizing"
    options: dict[str, Any] | None = None
    vocab_size: int = 32_000
    tie_word_embeddings: bool = True
    embedding_std: float | None = None
    embedding_scale: float | None = None
    use_cache: bool = True

    @property
    def member_options(self) -> dict[str, Any]:
        """The options that were given, as `create` takes them (JSON knows no tuples)."""
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in (self.options or {}).items()
        }

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings."""
        return self._option("dim")

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self._option("depth")

    @property
    def num_attention_heads(self) -> int:
        """Attention heads of a layer."""
        return self._option("heads")

    def _option(self, name: str) -> Any:
        return self.member_options.get(name, config_fields(self.memory).get(name))
