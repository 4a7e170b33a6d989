# SPDX-License-Identifier: MIT
"""`python -m bench attention`: attention with a trained bias against its peers and the hardware's limit."""
