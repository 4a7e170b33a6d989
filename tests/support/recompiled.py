# SPDX-License-Identifier: MIT
"""Tells in a test's message why torch.compile compiled again: nobody can repeat a run on a lent GPU with more logs."""

import torch
from torch._dynamo.utils import guard_failures


def begin_anew():
    """Forget all compiled graphs and all guard failures."""
    torch._dynamo.reset()
    guard_failures.clear()


def why_again():
    """The guards that failed since `begin_anew`. If none failed, Dynamo compiled the same frame again."""
    reasons = [str(reason).splitlines()[0] for failures in guard_failures.values() for reason in failures]
    return "recompiled: " + ("; ".join(dict.fromkeys(reasons)) or "no guard failed")
