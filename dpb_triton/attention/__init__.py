# SPDX-License-Identifier: MIT
"""Attention whose bias is never materialised: api -> autograd -> ops -> torch_path, or kernels/ for Triton."""
