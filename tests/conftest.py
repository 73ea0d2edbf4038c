"""Every test runs on one thread, from the same seed, with Hypothesis searching the same examples."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Examples cost milliseconds to seconds, so that a deadline would only measure the machine.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
