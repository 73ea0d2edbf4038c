"""The exact engine against `torch.topk` and plain sums."""

import pytest
import torch

from memorizing.knn import exact
from memorizing.knn.exact import block_top_k, exact_top_k, score_slots


def assert_same_top_k(found, scores, k):
    """Equal best scores, at places that really have them, each place once."""
    expected = scores.topk(k).values
    torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.gather(-1, found.slots), found.scores, rtol=1e-5, atol=1e-5)
    assert (found.slots.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.fixture(autouse=True, params=["as integers", "as floats"])
def comparison(request, monkeypatch):
    """Either way of comparing scores, whatever their number."""
    monkeypatch.setattr(exact, "_AS_INTEGERS_FROM", 0 if request.param == "as integers" else 10**9)


def tile(monkeypatch):
    """Let every search of more than a few queries go by tiles."""
    for name in ("_KEEP_UP_TO", "_KEEP_FEW_UP_TO"):
        monkeypatch.setattr(exact, name, 0)


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 511, 1024, 2047, 4099])
@pytest.mark.parametrize("k", [1, 8, 32])
def test_block_top_k_is_top_k(n, k):
    scores = torch.randn(7, n, generator=torch.Generator().manual_seed(n))
    assert_same_top_k(block_top_k(scores, min(k, n)), scores, min(k, n))


def test_block_top_k_with_ties_and_infinities():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (16, 3001), generator=generator).float()
    scores[:, ::7] = -torch.inf
    found = block_top_k(scores, 32)
    assert torch.equal(found.scores, scores.topk(32).values)
    assert (found.slots.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("n", [40, 3001])
def test_every_kind_of_float_is_ordered_as_by_top_k(n):
    kinds = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, torch.inf, -torch.inf]
    generator = torch.Generator().manual_seed(n)
    scores = torch.tensor(kinds)[torch.randint(0, len(kinds), (16, n), generator=generator)]
    for k in (1, 7, 32):
        assert torch.equal(block_top_k(scores, k).scores, scores.topk(k).values)


@pytest.mark.parametrize("n", [40, 3001])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_not_a_number_comes_first_as_in_top_k(n, sign):
    scores = torch.randn(4, n, generator=torch.Generator().manual_seed(n))
    # inf - inf has the sign bit set on common processors, nan has not.
    scores[:, [3, 17, n - 1]] = torch.tensor(torch.nan).copysign(torch.tensor(float(sign)))
    found = block_top_k(scores, 8)
    assert (found.slots[:, :3].sort(1).values == torch.tensor([3, 17, n - 1])).all()
    assert torch.equal(found.scores[:, 3:], scores.topk(8).values[:, 3:])


def test_gradients_reach_the_best():
    scores = torch.randn(3, 2000, requires_grad=True)
    found = block_top_k(scores, 5)
    found.scores.sum().backward()
    assert torch.equal(scores.grad, torch.zeros(3, 2000).scatter(1, found.slots, 1.0))


def test_unordered_holds_the_same_scores():
    scores = torch.randn(5, 2000)
    found = block_top_k(scores, 32, ordered=False)
    assert torch.equal(found.scores.sort(descending=True).values, scores.topk(32).values)


def all_scores(queries, keys, scale, bias):
    scores = queries @ keys.to(queries.dtype).transpose(1, 2)
    if scale is not None:
        scores = scores * scale.unsqueeze(1)
    return scores if bias is None else scores + bias.unsqueeze(1)


