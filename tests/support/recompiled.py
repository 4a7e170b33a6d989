# SPDX-License-Identifier: MIT
"""Why torch.compile compiled again, for a test's message: on a lent GPU the run cannot be repeated with more logs."""

import torch
from torch._dynamo.utils import guard_failures


def begin_anew():
    """Forget all that was compiled, and why."""
    torch._dynamo.reset()
    guard_failures.clear()


def why_again():
    """The guards that failed since `begin_anew`, or that none did: then Dynamo began the same frame anew."""
    reasons = [str(reason).splitlines()[0] for failures in guard_failures.values() for reason in failures]
    return "recompiled: " + ("; ".join(dict.fromkeys(reasons)) or "no guard failed")
