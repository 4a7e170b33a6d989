# SPDX-License-Identifier: MIT
"""`python -m bench train`: a language model trained with the bias, ours and eager's, and what it costs."""