@pytest.mark.parametrize("adjusted", ["", "scale", "bias", "scale and bias"])
@pytest.mark.parametrize(
    ("path", "queries", "n"),
    [
        ("batched", 3, 700),
        ("kept", 100, 700),
        ("kept", 70, 3001),
        ("tiled", 300, 2050),
        ("tiled", 33, 1200),
        ("tiled", 17, 8197),
        ("tiled, too few blocks", 40, 300),
        ("tiled, large blocks", 300, 2050),
        ("tiled, large blocks", 33, 4231),
    ],
)
def test_every_path_finds_the_best(monkeypatch, path, queries, n, adjusted):
    if "tiled" in path:
        tile(monkeypatch)
    if "large" in path:
        monkeypatch.setattr(exact, "_LARGE_BLOCKS_FROM", 0)
    generator = torch.Generator().manual_seed(n)
    asked = torch.randn(2, queries, 24, generator=generator)
    keys = torch.randn(2, n, 24, generator=generator)
    scale = torch.rand(2, n, generator=generator) + 0.5 if "scale" in adjusted else None
    bias = torch.randn(2, n, generator=generator) if "bias" in adjusted else None
    for k in (1, 8):
        found = exact_top_k(asked, keys, k, scale=scale, bias=bias)
        assert_same_top_k(found, all_scores(asked, keys, scale, bias), k)


def test_several_chunks_of_queries_are_joined_in_order(monkeypatch):
    tile(monkeypatch)
    monkeypatch.setattr(exact, "_MAXIMA", 1)
    monkeypatch.setattr(exact, "_RESCORED", 1)
    asked, keys = torch.randn(1, 600, 8), torch.randn(1, 2000, 8)
    assert_same_top_k(exact_top_k(asked, keys, 4), asked @ keys.transpose(1, 2), 4)


def test_the_path_for_accelerators(monkeypatch):
    monkeypatch.setattr(exact, "_FEW_QUERIES", 10**9)
    asked, keys = torch.randn(3, 50, 8), torch.randn(3, 900, 8)
    assert_same_top_k(exact_top_k(asked, keys, 4), asked @ keys.transpose(1, 2), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("tiled", [False, True])
def test_stored_dtypes_are_scored_in_the_queries_dtype(monkeypatch, dtype, queries, tiled):
    if tiled:
        tile(monkeypatch)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    asked, keys = torch.randn(1, queries, 8, dtype=compute), torch.randn(1, 1500, 8).to(dtype)
    found = exact_top_k(asked, keys, 4)
    assert found.scores.dtype == compute
    assert_same_top_k(found, asked @ keys.to(compute).transpose(1, 2), 4)


@pytest.mark.parametrize("tiled", [False, True])
def test_keys_may_be_a_slice_of_a_larger_store(monkeypatch, tiled):
    if tiled:
        tile(monkeypatch)
    store = torch.full((2, 3000, 2, 8), torch.nan)
    store[:, :1111, 0] = torch.randn(2, 1111, 8)
    keys = store[:, :1111, 0]
    asked = torch.randn(2, 20, 8)
    assert_same_top_k(exact_top_k(asked, keys, 4), asked @ keys.transpose(1, 2), 4)


@pytest.mark.parametrize("tiled", [False, True])
def test_duplicates_of_the_best_key_are_all_found(monkeypatch, tiled):
    if tiled:
        tile(monkeypatch)
    keys = torch.randn(1, 2000, 8)
    keys[0, 100:108] = 10 * torch.ones(8)  # all in one block
    found = exact_top_k(torch.ones(1, 20, 8), keys, 8)
    assert (found.slots.sort(-1).values == torch.arange(100, 108)).all()


def test_all_keys_can_be_asked_for():
    asked, keys = torch.randn(1, 20, 8), torch.randn(1, 300, 8)
    found = exact_top_k(asked, keys, 300)
    assert torch.equal(found.slots.sort(-1).values, torch.arange(300).expand(1, 20, 300))


def test_nothing_asked_nothing_found():
    for shape, k in (((2, 0, 8), 3), ((2, 4, 8), 0), ((0, 4, 8), 3)):
        found = exact_top_k(torch.randn(shape), torch.randn(shape[0], 10, 8), k)
        assert found.scores.shape == found.slots.shape == (*shape[:2], k)


def test_score_slots():
    asked, keys = torch.randn(300, 8), torch.randn(50, 8)
    slots = torch.randint(0, 50, (300, 5))
    scale, bias = torch.rand(50), torch.randn(50)
    expected = (asked @ keys.T * scale + bias).gather(1, slots)
    torch.testing.assert_close(score_slots(asked, keys, slots, scale=scale, bias=bias), expected)
