# SPDX-License-Identifier: MIT
"""The launches to compile: kernels, layouts, dtypes, GPUs.

To add a kernel, write a function that launches it on meta tensors and add an entry to OPS.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from . import attention

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
DEFAULT_DTYPES = ("bf16", "fp16", "fp32")
HEADS = 8


def launch_expand(dtype, *, i, j, signed=False, block=None):
    """Launch the expansion of a table to (i, j)."""
    import torch  # here, to keep torch and Triton out of the command's own process

    from dpb_triton.expand import triton_kernels as expand

    n = max(i, j)
    table = torch.empty((HEADS, 2 * n - 1 if signed else n), dtype=dtype, device="meta")
    expand.expand(table, i, j, j - i, signed, dtype, **_block(block))


def launch_reduce(dtype, *, i, j, signed=False, first_column=0, is_broadcast=False, block=None):
    """Launch the reduction of a gradient: a slice of a wider one, or one expanded number, as from `bias.sum()`."""
    import torch

    from dpb_triton.expand import triton_kernels as expand

    dbias = torch.empty((HEADS, i, first_column + j), dtype=dtype, device="meta")[:, :, first_column:]
    if is_broadcast:
        dbias = torch.empty((), dtype=dtype, device="meta").expand(HEADS, i, j)
    expand.reduce(dbias, max(i, j), j - i, signed, dtype, **_block(block))


def _block(block):
    return {"block_m": block[0], "block_n": block[1]} if block else {}


@dataclass(frozen=True)
class Layout:
    """A shape, or strides, for which Triton generates separate code."""

    options: dict  # of the launch function
    is_wide: bool = True  # its interior loop must have only 16-byte accesses
    is_common: bool = False  # compiled for every dtype; others only for the first dtype, unless --layout names them


@dataclass(frozen=True)
class Op:
    """A launcher and the kernels it starts."""

    launch: Callable
    layouts: dict[str, Layout]
    streams: dict[str, str]  # kernel -> the only kind of global access in its interior loop


_SHAPES = {
    "aligned": Layout({"i": 8192, "j": 8192}, is_common=True),
    "ragged": Layout({"i": 8191, "j": 8191}, is_common=True),
    "signed": Layout({"i": 8192, "j": 8191, "signed": True}),
    "one query": Layout({"i": 1, "j": 8192}),
    "one key": Layout({"i": 8192, "j": 1}),  # ints that are 1 become constants unless a kernel declines
    "one pair": Layout({"i": 1, "j": 1}),
    "huge": Layout({"i": 65536, "j": 65535}),  # strides and sizes beyond 32 bits
}
_STEP = {"head_dim": 128, "i": 1, "j": 8192, "is_causal": False}
_DECODING = {
    "step d128": Layout(_STEP, is_wide=False, is_common=True),
    "step d64": Layout(_STEP | {"head_dim": 64}, is_wide=False),
    "step d80": Layout(_STEP | {"head_dim": 80}, is_wide=False),
    "step d256": Layout(_STEP | {"head_dim": 256}, is_wide=False),
    "step gqa": Layout(_STEP | {"group": 8, "j": 8191}, is_wide=False),
    "step mask": Layout(_STEP | {"group": 8, "has_mask": True}, is_wide=False),
    "step varlen": Layout(_STEP | {"group": 8, "is_packed": True}, is_wide=False),
    "chunk": Layout(_STEP | {"i": 8, "group": 8, "is_causal": True, "window": 1000}, is_wide=False),
}
OPS = {
    "expand": Op(launch_expand, _SHAPES, {"_expand_kernel": "store"}),
    "reduce": Op(
        launch_reduce,
        _SHAPES
        | {
            "sliced": Layout({"i": 8192, "j": 8192, "first_column": 8}),
            "misaligned": Layout({"i": 8192, "j": 8184, "first_column": 1}),
            "broadcast": Layout({"i": 8192, "j": 8192, "is_broadcast": True}, is_wide=False),
        },
        {"_reduce_kernel": "load"},
    ),
    "attention": Op(attention.launch_forward, {}, {}),
    "attention backward": Op(attention.launch_backward, {}, {}),
    "paged": Op(
        attention.launch_paged,
        {
            "page 16": Layout({"head_dim": 128, "page": 16}, is_wide=False),
            "page 256": Layout({"head_dim": 128, "page": 256}, is_wide=False),
        },
        {},
    ),
    "decode": Op(attention.launch_forward, _DECODING, {}),  # with so few queries, forward takes another kernel
}
ATTENTION = ("attention", "attention backward")
HEAD_DIMS = (64, 128, 256, 32, 40, 72, 80, 96, 160, 192)
PAIRS = ((64, 128), (128, 64), (192, 128), (40, 80))  # head_dim and value_dim; (192, 128) is DeepSeek's


@dataclass(frozen=True)
class Case:
    """One launch to compile for one architecture."""

    op: str
    layout: str
    dtype: str
    arch: str
    options: dict = field(default_factory=dict, compare=False)
    is_wide: bool = True
    only: tuple = ()  # names of kernels; others are not compiled

    @property
    def family(self):
        """Cases of one family share kernels: one process compiles them."""
        return self.op, self.dtype, self.arch, self.options.get("head_dim"), self.options.get("value_dim")


def _layouts_of(op, names, shapes, block):
    """{name: Layout} of expand, reduce or decoding, limited to `names` if there are any.

    A layout of expand and reduce is a size, which `shapes` replaces; decoding's are options, as attention's, and each
    of them gets all `shapes`.
    """
    found = {name: layout for name, layout in OPS[op].layouts.items() if not names or name in names}
    if not OPS[op].streams:
        resized = {
            f"{name} {i} x {j}": replace(layout, options=layout.options | {"i": i, "j": j})
            for name, layout in found.items()
            for i, j in shapes
        }
        return resized or found
    if shapes:
        found = {f"{i} x {j}": Layout({"i": i, "j": j}, is_common=True) for i, j in shapes}
    if block:
        found = {
            name: replace(layout, options=layout.options | {"block": tuple(block)}) for name, layout in found.items()
        }
    return found


def cases(archs=ARCHS, dtypes=(), ops=tuple(OPS), layouts=(), shapes=(), block=None, **attention_options):
    """The matrix, limited by the arguments. `shapes`: pairs (i, j) to compile instead of the layouts."""
    found = []
    for op in ops:
        if op in ATTENTION:
            found += attention_cases(op, archs, dtypes, layouts, shapes, **attention_options)
            continue
        for name, layout in _layouts_of(op, layouts, shapes, block).items():
            some = dtypes or DEFAULT_DTYPES
            some = some if layout.is_common or layouts else some[:1]
            found += [Case(op, name, dtype, arch, layout.options, layout.is_wide) for dtype in some for arch in archs]
    return found


def _attention_matrix(is_full):
    """((head_dim, value_dim), option set, dtype, whether for every arch) of each launch.

    sm_90 is compiled in depth, other archs with the plain sets; without sm_90 they are compiled in depth too. The short
    matrix has every option set at two head_dims, and every pair of dims with one option set.
    """
    for head_dim in HEAD_DIMS:
        for name in attention.TRAINED:
            is_plain = head_dim in (64, 128, 256) and name in (("causal", "full") if is_full else ("causal",))
            if is_full or is_plain or name == "causal" or head_dim in (64, 128):
                yield (head_dim, head_dim), name, "bf16", is_plain or (head_dim, name) == (64, "mask")
    yield from ((dims, "causal", "bf16", False) for dims in PAIRS)
    yield from (((head_dim, head_dim), "3 heads", "bf16", False) for head_dim in (40, 72))
    yield (64, 64), "causal", "fp32", True
    yield (128, 128), "causal", "fp32", is_full
    yield (256, 256), "causal", "fp32", is_full
    if is_full:
        yield from (((d, d), name, "fp16", False) for d in HEAD_DIMS for name in ("causal", "full"))
        yield from (((d, d), "full", "fp32", True) for d in (64, 128, 256))


def attention_cases(op, archs, dtypes=(), layouts=(), shapes=(), *, head_dims=(), value_dims=(), options=(), tiles=None,
                    only=(), is_full=False):  # fmt: skip
    """The matrix, or what `head_dims`, `value_dims`, `options` (names) and `dtypes` ask for.

    tiles: {kernel: its constants}.
    """
    entries = [
        (dims, name, dtype, arch)
        for dims, name, dtype, is_for_all in _attention_matrix(is_full)
        for arch in archs
        if arch == "sm_90" or is_for_all or "sm_90" not in archs
    ]
    if head_dims or value_dims or options or dtypes:
        asked = [(d, v) for d in head_dims or (64, 128, 256) for v in value_dims or (d,)]
        entries = itertools.product(asked, options or ("causal",), dtypes or ("bf16",), archs)
    found = []
    for (head_dim, value_dim), name, dtype, arch in entries:
        widths = {"head_dim": head_dim} | ({"value_dim": value_dim} if value_dim != head_dim else {})
        layout = f"d{'v'.join(map(str, widths.values()))} {name}"
        if layouts and layout not in layouts:
            continue
        chosen = widths | attention.OPTIONS[name]
        chosen |= {"blocks": tiles} if tiles else {}
        sizes = {f"{layout} {i} x {j}": {"i": i, "j": j} for i, j in shapes} or {layout: {}}
        found += [Case(op, full, dtype, arch, chosen | size, False, tuple(only)) for full, size in sizes.items()]
    return found
