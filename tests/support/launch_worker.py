# SPDX-License-Identifier: MIT
"""A process that compiles every launch for an H100 and starts it with Triton's own C, on a fake driver
(`bench/fake_cuda.py`). It writes its results for test_launch_path.py:

    python tests/support/launch_worker.py results.json [case …]

Each launch runs three times: by the package's launcher, by the launcher again, which then starts a binary it knows,
and by Triton. All three must give the driver the same binary, grid and parameters. The parameters must be those of the
call, one by one, and fit the binary's specialisation. Then the whole function is recorded and repeated
(`launching/replay.py`). The repetition must give the driver the same launches, except for the addresses of the tensors
that it allocates. Nothing runs the binaries, so the process empties the bodies of their PTX and skips `ptxas`.
"""

import contextlib
import importlib
import inspect
import itertools
import json
import pkgutil
import re
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import llvm
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import fake_cuda
from dpb_triton import bias_attention, bias_attention_paged, bias_attention_varlen, expand_bias
from dpb_triton.attention import kernels
from dpb_triton.attention.kernels import backward as attention_backward
from dpb_triton.attention.kernels import blocks
from dpb_triton.attention.kernels import forward as attention_forward
from dpb_triton.launching import launch as launching
from dpb_triton.launching import replay

PTX = {"*": fake_cuda.POINTER, "i32": "u32", "i64": "u64", "fp32": "f32"}
EMPTIED = re.compile(r"^(define ptx_kernel void .*\{\n)(?:.*\n)*?\}\n", re.M)
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def same_bits(value, given):
    """Whether the driver got this argument."""
    if isinstance(value, torch.Tensor):
        return given == value.data_ptr()
    if isinstance(value, float):
        return given == torch.tensor(value, dtype=torch.float32).item()
    return given == (value or 0)


def check_map(descriptor, given):
    """Assert that the driver got this descriptor: its map, then its sizes and strides."""
    (kind, found), rank = next(given), len(descriptor.shape)
    assert kind == fake_cuda.MAP and found.address == descriptor.base.data_ptr()
    assert found.kind[1] == rank and found.kind[5] == (descriptor.padding == "nan")
    assert found.sizes == (*descriptor.shape[::-1],)
    assert found.strides == (*(n * descriptor.base.element_size() for n in descriptor.strides[-2::-1]),)
    inner, *outer = found.box  # rows of more than 128 bytes are read in pieces
    assert 0 < inner <= descriptor.block_shape[-1] and outer == descriptor.block_shape[-2::-1]
    for ptx, values in (("u32", descriptor.shape), ("u64", descriptor.strides)):
        for value in values:
            assert next(given) == (ptx, value)


def place_in_memory(value):
    """The address in a pointer or a descriptor; other values unchanged."""
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def leaves(names, values):
    """(name, place, value) of all values; a tuple's values have name.field and (place of the tuple, place in it)."""
    for place, (name, value) in enumerate(zip(names, values, strict=False)):
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            for at, (field, part) in enumerate(zip(fields, value, strict=False)):
                yield f"{name}.{field}", (place, at), part
        else:
            yield name, (place,), value


def kind_of(signature, name):
    """Triton's type of the argument with this name."""
    name, _, field = name.partition(".")
    return getattr(signature[name], field) if field else signature[name]


