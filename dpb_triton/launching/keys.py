# SPDX-License-Identifier: MIT
"""A kernel's key in Triton's cache, the same in every process.

Triton (3.6 to 3.8) puts the constants that a function's callees read into the function's key, but only those of callees
whose own key was asked for before: so the key depends on what a process launches first, and what another process
compiled is compiled again. Each module of kernels therefore asks for the keys of its functions when it has defined them
all, the callees before their callers. That is no work lost: a launch asks for them.
"""

from triton.runtime.jit import JITFunction


def settle(namespace):
    """Ask for the keys of the Triton functions in a module's `globals()`, in their order."""
    for value in list(namespace.values()):
        if isinstance(value, JITFunction):
            value.cache_key  # noqa: B018
