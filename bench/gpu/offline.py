# SPDX-License-Identifier: MIT
"""The GPU to compile for on a machine without one. Imports only Triton."""

import functools

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TARGET = GPUTarget("cuda", 90, 32)  # H100, H200


class _Driver:
    """The part of a Triton driver that a launch uses before it compiles, and that compiling a launcher uses."""

    @functools.cached_property
    def utils(self):
        from triton.backends.nvidia.driver import CudaUtils

        return CudaUtils()

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def install():
    """From now on this process compiles for TARGET."""
    driver.set_active(_Driver())
