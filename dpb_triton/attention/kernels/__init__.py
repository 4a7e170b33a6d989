# SPDX-License-Identifier: MIT
"""Triton's attention: imported only where it is asked for, knows nothing of the package but `launching/`."""
