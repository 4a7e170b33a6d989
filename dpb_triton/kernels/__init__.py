# SPDX-License-Identifier: MIT
"""Triton kernels and their launchers: plain functions on tensors, imported only where a Triton backend is asked for."""
