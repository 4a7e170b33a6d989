# SPDX-License-Identifier: MIT
"""The oracle of attention: the definition row by row in float64 numpy, with its gradients and the dropout hash. Also
the inputs that tests draw, and the error budget that implementations must keep."""

import dataclasses
from contextlib import contextmanager

import numpy as np
import torch

NAMES = ("out", "lse", "dq", "dk", "dv", "dtable")  # and dmask with a floating mask


# The definition


@np.errstate(invalid="ignore", over="ignore")
def attention(query, key, value, table, dout, dlse=None, *, options, keep=None):
    """{name: (exact value, magnitude)} of the output, the lse and all gradients.

    The magnitude of an element is the sum of its terms' absolute values, times the condition of the exponential.
    Rounding errors are relative to the magnitude, also where the terms cancel.
    """
    query, key, value, table, dout = (_double(tensor) for tensor in (query, key, value, table, dout))
    batch, heads, i, head_dim = query.shape
    kv_heads, j = key.shape[1:3]
    offset = j - i if options.get("offset") is None else options["offset"]
    scale = head_dim**-0.5 if options.get("scale") is None else options["scale"]
    left, right = options.get("window") or (None, None)
    right = 0 if options.get("is_causal") else right
    signed, softcap, dropout_p = options.get("signed", False), options.get("softcap"), options.get("dropout_p", 0.0)
    mask = options.get("key_padding_mask")
    added = np.zeros((batch, j)) if mask is None or mask.dtype == torch.bool else _double(mask)
    hidden = mask.cpu().numpy() if mask is not None and mask.dtype == torch.bool else added == -np.inf
    n = (table.shape[1] + 1) // 2
    dlse = np.zeros((batch, heads, i)) if dlse is None else _double(dlse)

    exact = {
        "out": np.zeros((*query.shape[:3], value.shape[3])),
        "lse": np.full((batch, heads, i), -np.inf),
        "dq": np.zeros_like(query),
        "dk": np.zeros_like(key),
        "dv": np.zeros_like(value),
        "dtable": np.zeros_like(table),
        "dmask": np.zeros((batch, j)),
    }
    size = {name: np.zeros_like(tensor) for name, tensor in exact.items()}
    for b, h, x in np.ndindex(batch, heads, i):
        g = h // (heads // kv_heads)
        allowed = [
            y
            for y in range(j)
            if (left is None or y >= x + offset - left) and (right is None or y <= x + offset + right)
            if not hidden[b, y]
        ]
        distances = np.array([x + offset - y for y in allowed], dtype=np.int64)
        columns = distances + n - 1 if signed else abs(distances)
        assert not len(columns) or 0 <= columns.min() <= columns.max() < table.shape[1], "the table lacks a distance"
        q, k, v, grad = query[b, h, x], key[b, g, allowed], value[b, g, allowed], dout[b, h, x]
        t, slope = scale * (k @ q), 1.0
        if softcap is not None:
            t = softcap * np.tanh(t / softcap)
            slope = 1 - (t / softcap) ** 2
        s = t + table[h, columns] + added[b, allowed]
        if not len(s) or s.max() == -np.inf:
            continue  # a row without a key: 0, lse -inf, no gradient
        e = np.exp(s - s.max())  # NaN for a score of +Inf
        p = e / e.sum()
        inverse = 1.0 if keep is None else keep[b, h, x, allowed] / (1 - dropout_p)
        out = (p * inverse) @ v
        dp = inverse * (v @ grad)
        dx = dp - grad @ out + dlse[b, h, x]
        ds = p * dx
        dt = scale * slope * ds

        # Scores round relative to their own size. That moves a row's scores against each other, and so it moves p. But
        # a score of 1e30 takes all the weight, whatever its rounding.
        largest = abs(s[p > 0]).max(initial=0)
        top = largest if largest < 1e6 else 0.0
        moved = p * (1 + 2 * top * (1 - p))
        again = moved + p * min(top, 100)  # backward makes p from a rounded lse, which does not excuse an error at 1e30
        dp_size, delta_size = inverse * (abs(v) @ abs(grad)), (moved * inverse) @ (abs(v) @ abs(grad))
        ds_size = p * (dp_size + delta_size + abs(dlse[b, h, x])) + (again - p) * abs(dx)
        dt_size = abs(scale) * slope * ds_size

        exact["out"][b, h, x], size["out"][b, h, x] = out, (moved * inverse) @ abs(v)
        exact["lse"][b, h, x] = s.max() + np.log(e.sum())
        size["lse"][b, h, x] = largest + abs(scale) * (abs(k[p > 0]) @ abs(q)).max(initial=0)
        exact["dq"][b, h, x], size["dq"][b, h, x] = dt @ k, dt_size @ abs(k)
        exact["dk"][b, g, allowed] += np.outer(dt, q)
        size["dk"][b, g, allowed] += np.outer(dt_size, abs(q))
        exact["dv"][b, g, allowed] += np.outer(p * inverse, grad)
        size["dv"][b, g, allowed] += np.outer(again * inverse, abs(grad))
        np.add.at(exact["dtable"][h], columns, ds)
        np.add.at(size["dtable"][h], columns, ds_size)
        exact["dmask"][b, allowed] += ds
        size["dmask"][b, allowed] += ds_size
    names = (*NAMES, "dmask") if mask is not None and mask.is_floating_point() else NAMES
    return {name: (torch.from_numpy(exact[name]), torch.from_numpy(size[name])) for name in names}


