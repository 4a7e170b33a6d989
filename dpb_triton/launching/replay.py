# SPDX-License-Identifier: MIT
"""Record a call that only allocates and launches, and replay later calls from the record, the "tape".

    @repeated()
    def forward(query, key, …):    first call    runs
                                   second call   runs, and the tape records every `empty` and `launch` in it
                                   later calls   replay: the same allocations, the same binaries with the same numbers,
                                                 and the pointers of the new tensors

"The same call" has tensors of the same sizes, strides, dtypes and alignment, and the same numbers, on the same device.
These determine every launch, together with what `also` names (torch's settings). So a `repeated` function may create
tensors only with `empty`, change them only with `launch`, and return only what it created. If it creates a tensor in
another way, such as a copy of an input with strided rows, the tape notices when the function launches with this tensor
or returns it. Such calls are never replayed. The tape does not notice if torch changes a tensor;
tests/support/launch_worker.py looks for such changes.

A replayed call costs the host a sixth of a normal call. A call with new sizes, as in each step of a decoder, costs a
tenth more. Recording costs twice the call, so a call that comes only once is not recorded. A replay makes one
allocation for all tensors that the call does not return, because an allocation on a GPU costs the host microseconds.

A tensor descriptor becomes a tensor map, which holds a pointer, and some ints. A replay encodes the map from the new
pointer, by the one C function that Triton would call. If the pointer has not changed, it reuses the last map.
"""

import copy
import functools
import threading
import types
from types import SimpleNamespace

import torch
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch as launching

MOST_TAPES = 512  # per function; the oldest is dropped
BLOCK_BYTES = 512  # torch's allocator on a GPU rounds to this
_SEEN, _NEVER = object(), object()
_lock = threading.Lock()
_local = threading.local()  # .tape: the tape that this thread records
_all_tapes = []
_tensors = {}  # {types of the arguments: places of the tensors}


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
    """`launching.launch`, recorded on this thread's tape if it has one."""
    compiled, values = launching.launch(kernel, grid, *args, **constants)
    if (tape := getattr(_local, "tape", None)) is not None:
        tape.write_launch(kernel, compiled, grid, values)
    return compiled


def forget():
    """Drop all tapes. Call this after changing launch constants in a process."""
    for tapes in _all_tapes:
        tapes.clear()


