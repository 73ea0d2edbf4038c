"""A member of the family as an `AutoModelForCausalLM`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memory_models.advance import advance
from memory_models.checkpoints import CheckpointError
from memory_models.hf.cache import MemoryCache, repeat_rows
from memory_models.hf.config import MemoryModelConfig
from memory_models.hf.masks import newest_flags
from memory_models.lm import IGNORED_LABEL, MemoryLM, cross_entropy
from memory_models.models import create_lm, describe


class MemoryModelForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model around a member, with the calls of Hugging Face transformers.

    Its context is its memory: `past_key_values` is a `MemoryCache` of constant size, which goes from call to
    call and is reordered by beam search. Input of any length is cut into segments; the last one stays open,
    so that a text gives the same logits in one call, in several, and token by token.

    Args:
        config: which member, with which options.

    Raises:
        LookupError, TypeError, ValueError: as `create_lm`.
    """

    config_class = MemoryModelConfig
    base_model_prefix = "lm"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm.head.weight": "lm.embedding.weight"}  # noqa: RUF012 (as the base class has it)
    # A memory cannot take tokens back, so generate() refuses assisted decoding.
    _is_stateful = True

    def __init__(self, config: MemoryModelConfig) -> None:
        super().__init__(config)
        self.lm = create_lm(
            config.memory,
            vocab_size=config.vocab_size,
            tie_embeddings=config.tie_word_embeddings,
            embedding_std=config.embedding_std,
            embedding_scale=config.embedding_scale,
            **config.member_options,
        )
        # With the defaults spelled out: a saved model must not change when they do.
        config.options = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in describe(self.lm.module)["options"].items()
        }
        self.post_init()

    @classmethod
    def from_lm(cls, lm: MemoryLM) -> MemoryModelForCausalLM:
        """The same model with a copy of the weights, from one that `create_lm` or `load_model` made.

        Raises:
            ValueError: if the model was not made from the registry.
        """
        about = describe(lm)
        own = dict(about["language_model"])
        config = MemoryModelConfig(
            memory=about["model"],
            options=about["options"],
            tie_word_embeddings=own.pop("tie_embeddings", True),
            **own,
        )
        model: Any = cls(config)
        model.lm.load_state_dict(lm.state_dict())
        first = next(lm.parameters())
        return model.to(device=first.device, dtype=first.dtype).train(lm.training)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load what `save_pretrained` wrote, with the arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            CheckpointError: if a weight is missing, which transformers would only warn of.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, about = loaded
        if about["missing_keys"]:
            raise CheckpointError(f"the checkpoint lacks {', '.join(sorted(about['missing_keys']))}")
        buffers = dict(model.named_buffers())
        lost = buffers.keys() - model.state_dict().keys()
        if lost:
            # transformers builds models without values, and such buffers are not in the file.
            computed = dict(cls(model.config).named_buffers())
            for name in lost:
                buffers[name].copy_(computed[name])
        return (model, about) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next token at each place.

        Args:
            input_ids: int64 `[batch, time]`, any number of tokens; any id at padding.
            attention_mask: `[batch, time]` or `[batch, past + time]`, 0 at padding; None: all are real.
            past_key_values: where to go on; replaced in place. None starts afresh.
            inputs_embeds: `[batch, time, dim]` in place of `input_ids`, before `embedding_scale`.
            labels: int64 `[batch, time]`, the input itself as a rule: the shift by one is applied here. -100
                where nothing is asked; so is the first token of a call that goes on with a memory. Nothing is
                asked at padding, nor of it.
            use_cache: whether to return the memory; None: as the config says.
            logits_to_keep: how many of the last logits to compute, 0 for all, or at which indices.
            num_items_in_batch: divides the summed loss in place of the number of labels, when gradients of
                several batches are added up.
            return_dict: False for a tuple.

        Raises:
            TypeError: if `past_key_values` is no `MemoryCache`.
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given, or shapes disagree.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, MemoryCache):
            raise TypeError(f"past_key_values must be a MemoryCache, got {type(past_key_values)}")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, time = given.shape[:2]
        mask = newest_flags(attention_mask, batch, time)
        if input_ids is not None:
            # Padding may carry any id, -100 too; it must not reach the embedding.
            x = self.lm.embedding(input_ids if mask is None else torch.where(mask, input_ids, 0))
        else:
            x = given
        cache = MemoryCache() if past_key_values is None else past_key_values
        memory = cache.memory
        if memory is not None and cache.seen == 0:
            # generate() has repeated its prompt for beams, and cannot know of a memory to start from.
            memory = repeat_rows(memory, batch)
        hidden, memory = advance(self.lm.module, x * self.lm.embedding_scale, memory, mask)
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm.head(hidden[:, kept])
        loss = None if labels is None else self._loss(logits, labels, mask, num_items_in_batch)
        cache.memory, cache.seen = memory, cache.seen + time
        use_cache = self.config.use_cache if use_cache is None else use_cache
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
        return out.to_tuple() if return_dict is False else out

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Add token ids at the end, or take some off, as `PreTrainedModel.resize_token_embeddings` says."""
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.lm.vocab_size = self.lm.embedding.num_embeddings
        return embedding

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.lm.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.lm.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm.head = new_embeddings  # type: ignore[assignment]

    def _loss(
        self, logits: Tensor, labels: Tensor, mask: Tensor | None, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        if logits.shape[:2] != labels.shape:
            raise ValueError(f"labels are {tuple(labels.shape)}, logits {tuple(logits.shape)}: keep all")
        asked = labels[:, 1:]
        if mask is not None:
            # Padding predicts nothing, and is no answer.
            asked = torch.where(mask[:, 1:] & mask[:, :-1], asked, IGNORED_LABEL)
        loss = cross_entropy(logits[:, :-1], asked)
        if num_items_in_batch is None:
            return loss
        return loss * (asked != IGNORED_LABEL).sum() / num_items_in_batch

    def _init_weights(self, module: nn.Module) -> None:
        # Members initialise themselves when they are built.
        pass

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() would make a cache of keys and values; the first call makes ours.
        return False
