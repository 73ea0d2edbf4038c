"""The classic replay: the gradients of back-propagation through all segments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memformer import Memformer, memory_replay_backprop

OPTIONS: dict[str, Any] = {
    "dim": 8,
    "num_memory_slots": 3,
    "mem_update_attn_heads": 2,
    "enc_num_tokens": 11,
    "enc_depth": 1,
    "enc_heads": 2,
    "enc_max_seq_len": 6,
    "dec_num_tokens": 13,
    "dec_depth": 1,
    "dec_heads": 2,
    "dec_max_seq_len": 6,
}


def small(**options: Any) -> Memformer:
    return Memformer(**(OPTIONS | options)).double()


def gradients(model: Memformer) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def through_time(
    model: Memformer,
    src: Tensor,
    tgt: Tensor | None = None,
    src_mask: Tensor | None = None,
    tgt_mask: Tensor | None = None,
    *,
    mems: Tensor | None = None,
    loss_fn: Any = None,
) -> tuple[Tensor, Tensor]:
    """The same by one graph over all segments."""
    model.zero_grad()
    pieces = src.split(6, 1)
    masks = [None] * len(pieces) if src_mask is None else src_mask.split(6, 1)
    losses = []
    for index, (piece, mask) in enumerate(zip(pieces, masks, strict=True)):
        last = tgt is not None and index == len(pieces) - 1
        out = model(piece, tgt if last else None, mems, mask, tgt_mask if last else None)
        mems = out.mems
        if last:
            losses.append(out.loss)
        if loss_fn is not None and loss_fn(out.enc_out, index) is not None:
            losses.append(loss_fn(out.enc_out, index))
    loss = torch.stack(losses).sum()
    loss.backward()
    assert mems is not None
    return loss, mems


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("write", ["gru", "bmn"])
@pytest.mark.parametrize("length", [4, 18, 21])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_and_loss_equal_full_back_propagation(write: str, length: int, masked: bool) -> None:
    model = small(write=write)
    src, tgt = torch.randint(0, 11, (3, length)), torch.randint(0, 13, (3, 7))
    masks: tuple[Tensor | None, Tensor | None] = (None, None)
    if masked:
        src_mask, tgt_mask = torch.rand(3, length) < 0.7, torch.ones(3, 7, dtype=torch.bool)
        src_mask[1, 6:12] = False
        tgt_mask[2, 4:] = False
        masks = (src_mask, tgt_mask)
    loss = memory_replay_backprop(model, src, tgt, *masks)
    ours = gradients(model)
    expected, _ = through_time(model, src, tgt, *masks)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    same(ours, gradients(model))
    # The initial memory is reached from the last segment.
    start = "write.start" if write == "gru" else "write.bias"
    assert ours[start].any()


def test_the_memory_returned_goes_on() -> None:
    model = small()
    src, tgt = torch.randint(0, 11, (2, 24)), torch.randint(0, 13, (2, 5))
    _, mems = memory_replay_backprop(model, src[:, :12], tgt, return_mems=True)
    _, expected = through_time(model, src[:, :12], tgt)
    assert not mems.requires_grad
    torch.testing.assert_close(mems, expected.detach(), rtol=0, atol=1e-12)

    model.zero_grad()
    given = mems.clone().requires_grad_()
    loss = memory_replay_backprop(model, src[:, 12:], tgt, mems=given)
    ours, to_given = gradients(model), given.grad
    again = mems.clone().requires_grad_()
    expected_loss, _ = through_time(model, src[:, 12:], tgt, mems=again)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=0, atol=1e-12)
    same(ours, gradients(model))
    torch.testing.assert_close(to_given, again.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("encoder_only", [False, True])
def test_a_loss_on_the_encoder(encoder_only: bool) -> None:
    # F7: the package's replay fails for a model without decoder.
    model = small(encoder_only=encoder_only)
    src = torch.randint(0, 11, (2, 15))
    targets = torch.randn(3, dtype=torch.float64)

    def loss_fn(enc_out: Tensor, index: int) -> Tensor | None:
        return None if index == 1 else (enc_out[:, 0].mean() - targets[index]).square()

    loss = memory_replay_backprop(model, src, loss_fn=loss_fn)
    ours = gradients(model)
    expected, _ = through_time(model, src, loss_fn=loss_fn)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    same(ours, gradients(model))


def test_both_losses_add_up() -> None:
    model = small()
    src, tgt = torch.randint(0, 11, (2, 15)), torch.randint(0, 13, (2, 5))

    def loss_fn(enc_out: Tensor, index: int) -> Tensor:
        return enc_out.square().mean()

    loss = memory_replay_backprop(model, src, tgt, loss_fn=loss_fn)
    ours = gradients(model)
    expected, _ = through_time(model, src, tgt, loss_fn=loss_fn)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-12)
    same(ours, gradients(model))


def test_gradients_accumulate() -> None:
    model = small()
    src, tgt = torch.randint(0, 11, (2, 15)), torch.randint(0, 13, (2, 5))
    memory_replay_backprop(model, src, tgt)
    once = gradients(model)
    memory_replay_backprop(model, src, tgt)
    same(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


def test_one_segments_activations_are_kept() -> None:
    def most(segments: int) -> int:
        model = small()
        src, tgt = torch.randint(0, 11, (2, 6 * segments)), torch.randint(0, 13, (2, 5))
        alive, largest = 0, 0

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal alive, largest
                self.tensor = tensor
                alive += tensor.numel()
                largest = max(largest, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            memory_replay_backprop(model, src, tgt)
        return largest

    assert most(8) == most(2)


def test_bfloat16() -> None:
    model = small().bfloat16()
    src, tgt = torch.randint(0, 11, (2, 15)), torch.randint(0, 13, (2, 5))
    loss, mems = memory_replay_backprop(model, src, tgt, return_mems=True)
    assert loss.isfinite()
    assert mems.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tgt": None}, "nothing to learn: give tgt, or a loss_fn"),
        ({"src_mask": torch.ones(2, 14).bool()}, r"mask has shape \(2, 14\), expected \(2, 15\)"),
        ({"tgt_mask": torch.ones(2, 4).bool()}, r"tgt_mask has shape \(2, 4\), expected \(2, 5\)"),
        ({"mems": torch.zeros(2, 4, 8).double()}, "mems holds 4 slots, the model has 3"),
        ({"src": torch.zeros(2, 0, dtype=torch.int64)}, "at least one token"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], message: str) -> None:
    src, tgt = torch.randint(0, 11, (2, 15)), torch.randint(0, 13, (2, 5))
    with pytest.raises(ValueError, match=message):
        memory_replay_backprop(small(), **({"src": src, "tgt": tgt} | change))


def test_a_target_needs_a_decoder() -> None:
    src = torch.randint(0, 11, (2, 15))
    with pytest.raises(ValueError, match="no decoder to predict tgt with; give loss_fn"):
        memory_replay_backprop(small(encoder_only=True), src, torch.randint(0, 13, (2, 5)))
    with pytest.raises(ValueError, match="tgt_mask is given without tgt"):
        memory_replay_backprop(small(), src, tgt_mask=src > 0, loss_fn=lambda out, index: out.sum())
