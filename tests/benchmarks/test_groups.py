"""Means over groups of questions: rarely asked groups do not make the mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.groups import ENOUGH, weights
from benchmarks.task import accuracies, create_task


def test_a_group_counts_by_its_questions_up_to_enough() -> None:
    assert ENOUGH == 100
    assert weights([2118, 943, 100, 67, 1, 0]).tolist() == [1, 1, 1, 0.67, 0.01, 0]
    # A small set: as many as its largest group has are enough.
    assert weights([8, 4, 8]).tolist() == [1, 0.5, 1]
    assert weights([0, 0]).tolist() == [0, 0]
    assert weights([]).tolist() == []


def test_the_mean_is_weighted_and_the_worst_is_of_groups_that_say_something() -> None:
    values, asked = [1.0, 0.9, 0.5, 0.0], [400, 200, 50, 2]
    found = accuracies(["a", "b", "c", "d"], values, [1, 2, 3], asked)
    assert found["mean accuracy"] == pytest.approx((0.9 + 0.5 * 0.5 + 0.02 * 0.0) / 1.52)
    assert found["worst accuracy"] == 0.5
    assert accuracies(["a", "b"], [0.2, 0.4], [0, 1])["mean accuracy"] == pytest.approx(0.3)


def test_guessing_on_long_rewrite_scores_what_guessing_can() -> None:
    # 96 segments: gaps of more than 20 are asked for a handful of times, and a plain mean over the gaps is
    # off by as much as the accuracy itself.
    task = create_task("rewrite", segments=96, evaluation_sequences=256)
    random = np.random.default_rng(0)
    scorer = task.scorer()
    for batch in task.evaluation(batch_size=64):
        values = random.integers(16, 32, size=tuple(batch.tokens.shape))
        scorer.update(torch.nn.functional.one_hot(torch.from_numpy(values), task.vocab_size).float(), batch)
    result, counts = scorer.result(), scorer.counts()
    assert min(n for name, n in counts.items() if "rewritten" in name and n) < 10
    # 15 groups of a hundred questions or more: a standard error of .02 each, .005 of their mean.
    assert result["mean accuracy"] == pytest.approx(1 / 16, abs=0.015)
