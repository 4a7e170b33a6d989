# SPDX-License-Identifier: MIT
"""The benches run in the process of the tests, whose memory is full of other things."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """A bench collects garbage before it takes a peak; half a second each time if it looked at all that is there."""
    gc.collect()
    gc.freeze()
