# SPDX-License-Identifier: MIT
"""`launch(kernel, grid, *args, **constants)` is `kernel[grid](*args, **constants)` at a fraction of the host's time.

    kernel[grid](…)   Triton looks at each of 50 numbers and tensors, writes down what it found, asks a dict with it
    launch(…)         asks a dict with what Triton's specialisation depends on: no strings, no binding by name

The first launch of a kind is Triton's own and tells which binary serves that kind; the next ones start that binary. A
kind must therefore be at least as fine as Triton's: the types of all arguments, the dtypes of the tensors and whether
they lie on 16 bytes, the dtypes and boxes of tensor descriptors, which ints are 1, which are multiples of 16, which do
not fit 32 bits, the values of all constants and options, the device. Sizes are not among them, so there are a few kinds
of a kernel, whatever it is given.

What Triton would do besides is left to Triton: hooks and profilers, its interpreter, debugging, versions that nobody
has tried here, arguments of other types, AMD, whose specialisation also looks at a tensor's size. So is what becomes of
a descriptor, a tensor map and its sizes: its launcher in Python sees to that, whatever its form.
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

IS_INTERPRETED = bool(knobs.runtime.interpret)  # read where kernels are decorated, in this process once
IS_TRIED = triton.__version__.startswith(("3.6.", "3.7.", "3.8.")) and torch.version.hip is None and not IS_INTERPRETED
INT32 = 2**31

_TRITONS = vars(triton.runtime.jit)
UNKNOWN = object()
_tuples = {}  # types of the arguments: the places of those that are tuples, the last one first
_bindings = {}  # (id(kernel), id of that list, names of the keywords, types of all values): _Binding, or UNKNOWN
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

    An argument may be a tuple, of tensors and None or of numbers, or a TensorDescriptor. Constants belong to the
    parameters behind `args`.
    Returns the CompiledKernel and all arguments in its order; for the latter None if this file does not know them.
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
        pointers.append(pointer := tensor.data_ptr())  # the launcher takes both, and asks less about an int
        kind += tensor.dtype, pointer % 16 == 0
    for place in binding.descriptors:
        described = leaves[place]  # Triton names its dtype and box; the rest is for a Triton that names more
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
        if not isinstance(compiled, CompiledKernel):  # nothing, or a promise of one
            return compiled, None
        binding.compiled[kind] = compiled
    else:
        pointers.append(None)
        start(compiled, grid, active.get_current_stream(device), binding.pointed.fill(arguments, pointers))
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


class Pointed:
    """Where tensors are among arguments: at a place of their own, or in a tuple of nothing but tensors and None.

    numbers: of the tensors, in order, by which `fill` finds their pointers; 0, 1, … unless given.
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
        """A copy of `arguments` with pointers in place of the tensors. The last one of `pointers` is None."""
        arguments = arguments.copy()
        for place, number in self.plain:
            arguments[place] = pointers[number]
        for place, get in self.inside:
            arguments[place] = get(pointers)
        return arguments


class _Binding:
    """Where the values of a call go."""

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
                    if is_tuple or not param.do_not_specialize:  # Triton looks into every tuple
                        specialised.append(place)
                place += 1
        self.kernel = kernel  # keeps its id from being given to another
        self.compiled = {}  # kind: the CompiledKernel
        self.ints, self.all_ints = _getter(specialised), _getter(ints)
        self.constants = _getter([names.index(param.name) for param in kernel.params[len(args) :]])
        self.pointed = Pointed(args)


def _getter(places):
    """A function from values to the tuple of those at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _bind(kernel, args, constants):
    """The _Binding of a call, UNKNOWN if this file does not know how its arguments specialise."""
    behind = kernel.params[len(args) :]
    if len(args) > len(kernel.params) or not {param.name for param in behind} <= constants.keys():
        return UNKNOWN  # a default, or a mistake that Triton names
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