def _double(tensor):
    return tensor.detach().double().cpu().numpy()


# The dropout's mask, in uint32


def _mix(h):
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    return h ^ (h >> np.uint32(16))


def seed_of(manual_seed, device):
    """The seed that a call of attention draws after torch.manual_seed."""
    torch.manual_seed(manual_seed)
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device).item()


def dropout_keep(seed, batch, heads, i, j, dropout_p, longest_query=None):
    """The mask of kept probabilities, boolean (batch, heads, i, j); it depends on the seed and the position alone."""
    rows = np.arange(batch * heads, dtype=np.uint64).reshape(batch, heads, 1)
    return kept_of_rows(seed, rows * np.uint64(longest_query or i) + np.arange(i, dtype=np.uint64), j, dropout_p)


def kept_of_rows(seed, rows, j, dropout_p):
    """The same, boolean (*rows.shape, j), for rows (batch element, head, query) of these numbers."""
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    rows = rows[..., None]
    row_low, row_high = rows.astype(np.uint32), (rows >> np.uint64(32)).astype(np.uint32)
    k1 = _mix(_mix(row_low ^ low) + high + row_high * np.uint32(0x9E3779B9))
    k2 = _mix(k1 ^ np.uint32(0x6A09E667))
    bits = _mix((np.arange(j, dtype=np.uint32) ^ k1) * np.uint32(0x9E3779B1) + k2)
    return bits >= np.uint32(min(round(dropout_p * 2**32), 2**32 - 1))


# Inputs

