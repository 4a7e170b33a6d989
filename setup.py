# SPDX-License-Identifier: MIT
"""Metadata is in pyproject.toml; this file is where the compiled extension (csrc/) will be built."""

from setuptools import setup

setup()
