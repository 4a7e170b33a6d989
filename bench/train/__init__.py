# SPDX-License-Identifier: MIT
"""`python -m bench train`: train a language model with our bias and with eager's, and compare the costs."""
