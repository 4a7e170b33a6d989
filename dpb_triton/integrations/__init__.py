# SPDX-License-Identifier: MIT
"""The position bias inside other libraries' models; each file needs its library, and says so where it is missing."""
