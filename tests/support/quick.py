# SPDX-License-Identifier: MIT
"""What of a matrix `make test` runs. `make test-full` runs all of it."""

import pytest


def slow(*values, **options):
    """Parameters for `make test-full` alone."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def slow_but(names, cases):
    """The parameters of a dict of cases: those of these names, and the others for `make test-full`."""
    missing = set(names) - set(cases)
    assert not missing, missing
    return [(pytest.param if name in names else slow)(case, id=name) for name, case in cases.items()]
