# SPDX-License-Identifier: MIT
"""Make a kernel's key in Triton's cache the same in every process.

Triton (3.6 to 3.9) puts the constants that a function's callees read into the function's key. But it does so only for
callees whose own key was computed before. So the key depends on what a process launches first, and a process compiles
again what another one has compiled. Each module of kernels therefore computes the keys of its functions at its end,
callees before callers. This costs nothing extra, because a launch needs the keys too.
"""

from triton.runtime.jit import JITFunction


def settle(namespace):
    """Compute the keys of the Triton functions in a module's `globals()`, in the order of their definition."""
    for value in list(namespace.values()):
        if isinstance(value, JITFunction):
            value.cache_key  # noqa: B018
