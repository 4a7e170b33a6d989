# SPDX-License-Identifier: MIT
"""A training state on disk that survives a kill at any moment: it is the old or the new one, never half of one."""

import os
import tempfile
from pathlib import Path

import torch


def save(path, state):
    """Write `state` (tensors and plain Python) to the disk beside `path`, then rename it to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path):
    """What `save` wrote, on the CPU; runs no code from the file. None if there is no file."""
    path = Path(path)
    for leftover in path.parent.glob(f"{path.name}*.tmp"):  # of a killed save
        leftover.unlink()
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
