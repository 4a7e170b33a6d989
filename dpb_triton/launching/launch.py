# SPDX-License-Identifier: MIT
"""`launch(kernel, grid, *args, **constants)` is `kernel[grid](*args, **constants)` at a fraction of the host's time.

    kernel[grid](…)   Triton inspects each of 50 numbers and tensors, describes them in strings, looks those up
    launch(…)         looks up what Triton's specialisation depends on: no strings, no binding by name

Triton itself does the first launch of a kind, and so tells which binary serves that kind. Later launches start that
binary. So a kind must be at least as fine as Triton's. It holds the types of all arguments, the dtypes of the tensors
and whether they are 16-byte aligned, the dtypes and boxes of tensor descriptors, which ints are 1, are multiples of 16
or do not fit 32 bits, the values of all constants and options, and the device. It does not hold sizes, so a kernel has
only a few kinds.

Triton still handles all other cases: hooks and profilers, its interpreter, debugging, versions that nobody has tried
here, arguments of other types, and AMD, whose specialisation also depends on a tensor's size. It also turns a
descriptor into a tensor map and its sizes: its launcher in Python does this, and may change how.
"""

import itertools
from operator import itemgetter

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

IS_INTERPRETED = bool(knobs.runtime.interpret)  # Triton reads it once, when a kernel is decorated
IS_TRIED = (
    triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9.")) and torch.version.hip is None and not IS_INTERPRETED
)
INT32 = 2**31

_TRITONS = vars(triton.runtime.jit)
UNKNOWN = object()
_tuples = {}  # {types of the arguments: places of the tuples, the last one first}
_bindings = {}  # {(id(kernel), id of that list, names of the keywords, types of all values): _Binding or UNKNOWN}
_targets = {}  # (driver, device): GPUTarget


