# SPDX-License-Identifier: MIT
"""Benchmarks: `python -m bench --help`."""
