"""What a group of questions counts in a mean over groups. For tasks and for reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# So many questions tell the accuracy of a group to within .1 (two standard errors).
ENOUGH = 100


def weights(asked: Sequence[float]) -> np.ndarray:
    """What each group counts, by the number of its questions: 1 from `ENOUGH` on, below it in proportion.

    Else the mean over the gaps of long sequences, in which the longest are hardly ever asked for, would be
    the chance of two or three answers. Where no group has enough, the largest ones count 1.
    """
    counts = np.asarray(asked, dtype=np.float64)
    return np.minimum(counts / max(min(counts.max(initial=0.0), ENOUGH), 1.0), 1.0)
