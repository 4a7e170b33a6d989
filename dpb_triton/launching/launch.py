# SPDX-License-Identifier: MIT
"""`launch(kernel, grid, *args, **constants)` is `kernel[grid](*args, **constants)` at a fraction of the host's time.

    kernel[grid](…)   Triton looks at each of 45 arguments, writes a string of what it found, and asks a dict with it
    launch(…)         asks a dict with what Triton's specialisation depends on: no strings, no binding by name

The first launch of a kind is Triton's own and tells which binary serves that kind; the next ones start that binary. A
kind must therefore be at least as fine as Triton's: the types of all arguments, the dtypes of the tensors and whether
they lie on 16 bytes, which ints are 1, which are multiples of 16, which do not fit 32 bits, the values of all constants
and options, the device. Sizes are not among them, so there are a few kinds of a kernel, whatever it is given.

What Triton would do besides is left to Triton: hooks and profilers, its interpreter, debugging, versions that nobody
has tried here, arguments of other types (tensor descriptors), AMD, whose specialisation also looks at a tensor's size.
"""

from operator import itemgetter

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

IS_TRIED = (
    triton.__version__.startswith(("3.6.", "3.7.", "3.8."))
    and torch.version.hip is None
    and not knobs.runtime.interpret
)
IS_INTERPRETED = bool(knobs.runtime.interpret)  # read where kernels are decorated, in this process once
INT32 = 2**31

_TRITONS = vars(triton.runtime.jit)
UNKNOWN = object()
_bindings = {}  # (id(kernel), names of the keywords, types of all values): _Binding, or UNKNOWN
_targets = {}  # (driver, device): GPUTarget


def cdiv(x, y):
    """The least int that is at least x / y. Triton's own, and its next_power_of_2, take microseconds on the host."""
    return -(-x // y)


def next_power_of_2(x):
    """The least power of 2 that is at least x, for x >= 1."""
    return 1 << (x - 1).bit_length()


def current_target():
    """The GPUTarget that is launched on; asking torch for its capability takes microseconds."""
    place = driver.active, driver.active.get_current_device()
    if place not in _targets:
        _targets[place] = driver.active.get_current_target()
    return _targets[place]


def launch(kernel, grid, *args, **constants):
    """Launch `kernel` on a grid of one to three ints, with Triton's options (num_warps, …) among `constants`.

    Returns the CompiledKernel and all arguments in its order; for the latter None if this file does not know them.
    """
    if not IS_TRIED or type(kernel) is not JITFunction or kernel.pre_run_hooks or is_watched():
        return kernel[grid](*args, **constants), None
    values = [*args, *constants.values()]
    call = (id(kernel), *constants, *map(type, values))
    binding = _bindings.get(call)
    if binding is None:
        binding = _bindings[call] = _bind(kernel, len(args), tuple(constants), values)
    if binding is UNKNOWN:
        return kernel[grid](*args, **constants), None
    arguments = binding.in_order(values)

    active = driver.active
    device = active.get_current_device()
    kind = [active, device, *binding.constants(values)]
    for place in binding.tensors:
        tensor = values[place]
        values[place] = pointer = tensor.data_ptr()  # the launcher takes both, and asks less about an int
        kind += tensor.dtype, pointer % 16 == 0
    kind += ["one" if value == 1 else value % 16 == 0 for value in binding.ints(values)]
    ints = binding.all_ints(values)
    if ints and (max(ints) >= INT32 or min(ints) < -INT32):
        kind += [-INT32 <= value < INT32 for value in ints]
    kind = tuple(kind)

    compiled = binding.compiled.get(kind)
    if compiled is None:
        compiled = kernel[grid](*args, **constants)
        if not isinstance(compiled, CompiledKernel):  # nothing, or a promise of one
            return compiled, None
        binding.compiled[kind] = compiled
    else:
        start(compiled, grid, active.get_current_stream(device), binding.in_order(values))
    return compiled, arguments


def start(compiled, grid, stream, arguments):
    """Start a CompiledKernel; nobody hears of it. Pointers may be ints."""
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def is_watched():
    """Whether somebody hears of launches, changes them, or asks for other binaries."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return (
        getattr(JITFunction.run, "__globals__", None) is not _TRITONS  # replaced, as bench/codegen/compile.py does
        or getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


class _Binding:
    """Where the values of a call go: places among its positional arguments and keywords, in the call's order."""

    def __init__(self, kernel, places, values):
        specialised = [places[p.name] for p in kernel.params if not p.is_constexpr and not p.do_not_specialize]
        runtime = [places[p.name] for p in kernel.params if not p.is_constexpr]
        ints = [place for place in runtime if type(values[place]) is int]
        self.kernel = kernel  # keeps its id from being given to another
        self.compiled = {}  # kind: the CompiledKernel
        self.tensors = [place for place in runtime if isinstance(values[place], torch.Tensor)]
        self.ints = _getter([place for place in ints if place in specialised])
        self.all_ints = _getter(ints)
        self.constants = _getter([place for place in range(len(values)) if place not in runtime])
        self.in_order = _getter([places[p.name] for p in kernel.params])


def _getter(places):
    """A function from values to the tuple of those at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _bind(kernel, n_args, names, values):
    """The _Binding of a call, UNKNOWN if this file does not know how its arguments specialise."""
    places = {param.name: place for place, param in enumerate(kernel.params[:n_args])}
    places |= {name: n_args + place for place, name in enumerate(names)}
    if len(places) != len(values) or not all(param.name in places for param in kernel.params):
        return UNKNOWN  # a default, or a mistake that Triton names
    for param in kernel.params:
        value = values[places[param.name]]
        is_known = value is None or type(value) in (int, float) or isinstance(value, torch.Tensor)
        if not param.is_constexpr and not is_known:
            return UNKNOWN
    return _Binding(kernel, places, values)
