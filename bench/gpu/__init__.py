# SPDX-License-Identifier: MIT
"""All that needs a GPU, in phases, each cut off at its part of the time; results are written as they come."""
