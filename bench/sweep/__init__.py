# SPDX-License-Identifier: MIT
"""`python -m bench sweep`: the attention kernels' launch constants, by evidence."""
