"""KNNMemory: shapes and dtypes, scopes, ids and ages, hits, and what it refuses."""

import subprocess
import sys

import pytest
import torch

from memorizing import KNNMemory


def filled(n=20, rows=2, dim=8, **options):
    memory = KNNMemory(dim, options.pop("max_memories", 50), rows, **options)
    memory.add(torch.randn(rows, n, 2, dim))
    return memory


def test_the_published_example():
    memory = KNNMemory(dim=32, max_memories=640, num_indices=2)
    memory.add(torch.randn(2, 512, 2, 32))
    memory.clear([0])
    memory.add(torch.randn(2, 512, 2, 32))
    key_values, mask = memory.search(torch.randn(2, 512, 32), topk=32)
    assert key_values.shape == (2, 512, 32, 2, 32)
    assert mask.shape == (2, 512, 32)
    assert memory.counts.tolist() == [512, 640]


def test_old_options_are_accepted_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="no effect"):
        memory = KNNMemory(8, 100, 1, memmap_filename="memory.memmap", multiprocessing=True)
    memory.add(torch.randn(1, 10, 2, 8))
    memory.search(torch.randn(1, 1, 8), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("between", [(), (3,), (3, 5), (2, 3, 5)])
def test_any_axes_between_batch_and_dim(between):
    memory = filled()
    queries = torch.randn(2, *between, 8)
    pairs, mask = memory.search(queries, 4)
    assert pairs.shape == (2, *between, 4, 2, 8)
    assert mask.shape == (2, *between, 4)
    scores, ids = memory.lookup(queries, 4)
    assert scores.shape == ids.shape == (2, *between, 4)
    flat = memory.lookup(queries.reshape(2, -1, 8), 4)
    assert torch.equal(flat.ids.view(ids.shape), ids)


@pytest.mark.parametrize("queries", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_queries_dtype(queries, stored):
    memory = filled(dtype=stored)
    pairs, _ = memory.search(torch.randn(2, 3, 8, dtype=queries), 4)
    assert pairs.dtype == queries
    assert memory.dtype == stored


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_stores_what_it_was_given_and_half_the_bytes(stored):
    pairs = torch.randn(1, 30, 2, 8).to(stored)
    memory = KNNMemory(8, 30, 1, dtype=stored)
    memory.add(pairs)
    assert torch.equal(memory.contents(0).keys, pairs[0, :, 0])
    assert memory.nbytes == 30 * 2 * 8 * 2


def test_masked_pairs_are_zero_and_masked_scores_minus_infinity():
    memory = filled(n=3)
    pairs, mask = memory.search(torch.randn(2, 4, 8), 5)
    assert mask.sum(-1).eq(3).all()
    assert pairs[~mask].eq(0).all()
    scores, ids = memory.lookup(torch.randn(2, 4, 8), 5)
    assert scores[~mask].eq(-torch.inf).all()
    assert ids[~mask].eq(-1).all()


def test_an_empty_memory_and_k_of_zero():
    memory = KNNMemory(8, 50, 2)
    pairs, mask = memory.search(torch.randn(2, 3, 8), 4)
    assert not mask.any()
    assert not pairs.any()
    assert filled().search(torch.randn(2, 3, 8), 0)[0].shape == (2, 3, 0, 2, 8)
    assert filled().lookup(torch.randn(2, 0, 8), 4).ids.shape == (2, 0, 4)
    assert len(memory) == 0


def test_an_empty_add_changes_nothing():
    memory = filled()
    before = memory.contents(0)
    memory.add(torch.randn(2, 0, 2, 8))
    assert torch.equal(memory.contents(0).keys, before.keys)


def test_a_row_that_was_cleared_never_answers_with_old_pairs():
    memory = filled(n=50)
    memory.clear(1)
    memory.add(torch.zeros(2, 1, 2, 8))
    pairs, mask = memory.search(100 * torch.randn(2, 6, 8), 10)
    assert mask[1].sum(-1).eq(1).all()
    assert pairs[1].eq(0).all()
    assert mask[0].all()


def test_rows_are_strangers():
    memory = filled()
    before = memory.contents(1)
    with memory.at_batch_indices([0]):
        memory.add(torch.randn(1, 70, 2, 8))
    memory.clear(0)
    after = memory.contents(1)
    for old, new in zip(before[:4], after[:4], strict=True):
        assert torch.equal(old, new)


def test_a_scope_orders_its_rows_and_nests_in_absolute_numbers():
    memory = filled(rows=3)
    queries = torch.randn(3, 2, 8)
    ids = memory.lookup(queries, 3).ids
    with memory.at_batch_indices([2, 0]) as scoped:
        assert scoped is memory
        assert torch.equal(memory.lookup(queries[[2, 0]], 3).ids, ids[[2, 0]])
        with memory.at_batch_indices(torch.tensor([False, True, False])):
            assert torch.equal(memory.lookup(queries[[1]], 3).ids, ids[[1]])
        assert torch.equal(memory.lookup(queries[[2, 0]], 3).ids, ids[[2, 0]])
    with memory.at_batch_indices([]):
        memory.add(torch.randn(0, 3, 2, 8))
        assert memory.lookup(torch.randn(0, 2, 8), 3).ids.shape == (0, 2, 3)
        assert memory.search(torch.randn(0, 2, 8), 3)[0].shape == (0, 2, 3, 2, 8)
    with memory.at_batch_indices(1):
        memory.clear()
    assert memory.counts.tolist() == [20, 0, 20]


def test_a_scope_ends_with_an_error_too():
    memory = filled()
    with pytest.raises(RuntimeError, match="mine"), memory.at_batch_indices([1]):
        raise RuntimeError("mine")
    memory.add(torch.randn(2, 1, 2, 8))
    with pytest.raises(IndexError), memory.at_batch_indices([2]):
        pass
    memory.add(torch.randn(2, 1, 2, 8))


def test_ids_name_a_pair_for_ever():
    memory = KNNMemory(8, 10, 1)
    first = torch.randn(1, 6, 2, 8)
    memory.add(first)
    ids = memory.lookup(first[:, :, 0] * 100, 1).ids[..., 0]
    memory.add(torch.randn(1, 6, 2, 8))
    keys, values, mask = memory.gather(ids)
    gone = ids < 2
    assert torch.equal(mask, ~gone)
    assert torch.equal(memory.ages(ids), torch.where(gone, -1, 11 - ids))
    assert keys[gone].eq(0).all()
    assert torch.equal(values[mask], first[0, ids[0, mask[0]], 1])
    memory.clear()
    memory.add(torch.randn(1, 10, 2, 8))
    assert not memory.gather(ids).mask.any()
    assert memory.contents(0).ids.tolist() == list(range(12, 22))


def test_iteration_gives_every_pair_with_its_age():
    memory = filled(n=60)
    entries = list(memory)
    assert len(entries) == len(memory) == 100
    assert [entry.row for entry in entries] == [0] * 50 + [1] * 50
    assert [entry.age for entry in entries[:50]] == list(range(49, -1, -1))
    held = memory.contents(1)
    assert torch.equal(entries[50].key, held.keys[0])
    assert torch.equal(entries[99].value, held.values[-1])
    assert entries[0].hits is None


def test_hits_are_counted_per_pair_and_start_again_with_a_new_one():
    memory = KNNMemory(2, 3, 1, track_hits=True)
    memory.add(torch.tensor([[[[1.0, 0], [0, 0]], [[0, 1.0], [0, 0]]]]))
    queries = torch.tensor([[[1.0, 0], [2.0, 0], [0, 1.0]]])
    memory.search(queries, 1)
    memory.lookup(queries, 1)
    memory.attend(queries, 1)
    memory.search(queries, 1, increment_hits=False)
    assert memory.contents(0).hits.tolist() == [6, 3]
    memory.add(torch.zeros(1, 2, 2, 2))
    assert memory.contents(0).hits.tolist() == [3, 0, 0]
    assert [entry.hits for entry in memory] == [3, 0, 0]


def test_nothing_stored_carries_a_gradient_and_inputs_are_copied():
    memory = KNNMemory(8, 10, 1)
    pairs = torch.randn(1, 4, 2, 8, requires_grad=True)
    memory.add(pairs * 1)
    kept = pairs.detach().clone()
    with torch.no_grad():
        pairs.zero_()
    found, _ = memory.search(torch.randn(1, 2, 8, requires_grad=True), 2)
    assert not found.requires_grad
    assert torch.equal(memory.contents(0).keys, kept[0, :, 0])
    found.zero_()
    assert torch.equal(memory.contents(0).keys, kept[0, :, 0])


def test_autocast_does_not_blur_the_search():
    memory = filled()
    queries = torch.randn(2, 3, 8)
    plain = memory.lookup(queries, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = memory.lookup(queries, 4)
    assert torch.equal(plain.scores, inside.scores)


def test_inference_mode_in_and_out():
    with torch.inference_mode():
        memory = filled()
    memory.add(torch.randn(2, 3, 2, 8))
    with torch.inference_mode():
        memory.add(torch.randn(2, 3, 2, 8))
        pairs = memory.search(torch.randn(2, 3, 8), 4)[0]
    assert pairs.shape == (2, 3, 4, 2, 8)


def test_large_results_are_ordinary_tensors():
    memory = filled(n=50)
    pairs, mask = memory.search(torch.randn(2, 20_000, 8), 4)
    assert pairs.numel() * 4 > 8 << 20
    assert mask.all()
    keys = memory.gather(memory.lookup(torch.randn(2, 1, 8), 4).ids).keys
    pairs[:, :1, :, 0] = keys
    assert torch.equal(pairs.clone()[:, :1, :, 0], keys)


def bad_calls():
    nan, inf = float("nan"), float("inf")
    pairs = torch.randn(2, 3, 2, 8)
    return [
        ("wrong dim", lambda m: m.add(torch.randn(2, 3, 2, 9)), ValueError, r"\[2, \*, 2, 8\]"),
        ("one key without value", lambda m: m.add(torch.randn(2, 3, 8)), ValueError, r"\[batch, n, 2, dim\]"),
        ("batch too small", lambda m: m.add(torch.randn(1, 3, 2, 8)), ValueError, "memories must be"),
        ("integers", lambda m: m.add(torch.ones(2, 3, 2, 8, dtype=torch.int64)), TypeError, "floating"),
        ("no tensor", lambda m: m.add([1.0]), TypeError, "must be a tensor"),
        ("nan", lambda m: m.add(pairs * nan), ValueError, "NaN or infinite"),
        ("infinite", lambda m: m.add(pairs.index_fill(3, torch.tensor([0]), inf)), ValueError, "6|12"),
        ("values too short", lambda m: m.add(pairs[:, :, 0], pairs[:, :2, 1]), ValueError, "values must be"),
        ("query dim", lambda m: m.search(torch.randn(2, 3, 9), 2), ValueError, "queries must be"),
        ("query batch", lambda m: m.search(torch.randn(3, 3, 8), 2), ValueError, "queries must be"),
        ("query of one axis", lambda m: m.search(torch.randn(8), 2), ValueError, "queries must be"),
        ("integer query", lambda m: m.lookup(torch.ones(2, 8, dtype=torch.int64), 2), TypeError, "floating"),
        ("negative k", lambda m: m.search(torch.randn(2, 8), -1), ValueError, "at least 0"),
        ("broken k", lambda m: m.search(torch.randn(2, 8), 1.5), TypeError, "integer"),
        ("no probes", lambda m: m.search(torch.randn(2, 8), 1, nprobe=0), ValueError, "nprobe"),
        ("unknown row", lambda m: m.clear([0, 2]), IndexError, "no row 2: rows are 0 to 1"),
        ("negative row", lambda m: m.clear(-1), IndexError, "no row -1"),
        ("row that is no number", lambda m: m.clear("0"), TypeError, "integer"),
        ("rows as floats", lambda m: m.clear(torch.zeros(1)), TypeError, "integers"),
        ("row twice", lambda m: m.at_batch_indices([1, 1]).__enter__(), ValueError, "only once"),
        ("short bool rows", lambda m: m.clear(torch.tensor([True])), ValueError, "shape"),
        ("ids as floats", lambda m: m.gather(torch.zeros(2, 3)), TypeError, "int64"),
        (
            "ids of another batch",
            lambda m: m.ages(torch.zeros(3, 3, dtype=torch.int64)),
            ValueError,
            "batch 2",
        ),
        (
            "within as a tuple",
            lambda m: m.lookup(torch.randn(2, 3, 8), 2, within=(0, 5)),
            TypeError,
            r"within must be a range, such as range\(0, 5\), got \(0, 5\)",
        ),
        (
            "scale of another shape",
            lambda m: m.attend(torch.randn(2, 3, 8), 2, scale=torch.ones(4)),
            ValueError,
            r"scale is \[4\], which does not broadcast to the queries' \[2, 3\]",
        ),
        (
            "scale as a list",
            lambda m: m.attend(torch.randn(2, 3, 8), 2, scale=[1.0]),
            TypeError,
            "scale must be a number or a tensor, got list",
        ),
        ("contents of no row", lambda m: m.contents(2), IndexError, "no row 2"),
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()]
)
def test_bad_calls_are_named_and_change_nothing(call, error, message):
    memory = filled()
    before = memory.contents(0)
    with pytest.raises(error, match=message):
        call(memory)
    assert torch.equal(memory.contents(0).keys, before.keys)
    assert memory.counts.tolist() == [20, 20]
    memory.add(torch.randn(2, 1, 2, 8))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1"),
        ({"dim": 8.0}, TypeError, "dim must be an integer"),
        ({"max_memories": 0}, ValueError, "max_memories"),
        ({"num_indices": 0}, ValueError, "num_indices"),
        ({"value_dim": -1}, ValueError, "value_dim"),
        ({"metric": "dot"}, ValueError, "ip, cosine, l2"),
        ({"index": None}, TypeError, "index must be a string, such as 'exact', got None"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"dtype": torch.float64, "index": "ivf"}, ValueError, "float32"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        KNNMemory(**{"dim": 8} | options)


def test_a_key_too_large_for_the_storage_dtype_is_refused():
    memory = KNNMemory(2, 4, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="float16"):
        memory.add(torch.full((1, 1, 2, 2), 1e6))
    assert len(memory) == 0


def test_values_of_another_length():
    memory = KNNMemory(8, 50, 2, value_dim=3)
    keys, values = torch.randn(2, 20, 8), torch.randn(2, 20, 3)
    memory.add(keys, values)
    found = memory.gather(memory.lookup(keys * 100, 1).ids)
    assert found.values.shape == (2, 20, 1, 3)
    assert memory.attend(keys, 4).output.shape == (2, 20, 3)
    with pytest.raises(ValueError, match=r"add\(keys, values\)"):
        memory.add(torch.randn(2, 20, 2, 8))
    with pytest.raises(ValueError, match="gather"):
        memory.search(keys, 1)


def test_import_is_cheap():
    code = (
        "import sys, memorizing; from memorizing import KNNMemory; m = KNNMemory(4, 10); import torch;"
        "m.add(torch.randn(1, 3, 2, 4)); m.search(torch.randn(1, 2, 4), 2);"
        "print([name for name in ('faiss', 'x_transformers', 'matplotlib', 'torch._dynamo')"
        " if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_on_a_gpu_as_on_the_cpu(metric):
    pairs, queries = torch.randn(2, 3000, 2, 8), torch.randn(2, 200, 8)
    here, there = (KNNMemory(8, 2500, 2, metric=metric, device=device) for device in ("cpu", "cuda"))
    for memory in (here, there):
        memory.add(pairs)
    ours, theirs = here.lookup(queries, 16), there.lookup(queries.cuda(), 16)
    assert theirs.ids.is_cuda
    torch.testing.assert_close(ours.scores, theirs.scores.cpu(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        here.attend(queries, 16).output, there.attend(queries.cuda(), 16).output.cpu(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e-13, 1.0, 1e16, 1e25, 1e30])
def test_the_cosine_knows_no_size(size):
    keys, queries = torch.randn(2, 20, 8), torch.randn(2, 5, 8)
    memory = KNNMemory(8, 50, 2, metric="cosine")
    memory.add(keys * size, torch.randn(2, 20, 8))
    unit_keys, unit_queries = (v.double() / v.double().norm(dim=-1, keepdim=True) for v in (keys, queries))
    wanted = (unit_queries @ unit_keys.mT).topk(4).values
    for asked in (queries, queries * size):
        torch.testing.assert_close(memory.lookup(asked, 4).scores.double(), wanted, atol=1e-5, rtol=0)
    plain = KNNMemory(8, 50, 2, metric="cosine")
    plain.add(keys, torch.randn(2, 20, 8))
    torch.testing.assert_close(
        memory.attend(queries * size, 4).logsumexp, plain.attend(queries, 4).logsumexp, atol=1e-5, rtol=1e-5
    )
    assert memory.lookup(torch.zeros(2, 1, 8), 4).scores.abs().max() == 0
