# SPDX-License-Identifier: MIT
"""`python -m bench sweep`: find the attention kernels' launch constants by compiling and timing them."""
