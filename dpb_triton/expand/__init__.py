# SPDX-License-Identifier: MIT
"""Expand: a table of distances as a position bias, its transpose reduce: api -> autograd -> ops -> who computes."""