def cdiv(x, y):
    """Round x / y up. Triton's cdiv and next_power_of_2 take microseconds on the host."""
    return -(-x // y)


def next_power_of_2(x):
    """The smallest power of 2 that is at least x, for x >= 1."""
    return 1 << (x - 1).bit_length()


def current_target():
    """The GPUTarget of the current device, cached: asking torch for its capability takes microseconds."""
    place = driver.active, driver.active.get_current_device()
    if place not in _targets:
        _targets[place] = driver.active.get_current_target()
    return _targets[place]


def launch(kernel, grid, *args, **constants):
    """Launch `kernel` on a grid of one to three ints, with Triton's options (num_warps, …) among `constants`.

    An argument may be a TensorDescriptor, or a tuple of tensors and None, or a tuple of numbers. Constants name the
    parameters after `args`.
    Returns the CompiledKernel and all arguments in the kernel's order, or None for the arguments if Triton handled
    the launch.
    """
    if not IS_TRIED or type(kernel) is not JITFunction or kernel.pre_run_hooks or is_watched():
        return kernel[grid](*args, **constants), None
    types = (*map(type, args),)
    tuples = _tuples.get(types)
    if tuples is None:
        tuples = _tuples[types] = [place for place, arg in enumerate(args) if isinstance(arg, tuple)][::-1]
    leaves = [*args]
    for place in tuples:
        leaves[place : place + 1] = args[place]
    values = constants.values()
    call = (id(kernel), id(tuples), *constants, *map(type, leaves), *map(type, values))
    binding = _bindings.get(call)
    if binding is None:
        binding = _bindings[call] = _bind(kernel, args, constants)
    if binding is UNKNOWN:
        return kernel[grid](*args, **constants), None

    active = driver.active
    device = active.get_current_device()
    kind = [active, device, *values]
    pointers = []
    for place in binding.tensors:
        tensor = leaves[place]
        pointers.append(pointer := tensor.data_ptr())  # Triton's launcher also takes ints, and checks them less
        kind += tensor.dtype, pointer % 16 == 0
    for place in binding.descriptors:
        described = leaves[place]  # Triton's kind holds its dtype and box; the rest is for later versions
        kind += described.base.dtype, (*described.block_shape,), described.padding
        kind.append(getattr(described, "round_f32_to_tf32", False))
    kind += ["one" if value == 1 else value % 16 == 0 for value in binding.ints(leaves)]
    ints = binding.all_ints(leaves)
    if ints and (max(ints) >= INT32 or min(ints) < -INT32):
        kind += [-INT32 <= value < INT32 for value in ints]
    kind = tuple(kind)

    arguments = [*args, *binding.constants([*values])]
    compiled = binding.compiled.get(kind)
    if compiled is None:
        compiled = kernel[grid](*args, **constants)
        if not isinstance(compiled, CompiledKernel):  # None, or a kernel that is still compiling
            return compiled, None
        binding.compiled[kind] = compiled
    else:
        pointers.append(None)
        start(compiled, grid, active.get_current_stream(device), binding.pointed.fill(arguments, pointers))
    return compiled, arguments


def start(compiled, grid, stream, arguments):
    """Start a CompiledKernel without calling any hook. Pointers may be ints."""
    x, y, z = (*grid, 1, 1)[:3]
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def is_watched():
    """Whether a hook, a profiler or a setting observes launches, changes them, or needs other binaries."""
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


class Pointed:
    """The places of tensors among arguments: an argument itself, or inside a tuple of only tensors and None.

    numbers: one per tensor, in order: its index in the pointers that `fill` takes. Default 0, 1, …
    """

    def __init__(self, arguments, numbers=None):
        numbers = itertools.count() if numbers is None else iter(numbers)
        self.plain, self.inside = [], []
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                self.plain.append((place, next(numbers)))
            elif isinstance(argument, tuple) and any(isinstance(value, torch.Tensor) for value in argument):
                self.inside.append((place, _getter([-1 if value is None else next(numbers) for value in argument])))

    def fill(self, arguments, pointers):
        """A copy of `arguments` with pointers in place of the tensors. The last of `pointers` must be None."""
        arguments = arguments.copy()
        for place, number in self.plain:
            arguments[place] = pointers[number]
        for place, get in self.inside:
            arguments[place] = get(pointers)
        return arguments


class _Binding:
    """Where each value of a call goes, and the binaries by kind."""

    def __init__(self, kernel, args, names):
        specialised, ints, self.tensors, self.descriptors, place = [], [], [], [], 0  # places among the leaves
        for param, arg in zip(kernel.params, args, strict=False):
            is_tuple = isinstance(arg, tuple)
            for value in arg if is_tuple else (arg,):
                if isinstance(value, torch.Tensor):
                    self.tensors.append(place)
                elif type(value) is TensorDescriptor:
                    self.descriptors.append(place)
                elif type(value) is int:
                    ints.append(place)
                    if is_tuple or not param.do_not_specialize:  # Triton always specialises on a tuple's values
                        specialised.append(place)
                place += 1
        self.kernel = kernel  # keeps it alive, so that no other object gets its id
        self.compiled = {}  # {kind: CompiledKernel}
        self.ints, self.all_ints = _getter(specialised), _getter(ints)
        self.constants = _getter([names.index(param.name) for param in kernel.params[len(args) :]])
        self.pointed = Pointed(args)


def _getter(places):
    """A function that returns the tuple of the values at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _bind(kernel, args, constants):
    """The _Binding of a call, or UNKNOWN if this file does not know how Triton specialises its arguments."""
    behind = kernel.params[len(args) :]
    if len(args) > len(kernel.params) or not {param.name for param in behind} <= constants.keys():
        return UNKNOWN  # a default, or a mistake that Triton reports
    if any(param.name in constants for param in kernel.params[: len(args)]):
        return UNKNOWN
    if not all(param.is_constexpr for param in behind) or any(p.is_constexpr for p in kernel.params[: len(args)]):
        return UNKNOWN
    for arg in args:
        if type(arg) is TensorDescriptor:
            continue
        values = arg if isinstance(arg, tuple) else (arg,)
        are_numbers = all(type(value) in (int, float) for value in values)
        if not are_numbers and not all(value is None or isinstance(value, torch.Tensor) for value in values):
            return UNKNOWN
    return _Binding(kernel, args, [*constants])
