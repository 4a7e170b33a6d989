# SPDX-License-Identifier: MIT
"""The benches run in the process of the tests, which holds many other objects."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """A bench collects garbage before it measures a peak. Looking at all objects would take half a second each time."""
    gc.collect()
    gc.freeze()
