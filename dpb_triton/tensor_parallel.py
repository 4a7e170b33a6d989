# SPDX-License-Identifier: MIT
"""Users import `HeadParallel` from here; it lives in `distributed/tensor_parallel.py`."""

from .distributed.tensor_parallel import HeadParallel

__all__ = ["HeadParallel"]
