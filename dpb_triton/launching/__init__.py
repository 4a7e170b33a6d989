# SPDX-License-Identifier: MIT
"""How both slices start Triton kernels from Python, at little cost; imported only where Triton is asked for."""
