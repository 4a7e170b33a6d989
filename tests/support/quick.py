# SPDX-License-Identifier: MIT
"""Marks the part of a test matrix that `make test` runs. `make test-full` runs all of it."""

import pytest


def slow(*values, **options):
    """Parameters that only `make test-full` runs."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def slow_but(names, cases):
    """Parameters from a dict of cases. Only `make test-full` runs the cases that are not in `names`."""
    missing = set(names) - set(cases)
    assert not missing, missing
    return [(pytest.param if name in names else slow)(case, id=name) for name, case in cases.items()]
