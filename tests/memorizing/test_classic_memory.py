"""The classic model against a slow twin, and its laws: documents, caches, stores, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing import KNNMemory, MemorizingTransformer
from memorizing.classic import KNNMemoryList, XLMemories
from memory_models.generate import greedy, sampler
from tests.reference.memorizing_classic import classic

SOS, EOS = 1, 2
SMALL: dict[str, Any] = {"num_tokens": 9, "dim": 8, "depth": 3, "heads": 2, "dim_head": 4, "ff_mult": 1}
SMALL |= {"memorizing_layers": 2, "max_knn_memories": 10, "num_retrieved_memories": 3}
CACHED: dict[str, Any] = {"xl_max_memories": 4, "xl_memory_layers": (1, 2)}
CLEARING: dict[str, Any] = {"clear_memories_on_sos_token_id": SOS, "clear_memories_on_eos_token_id": EOS}
BOTH_SHIFTS: dict[str, Any] = {
    "memorizing_layers": (1, 2),
    "shift_knn_memories_down": 1,
    "shift_xl_memories_down": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "store": {},
    "cache": CACHED,
    "long cache": CACHED | {"xl_max_memories": 9},
    "shifts": CACHED | BOTH_SHIFTS,
    "heads": {"knn_attn_heads": 3},
    "no store": CACHED | {"memorizing_layers": ()},
}


def made(**options: Any) -> MemorizingTransformer:
    torch.manual_seed(0)
    model = MemorizingTransformer(**(SMALL | options)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def stream(*lengths: int, batch: int = 3, clears: bool = False, seed: int = 0) -> list[Tensor]:
    """Tokens that clear nothing, or in the first two rows some that do, at every kind of place."""
    generator = torch.Generator().manual_seed(seed)
    segments = [torch.randint(3, 9, (batch, length), generator=generator) for length in lengths]
    if clears:
        segments[1][0, 2], segments[1][1, -1] = SOS, EOS
        segments[2][0, 0], segments[2][1, 1], segments[2][1, 3] = SOS, EOS, SOS
        segments[3][0, 1:3] = EOS
    return segments


def run(model: MemorizingTransformer, segments: list[Tensor], **options: Any) -> list[Tensor]:
    stores, caches = model.create_knn_memories(batch_size=len(segments[0])), None
    outputs = []
    for segment in segments:
        logits, caches = model(segment, stores, caches, **options)
        outputs.append(logits)
    return outputs


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_token_at_a_time_in_values_and_gradients(variant: str, clears: bool) -> None:
    model = made(**VARIANTS[variant], **CLEARING)
    segments = stream(5, 6, 5, 6, clears=clears)
    outputs = run(model, segments)
    # Lists of pairs never change under the reference's graph; our stores wrap and are cleared under ours.
    expected = [torch.stack(rows) for rows in zip(*_by_row(model, segments), strict=True)]
    directions = [torch.randn_like(output) for output in outputs]
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    parameters = dict(model.named_parameters())
    grads = [
        torch.autograd.grad(
            sum((out * way).sum() for out, way in zip(made, directions, strict=True)),
            list(parameters.values()),
            allow_unused=True,
        )
        for made in (outputs, expected)
    ]
    for name, ours, theirs in zip(parameters, *grads, strict=True):
        zero = torch.zeros_like(parameters[name])
        theirs = zero if theirs is None else theirs
        torch.testing.assert_close(zero if ours is None else ours, theirs, rtol=1e-8, atol=1e-8, msg=name)


def _by_row(model: MemorizingTransformer, segments: list[Tensor]) -> list[list[Tensor]]:
    return [
        classic(model, [segment[row].tolist() for segment in segments]) for row in range(len(segments[0]))
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_gradient_the_outputs_are_the_same(variant: str) -> None:
    model = made(**VARIANTS[variant], **CLEARING)
    segments = stream(5, 6, 5, 7, clears=True)
    with torch.no_grad():
        outputs = run(model, segments)
    for one, other in zip(outputs, run(model, segments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def pairs_of(store: KNNMemory, row: int) -> Tensor:
    held = store.contents(row)
    return torch.stack([held.keys, held.values], 1)


def test_a_full_store_holds_the_newest_pairs_in_order() -> None:
    # What layer 2 stores does not depend on what it has read.
    segments = stream(7, 7, 7, 7, 7)
    small, large = (made(max_knn_memories=places) for places in (10, 1000))
    stores = [model.create_knn_memories(batch_size=3) for model in (small, large)]
    for count, segment in enumerate(segments, 1):
        small(segment, stores[0])
        large(segment, stores[1])
        for row in range(3):
            every = pairs_of(stores[1][0], row)
            assert len(every) == 7 * count
            torch.testing.assert_close(pairs_of(stores[0][0], row), every[-10:], rtol=0, atol=0)


def test_rows_out_of_scope_stay_as_they_are() -> None:
    model, segments = made(**CLEARING), stream(5, 6, 7, clears=False)
    stores = model.create_knn_memories(batch_size=3)
    model(segments[0], stores)
    before = pairs_of(stores[0], 1)
    expected = model(segments[1], stores, add_knn_memory=False)[0]
    segments[2][0, 1] = SOS
    with stores.at_batch_indices([2, 0]):
        logits, _ = model(segments[1][[2, 0]], stores)
        model(segments[2][[2, 0]], stores)
    torch.testing.assert_close(logits, expected[[2, 0]], rtol=1e-12, atol=1e-12)
    assert torch.equal(pairs_of(stores[0], 1), before)
    assert stores[0].counts.tolist() == [6, 5, 10]


def test_two_sets_of_stores_share_nothing() -> None:
    model, (segment,) = made(), stream(5)
    one = model.create_knn_memories(batch_size=3)
    model(segment, one)
    before = pairs_of(one[0], 0)
    other = model.create_knn_memories(batch_size=3)
    assert len(other[0]) == 0
    model(segment.flip(1), other)
    assert torch.equal(pairs_of(one[0], 0), before)


@pytest.mark.parametrize(
    ("token", "place", "kept"), [(SOS, 0, 5), (SOS, 3, 2), (SOS, 4, 1), (EOS, 0, 4), (EOS, 3, 1), (EOS, 4, 0)]
)
def test_a_clear_is_exact_at_its_token(token: int, place: int, kept: int) -> None:
    model = made(**CACHED | {"xl_max_memories": 3}, **CLEARING)
    first, second, third = stream(6, 5, 4)
    second[1, place] = token
    begin = place + (token == EOS)
    stores = model.create_knn_memories(batch_size=3)
    _, caches = model(first, stores)
    logits, caches = model(second, stores, caches)
    assert caches.held.tolist() == [3, min(kept, 3), 3]
    assert stores[0].counts.tolist() == [8, max(0, kept - 3), 8]
    assert stores[0].stats()[1].given == max(0, kept - 3)
    fresh = model.create_knn_memories(batch_size=1)
    alone, fresh_caches = None, None
    if kept:
        alone, fresh_caches = model(second[1:2, begin:], fresh)
        torch.testing.assert_close(logits[1:2, begin:], alone, rtol=1e-12, atol=1e-12)
    after, _ = model(third, stores, caches)
    expected, _ = model(third[1:2], fresh, fresh_caches)
    torch.testing.assert_close(after[1:2], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("options", [{}, CACHED, {"memorizing_layers": ()}])
def test_the_model_always_returns_two_things(options: dict[str, Any], labelled: bool) -> None:
    model, (segment,) = made(**options), stream(5)
    stores = model.create_knn_memories(batch_size=3)
    out, caches = model(segment, stores, labels=segment if labelled else None)
    assert out.shape == (() if labelled else (3, 5, 9))
    assert isinstance(caches, XLMemories)
    assert [cache.shape for cache in caches] == [(3, 4, 2, 4)] * model.num_xl_memory_layers
    again, _ = model(segment, stores, caches)
    assert again.shape == (3, 5, 9)


def test_two_segments_with_a_cache_are_one_pass() -> None:
    model = made(memorizing_layers=(), xl_max_memories=40, depth=2)
    (tokens,) = stream(32)
    whole, _ = model(tokens)
    first, caches = model(tokens[:, :13])
    second, _ = model(tokens[:, 13:], (), caches)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)


def test_stores_are_read_before_any_is_written() -> None:
    # With a shift layer 2 reads what layer 1 writes, and must not find this segment there.
    model = made(**BOTH_SHIFTS)
    (segment,) = stream(6)
    logits, _ = model(segment, model.create_knn_memories(batch_size=3))
    model.layers[0][0].fn.retrieved = model.layers[1][0].fn.retrieved = 0
    alone, _ = model(segment, model.create_knn_memories(batch_size=3))
    torch.testing.assert_close(logits, alone, rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    options = CACHED | CLEARING
    exact, model = made(**options).float(), made(**options).float()
    segments = stream(6, 6, 5, 6, clears=True)
    expected = run(exact, segments)
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stores, caches, total = model.create_knn_memories(batch_size=3), None, torch.zeros(())
        for segment, wanted in zip(segments, expected, strict=True):
            logits, caches = model(segment, stores, caches)
            assert logits.dtype == torch.bfloat16
            torch.testing.assert_close(logits.float(), wanted, rtol=0, atol=0.25)
            total = total + logits.float().square().mean()
        with torch.no_grad():
            for logits, wanted in zip(run(model, segments), expected, strict=True):
                torch.testing.assert_close(logits.float(), wanted, rtol=0, atol=0.25)
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert stores[0].dtype == (torch.float32 if autocast else torch.bfloat16)


def test_the_context_ends_whatever_happens_and_leaves_no_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="no effect"):
        model = made(knn_memories_directory="kept", knn_memory_multiprocessing=True)
    (segment,) = stream(5)

    def fail() -> KNNMemoryList:
        with model.knn_memories_context(batch_size=3) as stores:
            model(segment, stores)
            kept.extend(stores)
            kept.append(stores)
            with stores.at_batch_indices([1]):
                raise KeyError(0)

    kept: list[Any] = []
    with pytest.raises(KeyError):
        fail()
    store, stores = kept
    assert stores == []
    store.add(torch.zeros(3, 1, 2, 4))
    assert store.counts.tolist() == [6, 6, 6]
    assert list(tmp_path.iterdir()) == []


def test_no_label_is_asked_at_padding_and_at_minus_100() -> None:
    model, (segment,) = made(pad_id=4), stream(6)
    segment[:, 0], segment[0, 1] = 4, 5
    labels = segment.clone()
    labels[0, 1] = -100
    logits, _ = model(segment, model.create_knn_memories(batch_size=3))
    asked = [(row, at) for row in range(3) for at in range(6) if labels[row, at] not in (4, -100)]
    terms = [-logits[row, at].log_softmax(-1)[labels[row, at]] for row, at in asked]
    loss, _ = model(segment, model.create_knn_memories(batch_size=3), labels=labels)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    none, _ = model(segment, model.create_knn_memories(batch_size=3), labels=torch.full_like(labels, 4))
    assert none == 0
    none.backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_reading_only_leaves_the_stores_alone() -> None:
    model, segments = made(**CLEARING), stream(5, 6)
    stores = model.create_knn_memories(batch_size=3)
    model(segments[0], stores)
    before = [pairs_of(stores[0], row) for row in range(3)]
    segments[1][0, 2] = SOS
    model(segments[1], stores, add_knn_memory=False)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(segments[1], stores, labels=segments[1] + 100)
    assert all(torch.equal(pairs_of(stores[0], row), held) for row, held in enumerate(before))


def test_dropout_reaches_pairs_and_segment_in_training_only() -> None:
    model, plain = made(attn_dropout=1.0), made()
    segments = stream(5, 6)
    for ours, theirs in zip(run(model.eval(), segments), run(plain, segments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    # With every weight dropped each token stands alone.
    same = torch.full((1, 6), 5)
    stores = model.train().create_knn_memories(batch_size=1)
    model(segments[0][:1], stores)
    logits, _ = model(same, stores)
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, CACHED | BOTH_SHIFTS])
@pytest.mark.parametrize("prompt_length", [1, 4, 5, 9])
def test_generation_is_teacher_forcing(options: dict[str, Any], prompt_length: int) -> None:
    model = made(ff_dropout=0.5, **options, **CLEARING)
    (prompt,) = stream(prompt_length)
    stores = model.create_knn_memories(batch_size=3)
    new = model.generate(prompt, 8, segment_length=4, knn_memories=stores)
    assert model.training
    assert new.shape == (3, 8)
    tokens = torch.cat([prompt, new], 1)
    forced = model.create_knn_memories(batch_size=3)
    logits = torch.cat(run(model.eval(), list(tokens[:, :-1].split(4, 1))), 1)
    assert torch.equal(logits[:, prompt_length - 1 :].argmax(-1), new)
    finished, caches = (tokens.shape[1] - 2) // 4, None
    for segment in tokens[:, : 4 * finished].split(4, 1):
        _, caches = model(segment, forced, caches)
    assert stores[0].counts.tolist() == forced[0].counts.tolist()
    drawn = model.generate(prompt, 3, segment_length=4, sample=sampler(top_k=1))
    assert torch.equal(drawn, new[:, :3])
    assert model.generate(prompt, 0, segment_length=4, sample=greedy).shape == (3, 0)


def test_caches_can_be_chosen_from_and_given_as_a_list() -> None:
    model, segments = made(**CACHED, **CLEARING), stream(6, 6, 5)
    stores = model.create_knn_memories(batch_size=3)
    segments[0][1, 4] = SOS
    _, caches = model(segments[0], stores)
    expected, _ = model(segments[1], stores, caches, add_knn_memory=False)
    rows = torch.tensor([1, 0])
    with stores.at_batch_indices(rows):
        logits, _ = model(segments[1][rows], stores, caches.select(rows), add_knn_memory=False)
    torch.testing.assert_close(logits, expected[rows], rtol=1e-12, atol=1e-12)
    # A plain list knows of no gaps; in rows without any it is the same.
    listed, _ = model(segments[1], stores, [cache.detach() for cache in caches], add_knn_memory=False)
    torch.testing.assert_close(listed[[0, 2]], expected[[0, 2]], rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    model, (segment,) = made(**CACHED), stream(5)
    stores = model.create_knn_memories(batch_size=3)
    _, caches = model(segment, stores)
    for call, kind, message in [
        (lambda: model(segment[:2], stores), ValueError, "x has 2 rows, knn_memories have 3"),
        (lambda: model(segment), ValueError, "1 memorizing layers need as many knn_memories, got 0"),
        (lambda: model(segment[:, :0], stores), ValueError, "at least one token"),
        (lambda: model(segment.float(), stores), TypeError, "x must be int64, got torch.float32"),
        (lambda: model(segment, stores, labels=segment[:, 1:]), ValueError, "one label for each token"),
        (lambda: model(segment, stores, list(caches)[:1]), ValueError, "2 XL layers, got xl_memories of 1"),
        (
            lambda: model(segment, stores, [c[:2] for c in caches]),
            ValueError,
            r"= \[3, 4, 2, 4\], got \[2, 4",
        ),
        (lambda: model(segment, [KNNMemory(4, 9, 3, metric="l2")]), ValueError, "got 'l2'"),
        (lambda: made(depth=0), ValueError, "depth must be at least 1"),
        (lambda: made(shift_knn_memories_down=0.5), TypeError, "shift_knn_memories_down must be an integer"),
        (lambda: made(num_retrieved_memory=3), TypeError, "num_retrieved_memory"),
    ]:
        with pytest.raises(kind, match=message):
            call()
    assert stores[0].counts.tolist() == [1, 1, 1]
    with pytest.warns(UserWarning, match=r"memorizing_layers: \[0, 7\] are left out, layers are 1 to 3"):
        assert made(memorizing_layers=(7, 3, 3, 0)).memorizing_layers == (3,)
