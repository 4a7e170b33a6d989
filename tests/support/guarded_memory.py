# SPDX-License-Identifier: MIT
"""Makes Triton's interpreter refuse accesses outside the memory of a launch's tensors.

Numbers from beyond a tensor's end often have no effect, because a mask drops them later. So results alone cannot show
that a load lacks its mask, or that padding is too small. On a GPU such a load fails only if its page is not mapped.
"""

import numpy as np


def install():
    """Patch the interpreter. Do nothing if Triton is not installed or not as expected."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    builder = getattr(interpreter, "InterpreterBuilder", None)
    if all(hasattr(builder, name) for name in ("create_masked_load", "create_masked_store")):
        guard(interpreter, builder)


def guard(interpreter, builder):
    """Note the memory of each launch, and check the addresses of its accesses."""
    launch, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    memory = []  # (first, end) of each storage

    def launch_guarded(self, *args, **kwargs):
        memory[:] = {place_of(tensor) for tensor in tensors_of(args)}
        return launch(self, *args, **kwargs)

    def load_guarded(self, ptrs, mask, *args, **kwargs):
        check(memory, ptrs, mask)
        return load(self, ptrs, mask, *args, **kwargs)

    def store_guarded(self, ptrs, value, mask, *args, **kwargs):
        check(memory, ptrs, mask)
        return store(self, ptrs, value, mask, *args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_guarded
    builder.create_masked_load, builder.create_masked_store = load_guarded, store_guarded


def tensors_of(values):
    for value in values:
        value = getattr(value, "base", value) if hasattr(value, "block_shape") else value  # a descriptor
        if isinstance(value, tuple):
            yield from tensors_of(value)
        elif hasattr(value, "untyped_storage"):
            yield value


def place_of(tensor):
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def check(memory, ptrs, mask):
    """Raise unless all accesses are in one storage."""
    addresses = np.asarray(ptrs.data)[np.asarray(mask.data).astype(bool)]  # a mask may hold 0 and 1
    if addresses.size:
        first, end = int(addresses.min()), int(addresses.max()) + max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        if not any(begin <= first and end <= stop for begin, stop in memory):
            near = min((abs(first - begin), first - begin, stop - begin) for begin, stop in memory)
            raise IndexError(f"bytes {near[1]} … {near[1] + end - first} are outside a tensor's {near[2]} bytes")
