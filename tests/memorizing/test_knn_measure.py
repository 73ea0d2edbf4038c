"""The data that the memory is measured with."""

import sysconfig
from pathlib import Path

import torch

from memorizing import FaissOptions, KNNMemory
from memorizing.knn import measure


def text():
    return (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()


def test_keys_are_unit_repeatable_and_clustered():
    keys = measure.text_keys(text(), 3000, 16)
    assert torch.equal(keys, measure.text_keys(text(), 3000, 16))
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(3000))
    nearest = (keys @ keys.T).fill_diagonal_(-1).amax(1)
    assert nearest.median() > 0.9
    assert torch.equal(measure.text_keys(b"abcdefgh" * 4, 100, 8).isfinite().all(), torch.tensor(True))


def test_data_fits_the_case():
    case = measure.Case(held=3000, queries=50)
    pairs, more, queries = measure.data(case, text())
    assert pairs.shape == (2, 3000, 2, 64)
    assert more.shape == (2, 64 * 512, 2, 64)
    assert queries.shape == (2, 50, 64)
    memory = KNNMemory(64, 3000, 2, index="ivf", faiss_options=FaissOptions(train_from=1000))
    memory.add(pairs)
    assert memory.recall(queries).min() > 0.9
    measure.matrix_product(queries[0], pairs[0, :, 0])


def test_the_sizes_reported():
    assert {(case.rows, case.held) for case in measure.cases()} == {
        (rows, held) for rows in (2, 8) for held in (2048, 16_384, 65_536, 262_144)
    }
