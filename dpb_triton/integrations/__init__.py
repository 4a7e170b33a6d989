# SPDX-License-Identifier: MIT
"""The position bias inside other libraries' models. Each file needs its library, and says so if it is missing."""
