# SPDX-License-Identifier: MIT
"""`python -m bench decode`: a decoding step, few queries against many keys, against its peers and the limits."""