def repeated(also=lambda *args: None):
    """Decorate a function to be replayed. `also(*args)` returns whatever else its launches depend on."""

    def decorate(function):
        tapes = {}
        _all_tapes.append(tapes)

        @functools.wraps(function)
        def call(*args, **options):
            if options or not launching.IS_TRIED or getattr(_local, "tape", None) is not None or launching.is_watched():
                return function(*args, **options)
            active = driver.active
            device = active.get_current_device()
            types = (*map(type, args),)
            places = _tensors.get(types)
            if places is None:
                places = _tensors[types] = [n for n, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
            key = [active, device, also(*args), types, *args]
            pointers = []
            for place in places:
                arg = args[place]
                pointers.append(pointer := arg.data_ptr())
                key[place + 4] = arg.shape, arg.stride(), arg.dtype, pointer % 16
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
    """Run and record a call: (its tape or _NEVER, its result)."""
    # one object per argument, even if key and value are the same tensor: next time they may differ
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    _local.tape = tape = _Tape([arg for arg in args if isinstance(arg, torch.Tensor)])
    try:
        result = function(*args)
    finally:
        _local.tape = None
    return tape if tape.finish(result) else _NEVER, result


class _Tape:
    """Allocations, launches and results. A slot names a tensor: first the inputs, then the tensors that were made."""

    def __init__(self, inputs):
        self.tensors = inputs  # this field and the next four are for the recording
        self.slots = {id(tensor): slot for slot, tensor in enumerate(inputs)}
        self.n_inputs = len(inputs)
        self.written = []
        self.is_whole = True
        self.kernels = []

    def write_allocation(self, made):
        self.slots[id(made)] = len(self.tensors)
        self.tensors.append(made)
        self.is_whole &= made.data_ptr() % 16 == 0

    def write_launch(self, kernel, compiled, grid, values):
        """Record a launch. values: in the order of the kernel's parameters; None if the launcher does not know them."""
        if values is None:
            self.is_whole = False
            return
        tensors = [leaf for value in values for leaf in (value if isinstance(value, tuple) else (value,))]
        slots = [self.slots.get(id(leaf)) for leaf in tensors if isinstance(leaf, torch.Tensor)]
        bases = [self.slots.get(id(value.base)) for value in values if type(value) is TensorDescriptor]
        self.is_whole &= None not in slots and None not in bases
        self.kernels.append(kernel)
        self.written.append((compiled, grid, values, slots, bases))

    def finish(self, result):
        """End the recording. Returns whether the call may be replayed."""
        self.is_single = isinstance(result, torch.Tensor)
        made = range(self.n_inputs, len(self.tensors))
        results = [self.slots.get(id(tensor)) for tensor in ((result,) if self.is_single else result)]
        self.is_whole &= bool(self.written) and all(slot in made for slot in results)
        if self.is_whole:
            # a tensor without elements has no memory, and so no place in the block
            alone = [slot for slot in made if slot in results or self.tensors[slot].numel() == 0]
            inside = [slot for slot in made if slot not in alone]
            numbers = {slot: number for number, slot in enumerate([*range(self.n_inputs), *alone, *inside])}
            made = [self.tensors[slot] for slot in alone]
            self.allocations = [_allocation((*x.shape,), x.stride(), x.dtype, x.device) for x in made]
            self.results = [alone.index(slot) for slot in results]
            self.block, self.places = _block([self.tensors[slot] for slot in inside])
            self.launches, maps = [], {}
            for compiled, grid, values, slots, bases in self.written:
                start, grid, more, is_flat = _starter(compiled, grid)
                places = []
                if bases:
                    expanded = _expanded(start, grid, more, is_flat, values, [numbers[slot] for slot in bases], maps)
                    if expanded is None:
                        self.is_whole = False
                        break
                    start, values, places = expanded
                pointed = _pointed(values, [numbers[slot] for slot in slots])
                self.launches.append((start, grid, more, is_flat, *pointed, places))
        del self.tensors, self.slots, self.written
        return self.is_whole

    def repeat(self, pointers, stream):
        made = [allocate(*size) for allocate, size in self.allocations]
        pointers += [tensor.data_ptr() for tensor in made]
        if self.block is not None:
            allocate, size = self.block
            block = allocate(*size)
            first = block.data_ptr()
            pointers += [first + place for place in self.places]
        pointers.append(None)
        for start, grid, more, is_flat, values, pointed, maps in self.launches:
            arguments = pointed.fill(values, pointers)
            for place, tensor_map in maps:
                arguments[place] = tensor_map.of(pointers)  # stays alive until the launch has copied it
            if is_flat:
                start(*grid, stream, *more, *arguments)
            else:
                start(*grid, stream, *more, tuple(arguments))
        if self.is_single:
            return made[self.results[0]]
        return tuple([made[number] for number in self.results])


def _allocation(size, stride, dtype, device):
    """(function, its arguments): the function makes such a tensor on the current device.

    Torch's own compiled code allocates with this function. It takes half of torch.empty_strided's time on the host.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    function = getattr(guards, f"_empty_strided_{device.type}", None)
    if function is not None and (device.type == "cpu" or device.index == driver.active.get_current_device()):
        return function, (size, stride, dtype)
    return functools.partial(torch.empty_strided, dtype=dtype, device=device), (size, stride)


def _block(tensors):
    """(the allocation of a block with room for all tensors, the byte where each one begins); (None, []) for none."""
    if not tensors:
        return None, []
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        end += -(-(last + 1) * tensor.element_size() // BLOCK_BYTES) * BLOCK_BYTES
    return _allocation((end,), (1,), torch.uint8, tensors[0].device), places


def _pointed(values, numbers):
    """(`values` with None for each tensor, the Pointed that fills in pointers)."""
    pointed = launching.Pointed(values, numbers)
    return pointed.fill(values, [None] * (max(numbers, default=0) + 1)), pointed  # None, to keep no tensor alive


def _starter(compiled, grid):
    """(function, grid, its arguments after the stream, whether it takes the kernel's arguments one by one) of a launch.

    The function does `launching.start` in one call. It is Triton's C function if Triton's launcher in Python only calls
    that. A copy of the launcher, which calls a function that notes its arguments, shows what the C function gets.
    """
    launcher, grid = compiled.run, (*grid, 1, 1)[:3]
    more = compiled.function, compiled.packed_metadata, None, None, None
    function, stream, argument = getattr(launcher, "launch", None), object(), object()
    has_scratch = getattr(launcher, "global_scratch_size", 1) or getattr(launcher, "profile_scratch_size", 1)
    if type(launcher).__name__ == "CudaLauncher" and not has_scratch and not getattr(launcher, "gsan_enabled", False):
        noted = []
        launcher = copy.copy(launcher)
        launcher.launch = lambda *args: noted.append(args)
        launcher(*grid, stream, *more, argument)
        if len(noted) == 1:
            *before, last = noted[0]
            if before[:3] == [*grid] and before[3] is stream and (last is argument or last == (argument,)):
                return function, grid, before[4:], last is argument
    return compiled.run, grid, more, True


class _Map:
    """A tensor map with everything known but the pointer."""

    def __init__(self, number, encode, rest):
        self.number, self.encode, self.rest = number, encode, rest  # which pointer; encode(pointer, *rest)
        # One tuple, so that no thread combines its own pointer with another thread's map. A map depends on these
        # arguments alone, so it stays right whatever the pointer's memory holds by now.
        self.last = None, None

    def of(self, pointers):
        pointer = pointers[self.number]
        last, made = self.last
        if pointer != last:
            made = self.encode(pointer, *self.rest)
            self.last = pointer, made
        return made


class _Base:
    """A stand-in for the tensor under a descriptor, and for its pointer."""

    def __init__(self, number):
        self.number = number

    def data_ptr(self):
        return self


class _Notes:
    """A stand-in for Triton's C functions: each one notes its name and arguments, and returns the note."""

    def __init__(self):
        self.notes = []

    def __getattr__(self, name):
        def note(*args):
            self.notes.append(made := (name, *args))
            return made

        return note


def _expanded(wrapper, grid, more, is_flat, values, numbers, maps):
    """(function, `values` with descriptors expanded, [(place in these values, _Map)]) of a launch from `_starter`.

    None if this file does not know the form of Triton's launcher. `wrapper` is Triton's launcher in Python: it encodes
    the descriptors, and calls the C function with maps and sizes in place of the descriptors. A copy of it, which calls
    functions that note their arguments instead of the C functions, shows these. numbers: the indices of the
    descriptors' pointers; maps: {what determines a _Map: _Map}, which launches share if they read a tensor in the same
    boxes.
    """
    try:
        function, utils = _closure(wrapper)["launcher"], driver.active.utils
        stand_ins, numbers = [], iter(numbers)
        for value in values:
            if type(value) is TensorDescriptor:
                value = copy.copy(value)
                value.base = _Base(next(numbers))
            stand_ins.append(value)
        noted, stream = _Notes(), object()
        noting = _with_utils(wrapper, noted)
        before = *grid, stream, *more
        noting(*before, *stand_ins) if is_flat else noting(*before, tuple(stand_ins))
        *encoded, (_, *given) = noted.notes
        if given[: len(before)] != [*before] or not callable(function):
            return None
        given = given[len(before) :]
        expanded, places = [*(given if is_flat else given[0])], []
        notes = set(map(id, encoded))
        for place, value in enumerate(expanded):
            if id(value) in notes:
                name, base, *rest = value
                rest = tuple([tuple(part) if isinstance(part, list | tuple) else part for part in rest])
                key = base.number, name, rest
                if key not in maps:
                    maps[key] = _Map(base.number, getattr(utils, name), rest)
                expanded[place] = None
                places.append((place, maps[key]))
    except Exception:  # the launcher of another Triton version works differently
        return None
    is_left = {_Base, TensorDescriptor} & set(map(type, expanded))  # true for GPUs without tensor maps
    return None if is_left or len(places) != len(encoded) else (function, expanded, places)


def _closure(function):
    """{name: value} of a Python function's closure."""
    return dict(zip(function.__code__.co_freevars, [cell.cell_contents for cell in function.__closure__], strict=True))


def _with_utils(wrapper, utils):
    """A copy of Triton's launcher that uses `utils` as `triton.runtime.driver.active.utils` and to launch."""
    triton = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(utils=utils))))

    def copied(function, **others):
        cells = {**_closure(function), **others} if function.__closure__ else {}
        cells = tuple([types.CellType(cells[name]) for name in function.__code__.co_freevars])
        names = {**function.__globals__, "triton": triton, **others}
        return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)

    make = "make_tensordesc_arg"  # a global of the wrapper in 3.6 and 3.7, in its closure since 3.8
    make = _closure(wrapper).get(make) or wrapper.__globals__[make]
    return copied(wrapper, launcher=utils.launch, make_tensordesc_arg=copied(make))
