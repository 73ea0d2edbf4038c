"""What the tests of the HTM read are run under."""

import pytest

from htm import attend as inner
from tests.htm.common import CHUNK, DIM


# One query at a time in a block, some, and all at once.
@pytest.fixture(params=[1, 3 * 2 * CHUNK * DIM * 8, 2**20], ids=["single", "few", "all"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inner, "CPU_BLOCK_BYTES", request.param)