LAYOUTS = ("contiguous", "transposed", "packed", "sliced", "dim first", "broadcast")
TABLES = ("normal", "zero", "steep", "large", "masked", "all masked", "huge")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of attention: sizes, layouts, the kind of table, options; `draw` makes its tensors."""

    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    i: int = 21
    j: int = 37
    head_dim: int = 16
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    table: str = "normal"
    spare: int = 0  # columns of the table beyond the needed ones
    options: dict = dataclasses.field(default_factory=dict)
    has_dlse: bool = True
    seed: int = 0

    def draw(self, device="cpu"):
        """query, key, value, table, dout, dlse."""
        generator = torch.Generator().manual_seed(self.seed)
        accumulator = torch.float64 if self.dtype == torch.float64 else torch.float32
        value_dim = self.value_dim or self.head_dim
        kv_heads = self.kv_heads or self.heads
        shapes = [
            (self.batch, self.heads, self.i, self.head_dim),
            (self.batch, kv_heads, self.j, self.head_dim),
            (self.batch, kv_heads, self.j, value_dim),
        ]
        if self.layout == "packed" and self.i == self.j and self.head_dim == value_dim:
            heads = (self.heads, kv_heads, kv_heads)
            qkv = torch.randn(self.batch, self.i, sum(heads), self.head_dim, generator=generator)
            tensors = [x.transpose(1, 2) for x in qkv.to(device, self.dtype).split(heads, 2)]
        else:
            tensors = [lay_out(shape, self.layout, generator, self.dtype, device) for shape in shapes]
        table = draw_table(self, generator, accumulator)
        if self.layout == "sliced":  # a column of NaN on both sides
            table = torch.nn.functional.pad(table, (1, 1), value=torch.nan)[:, 1:-1]
        dout = lay_out((*shapes[0][:3], value_dim), self.layout, generator, self.dtype, device)
        dlse = torch.randn(shapes[0][:3], generator=generator).to(device, accumulator) if self.has_dlse else None
        return *tensors, table.to(device), dout, dlse


# With conftest's `small_cuts`, plain torch meets every cut of these sizes more than once. Each sequence hides other
# keys: the first ones and a hole, the last ones, none.
CUT = {"batch": 3, "heads": 4, "kv_heads": 2, "i": 11, "j": 13, "head_dim": 5}
CUT_HIDDEN = torch.tensor([[x == "#" for x in row] for row in ("##..#........", ".........####", ".............")])


def lay_out(shape, layout, generator, dtype, device):
    """A random tensor (batch, heads, seq, dim) whose memory is in another order, or has NaN between its rows."""
    batch, heads, seq, dim = shape

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if layout == "contiguous":
        return randn(*shape)
    if layout in ("transposed", "packed"):
        return randn(batch, seq, heads, dim).transpose(1, 2)
    if layout == "dim first":
        return randn(batch, heads, dim, seq).mT
    if layout == "broadcast":
        return randn(1, heads, seq, dim).expand(shape)
    wide = torch.full((batch + 1, seq + 3, heads + 1, dim + 5), torch.nan, dtype=dtype, device=device)
    view = wide[1:, 2:-1, 1:, 3:-2].transpose(1, 2)
    return view.copy_(randn(*shape))


FAR = 1 << 26  # 34 rows reach beyond element 2^31
FARTHER = (1 << 30) + 8  # 3 rows do; twice this does not fit 32 bits, and this does


def far_apart(tensor, dim, stride=FAR):
    """The same numbers, with neighbours in dimension `dim` `stride` elements apart.

    Only the numbers' own pages are ever touched, so the machine never provides the memory between them.
    """
    memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty_far_apart(tensor.shape, dim, stride, memory).copy_(tensor)


def empty_far_apart(shape, dim, stride, like):
    """An uninitialised tensor for `far_apart`, with the dtype and device of `like`."""
    strides, size = [0] * len(shape), 1
    for k in reversed(range(len(shape))):
        if k != dim % len(shape):
            strides[k], size = size, size * shape[k]
    strides[dim] = stride
    return like.new_empty(stride * (shape[dim] - 1) + size).as_strided(shape, strides)


def draw_table(case, generator, dtype):
    offset = case.j - case.i if case.options.get("offset") is None else case.options["offset"]
    n = max(case.i + offset, case.j - offset, 1) + case.spare
    width = 2 * n - 1 if case.options.get("signed") else n
    noise = torch.randn(case.heads, width, generator=generator, dtype=dtype)
    pick = torch.rand(case.heads, width, generator=generator)
    if case.table == "normal":
        return noise
    if case.table == "zero":
        return torch.zeros_like(noise)
    if case.table == "steep":
        return noise - 0.5 * torch.arange(width)
    if case.table == "large":
        return torch.where(pick > 0.5, 1e4, -1e4) + noise
    if case.table == "masked":
        return torch.where(pick > 0.6, -torch.inf, noise)
    if case.table == "all masked":
        return torch.full_like(noise, -torch.inf)
    noise[:, pick[0].argmax()] = (1e30, 1.234567e20, 3e5)[case.seed % 3]
    return noise


# Comparison


@contextmanager
def poison():
    """torch.empty fills its memory with NaN, so that elements that a kernel forgets to write show."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def run(function, query, key, value, table, dout, dlse=None, **options):
    """{name: tensor} of `function`'s output, lse and all gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value, table)]
    inputs, names = list(leaves), NAMES
    mask = options.get("key_padding_mask")
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.detach().requires_grad_())
        options, names = options | {"key_padding_mask": leaves[-1]}, (*NAMES, "dmask")
    out, lse = function(*inputs, return_lse=True, **options)
    if dlse is None:
        out.backward(dout)
    else:
        torch.autograd.backward((out, lse), (dout, dlse))
    tensors = (out.detach(), lse.detach(), *(leaf.grad for leaf in leaves))
    return dict(zip(names, tensors, strict=True))


def assert_within_budget(actual, exact, eager, dtype, *, rounds_out=False):
    """|actual - exact| <= 2 (|eager - exact| + eps max|exact| + eps32 max|terms|), names as in NAMES.

    `eager` is the same call in plain torch at that precision; eps is the precision of the result. The last term is the
    rounding of accumulators, which is relative to the terms of the sums. It dominates where the terms cancel.
    `rounds_out`: backward takes rowsum(dout * out) from the rounded out, as in FlashAttention. That term has then the
    precision of `dtype`.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    failures = []
    for name, (reference, size) in exact.items():
        ours, theirs = actual[name].double().cpu(), eager[name].double().cpu()
        expected = accumulator if name in ("lse", "dtable", "dmask") else dtype
        assert actual[name].dtype == expected, f"{name} is {actual[name].dtype}"
        assert ours.shape == reference.shape, f"{name} has shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
        if name == "lse":
            dead = reference == -torch.inf
            assert torch.equal(ours == -torch.inf, dead), "lse: the rows without a key differ"
            ours, theirs, reference = (tensor.masked_fill(dead, 0) for tensor in (ours, theirs, reference))
        if not torch.isfinite(ours).all():
            failures.append(f"{name}: {(~torch.isfinite(ours)).sum()} of {ours.numel()} not finite")
        elif reference.numel():
            error, eager_error = (ours - reference).abs().max(), (theirs - reference).abs().max()
            terms = dtype if rounds_out and name in ("dq", "dk", "dtable", "dmask") else accumulator
            floor = torch.finfo(expected).eps * reference.abs().max() + torch.finfo(terms).eps * size.max()
            if error > 2 * (eager_error + floor):
                failures.append(f"{name}: error {error:.3g}, eager's {eager_error:.3g}, floor {floor:.3g}")
    assert not failures, "; ".join(failures)


