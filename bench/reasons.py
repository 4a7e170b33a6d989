# SPDX-License-Identifier: MIT
"""Why a cell has no times, in words that fit a table."""

import warnings
from contextlib import contextmanager

import torch

NO_MEMORY = "out of memory"
NO_TIME = "not measured: time limit"
NO_KERNEL = "No available kernel"  # scaled_dot_product_attention says so if the chosen kernel does not take the shape


def first_line(error):
    """The message of an exception, in one line."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def reason_of(error):
    """Why a call was not timed."""
    if isinstance(error, torch.OutOfMemoryError):
        return NO_MEMORY
    if isinstance(error, TimeoutError):
        return NO_TIME
    return first_line(error).removeprefix("NotImplementedError: ")


@contextmanager
def refusals():
    """Turn SDPA's refusal, which names no reason, into a NotImplementedError with the reasons from its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            if NO_KERNEL not in str(error):
                raise
            said = [str(warning.message).split(" (Triggered internally")[0] for warning in caught]
            said = [words for words in said if "not used because" not in words and "runtime disabled" not in words]
            raise NotImplementedError("; ".join([NO_KERNEL, *dict.fromkeys(said)])[:300]) from None
