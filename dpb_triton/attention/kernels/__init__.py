# SPDX-License-Identifier: MIT
"""Attention in Triton. Imported only on use; depends on nothing in the package but `launching/`."""
