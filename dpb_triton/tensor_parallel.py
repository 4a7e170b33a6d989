# SPDX-License-Identifier: MIT
"""The name under which users import `HeadParallel`, which lives in `distributed/tensor_parallel.py`."""

from .distributed.tensor_parallel import HeadParallel

__all__ = ["HeadParallel"]
