# SPDX-License-Identifier: MIT
"""Starts Triton kernels from Python at low cost, for attention and expand. Imported only if Triton is used."""
