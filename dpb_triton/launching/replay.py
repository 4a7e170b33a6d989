# SPDX-License-Identifier: MIT
"""A call that only allocates and launches is written down, and from then on repeated from what was written.

    @repeated()
    def forward(query, key, …):    first    runs
                                   second   runs, and every `empty` and `launch` in it is written down
                                   then     the same allocations, the same binaries with the same numbers, and the
                                            pointers of the new tensors

"The same call" has tensors of the same sizes, strides, dtypes and alignment, and the same numbers, on the same device.
All that a launch is made of follows from these, and from what `also` names (torch's settings). So a function that is
`repeated` may make tensors with `empty` only, change them with `launch` only, and return what it made. What it makes
otherwise (a copy of an input whose rows are not side by side, say) is noticed when it is launched with or returned, and
such calls are never repeated; a change of a tensor by torch is not noticed (tests/launch_worker.py looks for those).

A repeated call costs the host a third of what it costs otherwise. To find that sizes are new, as in each step of a
decoder, costs a fifth; to write down costs as much as the call, and is not done for what comes once.
"""

import functools
import threading

import torch
from triton.runtime.driver import driver

from . import launch as launching

MOST_TAPES = 512  # of a function; the oldest is forgotten
_SEEN, _NEVER = object(), object()
_lock = threading.Lock()
_local = threading.local()  # .tape: the one that is written in this thread
_all_tapes = []


def empty(size, dtype, device, stride=None):
    """An uninitialised tensor, contiguous unless `stride` says otherwise."""
    if stride is None:
        made = torch.empty(size, dtype=dtype, device=device)
    else:
        made = torch.empty_strided(size, stride, dtype=dtype, device=device)
    if (tape := getattr(_local, "tape", None)) is not None:
        tape.write_allocation(made)
    return made


def launch(kernel, grid, *args, **constants):
    """`launching.launch`, written down."""
    compiled, values = launching.launch(kernel, grid, *args, **constants)
    if (tape := getattr(_local, "tape", None)) is not None:
        tape.write_launch(kernel, compiled, grid, values)
    return compiled


def forget():
    """All tapes; for who changes launch constants in a process."""
    for tapes in _all_tapes:
        tapes.clear()


def repeated(also=lambda *args: None):
    """A decorator; `also(*args)` is what else the function's launches depend on."""

    def decorate(function):
        tapes = {}
        _all_tapes.append(tapes)

        @functools.wraps(function)
        def call(*args, **options):
            if options or not launching.IS_TRIED or getattr(_local, "tape", None) is not None or launching.is_watched():
                return function(*args, **options)
            active = driver.active
            device = active.get_current_device()
            key = [active, device, also(*args), *map(type, args)]
            pointers = []
            for arg in args:
                if isinstance(arg, torch.Tensor):
                    pointer = arg.data_ptr()
                    pointers.append(pointer)
                    key += arg.shape, arg.stride(), arg.dtype, pointer % 16
                else:
                    key.append(arg)
            key = tuple(key)
            tape = tapes.get(key)
            if tape is None:
                _keep(tapes, key, _SEEN)
                return function(*args)
            if tape is _SEEN:
                tape, result = _write(function, args)
                _keep(tapes, key, tape)
                return result
            if tape is _NEVER or any(kernel.pre_run_hooks for kernel in tape.kernels):
                return function(*args)
            return tape.repeat(pointers, active.get_current_stream(device))

        return call

    return decorate


def _keep(tapes, key, tape):
    with _lock:
        tapes[key] = tape
        if len(tapes) > MOST_TAPES:
            del tapes[next(iter(tapes))]


def _write(function, args):
    """(the tape of a call or _NEVER, its result)."""
    # one object a tensor, also where key and value are the same: next time they may be two
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    _local.tape = tape = _Tape([arg for arg in args if isinstance(arg, torch.Tensor)])
    try:
        result = function(*args)
    finally:
        _local.tape = None
    return tape if tape.finish(result) else _NEVER, result


class _Tape:
    """Allocations, launches and results. Tensors are named by their slot: first the inputs, then what was made."""

    def __init__(self, inputs):
        self.tensors = inputs  # while it is written
        self.slots = {id(tensor): slot for slot, tensor in enumerate(inputs)}
        self.n_inputs = len(inputs)
        self.allocations = []
        self.kernels = []
        self.launches = []
        self.is_whole = True

    def write_allocation(self, made):
        self.slots[id(made)] = len(self.tensors)
        self.tensors.append(made)
        self.allocations.append((tuple(made.shape), made.stride(), made.dtype, made.device))
        self.is_whole &= made.data_ptr() % 16 == 0

    def write_launch(self, kernel, compiled, grid, values):
        """`values` in the order of the kernel's parameters; None if the launcher does not know them."""
        if values is None:
            self.is_whole = False
            return
        tensors = [leaf for value in values for leaf in (value if isinstance(value, tuple) else (value,))]
        slots = [self.slots.get(id(leaf)) for leaf in tensors if isinstance(leaf, torch.Tensor)]
        self.is_whole &= None not in slots
        self.kernels.append(kernel)
        nothing = launching.Pointed(values, [-1] * len(slots)).fill(values, [None])  # keeps no tensor alive
        self.launches.append((compiled, grid, nothing, launching.Pointed(values, slots)))

    def finish(self, result):
        """Whether it may be repeated."""
        self.is_single = isinstance(result, torch.Tensor)
        made = range(self.n_inputs, len(self.tensors))
        self.results = [self.slots.get(id(tensor)) for tensor in ((result,) if self.is_single else result)]
        self.is_whole &= bool(self.launches) and all(slot in made for slot in self.results)
        del self.tensors, self.slots
        return self.is_whole

    def repeat(self, pointers, stream):
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device=device)
            for size, stride, dtype, device in self.allocations
        ]
        pointers += [tensor.data_ptr() for tensor in made]
        pointers.append(None)
        for compiled, grid, values, pointed in self.launches:
            launching.start(compiled, grid, stream, pointed.fill(values, pointers))
        made = [made[slot - self.n_inputs] for slot in self.results]
        return made[0] if self.is_single else tuple(made)