def check(kernel, grid, args, constants, compiled, launch):
    """Assert that `launch` matches the call, and that `compiled` may take it."""
    bound = inspect.signature(kernel.fn).bind(
        *args, **{name: value for name, value in constants.items() if name not in OPTIONS}
    )
    signature, attributes = compiled.src.signature, compiled.src.attrs
    for place, param in enumerate(kernel.params):
        if param.is_constexpr:
            value = bound.arguments[param.name]
            assert signature[param.name] == "constexpr" and compiled.src.constants[place,] == value, param.name
    given = iter(zip(launch.types, launch.values, strict=True))
    for name, place, value in leaves(kernel.arg_names, args):
        param, kind = kernel.params[place[0]], kind_of(signature, name)
        if isinstance(value, TensorDescriptor):
            assert kind == triton.runtime.jit.mangle_type(value) and kind.startswith("tensordesc<"), f"{name}: {kind}"
            check_map(value, given)
            continue
        wanted = (torch.Tensor, type(None)) if is_pointer(name) else float if is_float(name) else int
        assert isinstance(value, wanted) and not isinstance(value, bool), f"{name}: {value!r} is not {wanted}"
        if kind == "constexpr":
            is_special = "." in name or not param.do_not_specialize
            assert value is None or (value == 1 and is_special), f"{name}: {value!r} is a constant"
            continue
        ptx, bits = next(given)
        assert ptx == PTX["*" if kind[0] == "*" else kind], f"{name}: {kind} is {ptx} in the kernel"
        assert same_bits(value, bits), f"{name}: {value!r} arrives as {bits!r}"
        if kind[0] == "*":
            pointed = kind.removeprefix("*")
            assert pointed == triton.runtime.jit.mangle_type(value).removeprefix("*"), f"{name}: {kind}"
        for attribute, number in attributes.get(place, ()):
            assert attribute == "tt.divisibility" and bits % number == 0, f"{name}: {bits} breaks {attribute} {number}"
    assert [value for _, value in given] == [0, 0], "the rest is the device's scratch memory, none here"
    assert launch.grid == (*grid, 1, 1)[:3]
    assert prod(launch.grid) < 2**31, "Triton's C multiplies the grid in an int, and launches nothing if that overflows"
    assert launch.threads == 32 * constants.get("num_warps", 4) == 32 * compiled.metadata.num_warps
    assert constants.get("num_stages", compiled.metadata.num_stages) == compiled.metadata.num_stages
    assert launch.shared == compiled.metadata.shared <= fake_cuda.SHARED_BYTES


def is_pointer(name):
    return name.endswith("_ptr") or name.startswith(("inputs.", "outputs.", "gradients.", "read.", "partial."))


def is_float(name):
    return name == "scale" or name.startswith("scores.")


# torch operators that a repeated function may call: none of them writes
HARMLESS = {"empty", "empty_strided", "detach", "transpose", "view", "slice", "select", "to", "contiguous"}