def check(function, case, device="cpu", keep=None, **budget):
    """Compare `function` (bias_attention with its backend) with the definition on a case."""
    from dpb_triton import reference

    tensors = case.draw(device)
    options = dict(case.options)
    if case.kv_heads not in (None, case.heads):
        options["enable_gqa"] = True
    exact = attention(*tensors, options=options, keep=keep)
    mask = None if keep is None else torch.from_numpy(keep).to(device)
    eager = run(reference.attention, *tensors, keep=mask, **options)
    with poison():
        actual = run(function, *tensors, **options)
    assert_within_budget(actual, exact, eager, case.dtype, **budget)


def check_forward(function, tensors, dtype, **options):
    """Compare (out, lse) of query, key, value and table, without gradients, with the definition."""
    from dpb_triton import reference

    query, key, value, _ = tensors
    if query.shape[1] != key.shape[1]:
        options["enable_gqa"] = True
    options = {name: x.to(query.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    dout = torch.zeros(*query.shape[:3], value.shape[3], dtype=dtype)
    exact = attention(*tensors, dout, options=options)
    with torch.no_grad(), poison():
        ours, eager = (
            dict(zip(("out", "lse"), call(*tensors, return_lse=True, **options), strict=True))
            for call in (function, reference.attention)
        )
    assert_within_budget(ours, {name: exact[name] for name in ours}, eager, dtype)
    return ours["out"]
