"""Every test runs on one thread, from the same seed, with Hypothesis searching the same examples."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Examples cost milliseconds to seconds, so that a deadline would only measure the machine.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no process ends long before the other."""
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