class Operators(TorchDispatchMode):
    """Collects the names of the torch operators that run inside it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@dataclass
class Watch:
    """Replaces the kernels' `launch` and the repeated functions, and checks each launch."""

    fake: fake_cuda.FakeCuda
    change: object = None  # breaks the forward kernel's launch on purpose
    expected: dict = field(default_factory=dict)  # {parameter: value} by name
    launched: list = field(default_factory=list)
    repeated: list = field(default_factory=list)  # (function, whether it was repeated)
    functions: set = field(default_factory=set)  # the launched binaries
    named: set = field(default_factory=set)  # (kernel, parameter) of each value that was in `expected`
    ordinary: int = 0  # launches that the launcher left to Triton
    is_checking: bool = True
    asked: int = 0  # launches that the function bodies requested

    def __call__(self, kernel, grid, *args, **constants):
        self.asked += 1
        if not self.is_checking:
            return replay.launch(kernel, grid, *args, **constants)
        if self.change and kernel.__name__ == "_forward_kernel":
            args, constants = self.change(kernel.arg_names, list(args), constants)
        self.fake.take()
        replay.launch(kernel, grid, *args, **constants)
        before = self.ordinary
        compiled = replay.launch(kernel, grid, *args, **constants)
        assert self.ordinary == before, f"{kernel}: the launcher did not recognise a known launch"
        theirs = kernel[grid](*args, **constants)
        launches = self.fake.take()
        assert len(launches) == 3, f"{kernel}: {len(launches)} of 3 launches reached the driver"
        assert compiled is theirs, f"{kernel}: not Triton's binary for {args} {constants}"
        assert launches[0] == launches[1] == launches[2], f"{kernel}: {launches}"
        check(kernel, grid, args, constants, compiled, launches[0])
        values = {name: value for name, _, value in leaves([*kernel.arg_names], args)}
        values |= {name: value for name, _, value in leaves([*constants], constants.values())}
        for name in self.expected.keys() & values.keys():
            found = place_in_memory(values[name])
            assert found == self.expected[name], f"{kernel} {name}: {found}, not {self.expected[name]}"
            self.named.add((launches[0].kernel, name))
        self.launched.append(launches[0].kernel)
        self.functions.add(launches[0].function)
        return compiled

    def checked(self, function):
        """Replaces a repeated function: runs its body and checks each launch, then records it, then repeats it."""

        def call(*args, **options):
            if not self.is_checking:  # a function that calls itself
                return function(*args, **options)
            wanted = function.__wrapped__(*args, **options)
            self.is_checking = False
            try:
                replay.forget()
                function(*args, **options)
                self.fake.take()
                with Operators() as operators:
                    function(*args, **options)
                first, asked = self.fake.take(), self.asked
                result = function(*args, **options)
                second = self.fake.take()
            finally:
                self.is_checking = True
            is_repeated = self.asked == asked
            self.repeated.append((function.__name__, is_repeated))
            assert not is_repeated or operators.names <= HARMLESS, f"{function}: {operators.names}"
            inputs = {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
            compare(first, second, inputs)
            for one, other in zip(tensors(wanted), tensors(result), strict=True):
                assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            return result

        return call


def tensors(result):
    return (result,) if isinstance(result, torch.Tensor) else result


def compare(first, second, inputs):
    """Assert that a call and its repetition launch the same, except for the addresses of tensors that they allocate."""
    assert len(first) == len(second) > 0 or not inputs
    there = {}
    for one, other in zip(first, second, strict=True):
        for kind, value, again in zip(one.types, one.values, other.values, strict=True):
            if kind == fake_cuda.MAP:
                assert replace(value, address=0) == replace(again, address=0), (one, other)
                value, again = value.address, again.address
            if kind in (fake_cuda.POINTER, fake_cuda.MAP) and value not in inputs:
                assert there.setdefault(value, again) == again and again not in inputs, (one, other)
                assert value % 16 == again % 16
            else:
                assert value == again, (one, other)
        assert replace(one, values=()) == replace(other, values=())
    assert len(set(there.values())) == len(there)


def _compile_declarations_only():
    """No launch runs a kernel: PTX declares its parameters, the body is empty. That saves a quarter of the time."""
    make_ptx = CUDABackend.make_ptx

    def make_empty_ptx(self, source, *arguments):
        return make_ptx(self, EMPTIED.sub(r"\1  ret void\n}\n", source), *arguments)

    llvm.optimize_module = lambda *arguments, **options: None
    CUDABackend.make_ptx = make_empty_ptx
    CUDABackend.make_cubin = lambda self, ptx, metadata, options, capability: b"nothing"


def install():
    """Put a Watch in place of every `launch` and every repeated function of the package's kernels, and return it."""
    fake = fake_cuda.let_cpu_tensors_through()
    _compile_declarations_only()
    watch = Watch(fake)
    names = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    for module in map(importlib.import_module, (*names, "dpb_triton.expand.triton_kernels")):
        for name, value in list(vars(module).items()):
            if value is replay.launch:
                module.launch = watch
            elif callable(value) and getattr(value, "__wrapped__", None) and value.__module__ == module.__name__:
                setattr(module, name, watch.checked(value))

    getitem = JITFunction.__getitem__

    def counted(self, grid):
        watch.ordinary += 1
        return getitem(self, grid)

    JITFunction.__getitem__ = counted
    return watch


def draw(*shape, dtype, is_misaligned=False):
    """A tensor (batch, heads, length, dim) in memory (batch, length, heads, dim) that requires gradients."""
    batch, heads, length, dim = shape
    store = torch.randn(prod(shape) + 1).to(dtype)[is_misaligned : prod(shape) + is_misaligned]
    return store.view(batch, length, heads, dim).transpose(1, 2).requires_grad_()


# With these blocks the loops read by tensor descriptors wherever the inputs allow that.
DESCRIBED = {"forward": (64, 64, 4, 2, True), "dq": (64, 64, 4, 2, True), "dtable": (64, 64, 4, 3, True)}


@contextlib.contextmanager
def described(is_described=True):
    """Use descriptors, pointers, or (None) the choice of blocks.py."""
    rows = blocks.BLOCKS["hopper"]
    before = rows.copy()
    if is_described is not None:
        for name in [name for name in rows if name.endswith(" described")]:
            del rows[name]
    if is_described:
        rows.update({name: (row,) * 3 for name, row in DESCRIBED.items()})
    replay.forget()
    try:
        yield
    finally:
        rows.clear()
        rows.update(before)
        replay.forget()


def attention(watch, *, is_described=False, **options):
    with described(is_described):
        _attention(watch, **options)


def _attention(watch, *, batch=2, heads=4, kv_heads=4, i=96, j=96, head_dim=64, value_dim=None, dtype=torch.bfloat16,
              signed=False, is_misaligned=False, uses_lse=False, batch_stride=None, mask=None, **options):  # fmt: skip
    """Forward and backward with all gradients."""
    query = draw(batch, heads, i, head_dim, dtype=dtype, is_misaligned=is_misaligned)
    key = draw(batch, kv_heads, j, head_dim, dtype=dtype, is_misaligned=is_misaligned)
    value = draw(batch, kv_heads, j, value_dim or head_dim, dtype=dtype, is_misaligned=is_misaligned)
    if batch_stride:  # the batch is one, so nothing lies that far
        query = torch.as_strided(query, query.shape, (batch_stride, *query.stride()[1:]))
    n = max(i, j)
    table = torch.randn(heads, 2 * n - 1 if signed else n).requires_grad_()
    watch.expected = {"i": i, "j": j, "offset": j - i, "layout.heads": heads, "layout.group": heads // kv_heads}
    watch.expected |= {"batch": batch, "config.HEAD_DIM": head_dim, "config.VALUE_DIM": value_dim or head_dim}
    for letter, tensor in (("q", query), ("k", key), ("v", value)):
        for axis, dimension in (("b", 0), ("h", 1), ("y" if letter in "kv" else "x", 2)):
            is_copied = is_misaligned and tensor.shape[3] % 8 == 0  # rows of whole 16 bytes, not aligned to 16 bytes
            watch.expected[f"layout.{letter}{axis}"] = (tensor.contiguous() if is_copied else tensor).stride(dimension)
    if not is_misaligned:
        watch.expected |= {"query_ptr": query.data_ptr(), "key_ptr": key.data_ptr(), "value_ptr": value.data_ptr()}
    if mask is not None:
        mask = torch.zeros(batch, j, dtype=mask).requires_grad_(mask != torch.bool)
    out, lse = bias_attention(
        query, key, value, table, signed=signed, enable_gqa=heads != kv_heads, return_lse=True, backend="triton",
        key_padding_mask=mask, **options,
    )  # fmt: skip
    # a projection's gradient has out's layout
    grads = [torch.zeros_like(out), torch.zeros_like(lse)] if uses_lse else [torch.zeros_like(out)]
    inputs = (query, key, value, table, *((mask,) if mask is not None and mask.requires_grad else ()))
    torch.autograd.grad([out, lse] if uses_lse else [out], inputs, grads)
    watch.expected = {}


def packed(watch, *, heads=4, kv_heads=2, head_dim=64, mask=None, **options):
    """Three sequences, one of them empty."""
    lengths = torch.tensor([0, 70, 70, 133], dtype=torch.int32)
    query, key, value = (
        torch.randn(133, count, head_dim, dtype=torch.bfloat16).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    )
    table = torch.randn(heads, 80).requires_grad_()
    if mask is not None:
        options["key_padding_mask"] = torch.zeros(133, dtype=mask).requires_grad_(mask != torch.bool)
    out = bias_attention_varlen(
        query, key, value, table, lengths, lengths, enable_gqa=True, backend="triton", **options
    )  # fmt: skip
    out.backward(torch.zeros_like(out))


def paged(watch, *, heads=4, kv_heads=2, page=16):
    """A step of two sequences over a cache of ten pages."""
    query = torch.randn(2, heads, 1, 64, dtype=torch.bfloat16)
    pools = (torch.randn(10, page, kv_heads, 64, dtype=torch.bfloat16) for _ in range(2))
    pages, lengths = torch.arange(10, dtype=torch.int32).view(2, 5), torch.tensor([40, 70], dtype=torch.int32)
    table = torch.randn(heads, 5 * page)
    watch.expected = {"PAGE": page, "pages": 10, "layout.kb": page * kv_heads * 64, "layout.ky": kv_heads * 64}
    bias_attention_paged(query, *pools, table, pages, lengths, enable_gqa=True, backend="triton")
    watch.expected = {}


def expand(watch, *, i=100, j=128, signed=False, dtype=torch.float32, makes_columns=False):
    """Expand and reduce; with `makes_columns`, reduce gets a transposed tensor."""
    n = max(i, j)
    table = torch.randn(3, 2 * n - 1 if signed else n, dtype=dtype).requires_grad_()
    bias = expand_bias(table, i, j, offset=j - i, signed=signed, backend="triton")
    dbias = torch.randn(3, j, i, dtype=dtype).mT if makes_columns else torch.randn(3, i, j, dtype=dtype)
    bias.backward(dbias)


CASES = {
    "causal": (attention, {"is_causal": True}),
    "causal, other lengths": (attention, {"is_causal": True, "i": 65, "j": 97, "batch": 1}),
    "causal, a batch far apart": (attention, {"is_causal": True, "batch": 1, "batch_stride": 2**31 + 16}),
    "causal, copied": (attention, {"is_causal": True, "is_misaligned": True}),
    "causal, odd": (attention, {"is_causal": True, "head_dim": 36}),
    "causal, odd, misaligned": (attention, {"is_causal": True, "head_dim": 36, "is_misaligned": True}),
    "causal, odd, aligned again": (attention, {"is_causal": True, "head_dim": 36}),
    "full, grouped, lse used": (attention, {"kv_heads": 2, "uses_lse": True}),
    "causal, described": (attention, {"is_causal": True, "is_described": True}),
    "grouped, described": (attention, {"kv_heads": 2, "j": 130, "head_dim": 128, "is_described": True}),
    "softcap, described": (attention, {"softcap": 20.0, "dtype": torch.float16, "head_dim": 40, "is_described": True}),
    "key mask, described": (attention, {"mask": torch.bool, "window": (40, 8), "is_described": True}),
    "causal, as in blocks.py": (attention, {"is_causal": True, "is_described": None}),
    "copied, described": (attention, {"is_causal": True, "is_misaligned": True, "is_described": True}),
    "float32, described": (attention, {"is_causal": True, "dtype": torch.float32, "is_described": True}),
    "one key": (attention, {"i": 1, "j": 1}),
    "one query": (attention, {"i": 1, "j": 70, "batch": 1, "kv_heads": 1}),
    "window, signed": (attention, {"window": (40, 8), "signed": True, "i": 70, "j": 90}),
    # the dropout threshold needs 64 bits here, and 32 bits in the packed case
    "softcap, much dropout": (attention, {"is_causal": True, "softcap": 20.0, "dropout_p": 0.75}),
    "key mask": (attention, {"is_causal": True, "mask": torch.bool}),
    "added key mask": (attention, {"mask": torch.float32, "kv_heads": 2, "j": 130}),
    "packed, window, dropout": (packed, {"window": (30, 0), "dropout_p": 0.1}),
    "packed, key mask": (packed, {"is_causal": True, "mask": torch.float32}),
    "step": (attention, {"i": 1, "j": 200, "kv_heads": 1, "head_dim": 128}),
    "step, key mask": (attention, {"i": 1, "j": 201, "kv_heads": 2, "mask": torch.bool, "value_dim": 40}),
    "step, paged": (paged, {}),
    "step of a chunk": (attention, {"i": 16, "j": 200, "kv_heads": 1, "is_causal": True, "window": (100, 0)}),
    "head_dim 40": (attention, {"is_causal": True, "head_dim": 40}),
    "head_dim 128": (attention, {"is_causal": True, "head_dim": 128, "kv_heads": 1}),
    "head_dim 256, value_dim 32": (attention, {"is_causal": True, "head_dim": 256, "value_dim": 32}),
    "float32": (attention, {"is_causal": True, "dtype": torch.float32}),
    "expand": (expand, {}),
    "expand, bfloat16": (expand, {"dtype": torch.bfloat16}),
    "expand, ragged": (expand, {"i": 33, "j": 77, "signed": True}),
    "expand, one key": (expand, {"i": 1, "j": 1}),
    "expand, columns": (expand, {"makes_columns": True}),
}


class Inputs(NamedTuple):
    y: object
    z: object


class Layout(NamedTuple):
    stride: int
    other: int


@triton.jit(do_not_specialize=["plain"])
def _probe_kernel(x_ptr, inputs, layout, stride, plain, scale, WIDTH: tl.constexpr, IS_SET: tl.constexpr):
    value = scale + plain + layout.other
    if IS_SET:
        value += stride + layout.stride
    tl.store(x_ptr + tl.arange(0, WIDTH), value.to(x_ptr.dtype.element_ty))
    if inputs.y is not None:
        tl.store(inputs.y + tl.arange(0, WIDTH), value.to(inputs.y.dtype.element_ty))
    if inputs.z is not None:
        tl.store(inputs.z + tl.arange(0, WIDTH), value.to(inputs.z.dtype.element_ty))


def every_kind(watch):
    """Every property that a specialisation may depend on, one after another, and all of them again."""
    store = torch.zeros(64, dtype=torch.float32)
    tensors = (store[:16], store[1:17], store[4:20], store.to(torch.bfloat16)[:16])
    ints = (0, 1, 2, 15, 16, 48, -1, -16, 2**31 - 1, 2**31, 2**32, 2**40 + 1, -(2**31), -(2**31) - 1)
    usual = {
        "x": tensors[0],
        "inputs": Inputs(None, None),
        "layout": Layout(3, 3),
        "stride": 3,
        "plain": 3,
        "scale": 0.5,
    }
    usual |= {"WIDTH": 16, "IS_SET": True}
    others = {"x": tensors, "stride": ints, "plain": ints, "scale": (1.0, 2.5)}
    pairs = (
        [(None, tensor) for tensor in tensors] + [(tensor, None) for tensor in tensors] + [tensors[:2], tensors[1::-1]]
    )
    others |= {"inputs": [Inputs(*pair) for pair in pairs]}
    others |= {"layout": [Layout(number, 3) for number in ints] + [Layout(3, number) for number in ints]}
    others |= {"WIDTH": (16, 8), "IS_SET": (True, False, 1, 0), "num_warps": (1, 4), "num_stages": (2, 3)}
    kinds = [usual | {name: value} for name, values in others.items() for value in values]
    kinds += [usual | {"stride": a, "plain": b} for a, b in itertools.product((1, 16, 2**31), repeat=2)]
    for kind in (*kinds, *kinds):
        x, inputs, layout, stride, plain, scale, *_ = kind.values()
        constants = {name: value for name, value in kind.items() if name.isupper() or name.startswith("num_")}
        watch(_probe_kernel, (3, 2, 1), x, inputs, layout, stride, plain, scale, **constants)


@triton.jit
def _described_kernel(source, out_ptr, RANK: tl.constexpr, IS_READ: tl.constexpr):
    value = 1.0
    if IS_READ:
        tile = source.load([0, 0]) if RANK == 2 else source.load([0, 1, 0])
        value += tl.sum(tl.ravel(tile).to(tl.float32))
    tl.store(out_ptr, value)


def every_described_kind(watch):
    """Other dtypes and boxes make another kind; other paddings, sizes, strides and places do not."""
    store = torch.zeros(2**14 + 64)
    out = torch.zeros(16)

    def describe(dtype, shape, strides, box, padding="zero", first=0):
        return TensorDescriptor(store.view(dtype)[first:], shape, strides, box, padding)

    usual = torch.bfloat16, [64, 64], [64, 1], [16, 64]
    kinds = [
        (usual, {}),
        ((torch.float16, *usual[1:]), {}), ((torch.float32, *usual[1:]), {}), ((torch.int8, *usual[1:]), {}),
        ((*usual[:3], [32, 64]), {}), ((*usual[:3], [16, 32]), {}), ((*usual[:3], [64, 16]), {}),
        ((torch.bfloat16, [4, 16, 64], [1024, 64, 1], [1, 16, 64]), {}),
        (usual, {"padding": "nan"}), (usual, {"first": 64}),
        ((usual[0], [1, 48], [8, 1], usual[3]), {}), ((usual[0], [32, 16], [16, 1], usual[3]), {}),
    ]  # fmt: skip
    for _ in range(2):
        watch.functions.clear()
        for parts, more in kinds:
            for is_read in (True, False):
                made = describe(*parts, **more)
                watch(_described_kernel, (2, 1, 1), made, out, RANK=len(made.shape), IS_READ=is_read)
    boxes = {(parts[0], *parts[3]) for parts, _ in kinds}
    assert len(watch.functions) == 2 * len(boxes), watch.functions


def described_with_others(watch):
    """A repeated call with descriptors uses the pointers of its own tensors, and encodes their maps once."""
    watch.is_checking = False
    forward = importlib.reload(attention_forward).forward  # the originals, without the Watch
    backward = importlib.reload(attention_backward).backward

    def draw_all():
        """(arguments of forward, arguments of backward)."""
        query, key, value, dout = (draw(1, 4, 80, 64, dtype=torch.bfloat16).detach() for _ in range(4))
        table = torch.randn(4, 80)
        rest = None, None, 80, 80, 0, False, None, 0, 0.125, 0.0, 0.0
        first = query, key, value, table, None, *rest
        out, lse, state = forward.__wrapped__(*first)
        second = dout, torch.zeros_like(lse), query, key, value, table, None, out, state, *rest, False
        return first, (*second, True, True, True, False)

    def run(function, args):
        watch.fake.take()
        watch.fake.maps()
        function(*args)
        return watch.fake.take(), watch.fake.maps()

    with described():
        sets = [draw_all() for _ in range(4)]
        for which, function in enumerate((forward, backward)):
            for _ in range(2):
                function(*sets[0][which])
            asked = watch.asked
            run(function, sets[0][which])
            assert watch.asked == asked, f"{function}: the third call is not repeated"
            for number, maps in ((0, 0), (1, (2, 4)[which]), (1, 0), (2, (2, 4)[which])):
                args = sets[number][which]
                expected, n = run(function.__wrapped__, args)
                assert n == (4, 8)[which]  # forward and dq are launched twice
                asked = watch.asked
                found, n = run(function, args)
                assert watch.asked == asked and n == maps, f"{n} maps were encoded, not {maps}"
                compare(expected, found, {arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)})

        watch.fake.take()
        both = [threading.Thread(target=lambda args=args: [forward(*args) for _ in range(300)]) for args, _ in sets[:2]]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        launches = [launch for launch in watch.fake.take() if launch.kernel == "_forward_kernel"]
        assert len(launches) == 2 * 300 * 2
        wanted = {tuple(tensor.data_ptr() for tensor in args[:3]) for args, _ in sets[:2]}
        for launch in launches:
            maps = [value.address for value in launch.values if isinstance(value, fake_cuda.TensorMap)]
            assert (launch.values[0], *maps) in wanted, (launch, wanted)


def repeated_with_others(watch):
    """A call that was recorded with one tensor as key and value must tell them apart when they are two tensors.

    Hooks that listen to launches must also hear of launches that would be repeated.
    """
    forward = importlib.reload(attention_forward).forward  # the original, without the Watch
    watch.is_checking = False
    query, key, value = (torch.randn(1, 2, 16, 16) for _ in range(3))
    rest = torch.randn(2, 16), None, None, None, 16, 16, 0, False, None, 0, 0.25, 0.0, 0.0
    forward(query, key, key, *rest)
    forward(query, key, key, *rest)
    watch.fake.take()
    asked = watch.asked
    forward(query, key, value, *rest)
    launched = watch.fake.take()
    assert watch.asked == asked, "the call was not repeated"
    assert {query.data_ptr(), key.data_ptr(), value.data_ptr()} <= set(launched[-1].values)

    heard = []
    triton.knobs.runtime.launch_enter_hook.add(hear := lambda metadata: heard.append(metadata.get()["name"]))
    forward(query, key, value, *rest)
    triton.knobs.runtime.launch_enter_hook.remove(hear)
    assert heard == [launch.kernel for launch in launched] == [launch.kernel for launch in watch.fake.take()]


def dropped(names, args, constants):
    return args[:-1], constants


def too_many(names, args, constants):
    return [*args, 1], constants


def swapped_kinds(names, args, constants):
    """Swap the first pointer and the first int."""
    place = next(place for place, value in enumerate(args) if type(value) is int)
    return [args[place], *args[1:place], args[0], *args[place + 1 :]], constants


def _changed(names, args, name, change):
    """The arguments, with the tuple `name` replaced by `change` of it."""
    place = names.index(name)
    return [*args[:place], change(args[place]), *args[place + 1 :]]


def swapped_strides(names, args, constants):
    """Swap two ints: Triton sees nothing wrong."""
    return _changed(names, args, "layout", lambda old: old._replace(qh=old.qx, qx=old.qh)), constants


def too_short(names, args, constants):
    return _changed(names, args, "layout", lambda old: tuple(old)[:-1]), constants


def float_for_int(names, args, constants):
    return _changed(names, args, "layout", lambda old: old._replace(heads=float(old.heads))), constants


def int_for_float(names, args, constants):
    return _changed(names, args, "scores", lambda old: old._replace(scale=1)), constants


def no_constant(names, args, constants):
    return args, {name: value for name, value in constants.items() if name != "config"}


def renamed_constant(names, args, constants):
    return args, {name.replace("config", "settings"): value for name, value in constants.items()}


def dropped_descriptor(names, args, constants):
    return [*args[:1], *args[2:]], constants


def swapped_descriptors(names, args, constants):
    """Swap key and value, which are of one kind: Triton sees nothing wrong."""
    return [args[0], args[2], args[1], *args[3:]], constants


def described_too_much(names, args, constants):
    """Put a descriptor in place of a pointer."""
    shape = [*args[0].shape]
    return [TensorDescriptor(args[0], shape, [*args[0].stride()], [1, 1, 64, 64]), *args[1:]], constants


def described_too_little(names, args, constants):
    return [args[0], args[1].base, *args[2:]], constants


def another_box(names, args, constants):
    return [args[0], replace(args[1], block_shape=[1, 1, 32, 64]), *args[2:]], constants


DESCRIBED_BROKEN = (
    dropped_descriptor, swapped_descriptors, described_too_much, described_too_little, another_box,
)  # fmt: skip
BROKEN = (
    dropped, too_many, swapped_kinds, swapped_strides, too_short, float_for_int, int_for_float,
    no_constant, renamed_constant,
)  # fmt: skip


MAPS_BROKEN = {
    "another pointer's map": lambda self, pointers: self.encode(pointers[self.number - 1], *self.rest),
    "a moved map": lambda self, pointers: self.encode(pointers[self.number] + 16, *self.rest),
    "another map": lambda self, pointers: self.encode(pointers[self.number], *self.rest[:-1], 1),
    "no map": lambda self, pointers: pointers[self.number],
}
encode_map = replay._Map.of
STALE = {
    "the first map": lambda self, pointers: self.last[1] or encode_map(self, pointers),
    "never the last map": lambda self, pointers: self.encode(pointers[self.number], *self.rest),
}


def blind(binding):
    """A _Binding that sees no descriptor."""
    binding.descriptors = []
    return binding


def fails(run):
    """The traceback of the error, None if there was none."""
    try:
        run()
    except Exception as error:
        return "".join(traceback.format_exception(error))[-3000:]
    return None


def main(path, *cases):
    torch.set_num_threads(1)
    watch = install()
    results = {"triton": triton.__version__, "is_tried": launching.IS_TRIED, "cases": {}, "broken": {}}
    kinds = {"every kind": (every_kind, {}), "every described kind": (every_described_kind, {})}
    for name, (function, options) in {**kinds, **CASES}.items():
        if name not in cases and name in CASES:
            continue
        began = time.perf_counter()
        watch.launched.clear()
        watch.repeated.clear()
        error = fails(lambda function=function, options=options: function(watch, **options))
        results["cases"][name] = {
            "error": error, "launched": sorted(set(watch.launched)), "repeated": watch.repeated.copy(),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
    results["named"] = sorted(watch.named)
    for change in BROKEN:
        watch.change = change
        results["broken"][change.__name__] = fails(lambda: attention(watch, is_causal=True))
    for change in DESCRIBED_BROKEN:
        watch.change = change
        results["broken"][change.__name__] = fails(lambda: attention(watch, is_causal=True, is_described=True))
    watch.change = None
    for name, swap in MAPS_BROKEN.items():
        with mock.patch.object(replay._Map, "of", swap):
            results["broken"][name] = fails(lambda: attention(watch, is_causal=True, is_described=True))
    bind = launching._bind
    with mock.patch.object(launching, "_bind", lambda *args: blind(bind(*args))):
        launching._bindings.clear()
        results["broken"]["all descriptors alike"] = fails(lambda: every_described_kind(watch))
    launching._bindings.clear()
    with mock.patch.object(replay, "_expanded", return_value=None):  # as in a Triton with another launcher
        watch.repeated.clear()
        results["unknown launcher"] = fails(lambda: attention(watch, is_causal=True, is_described=True))
        results["unknown launcher repeated"] = watch.repeated.copy()
    fill = launching.Pointed.fill
    launching.Pointed.fill = lambda self, arguments, pointers: fill(self, arguments, pointers[::-1])
    results["broken"]["pointers"] = fails(lambda: attention(watch, is_causal=True))
    launching.Pointed.fill = fill
    launching.INT32 = 2**62  # a launcher that cannot tell 32 bits from 64
    launching._bindings.clear()
    results["broken"]["the launcher"] = fails(lambda: every_kind(watch))
    results["repeated"] = fails(lambda: repeated_with_others(watch))
    results["described"] = fails(lambda: described_with_others(watch))
    for name, stale in STALE.items():
        with mock.patch.object(replay._Map, "of", stale):
            results["broken"][name] = fails(lambda: described_with_others(watch))
    Path(path).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
