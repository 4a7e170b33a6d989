# SPDX-License-Identifier: MIT
"""The calls of one shape of attention and their checks."""

from functools import cached_property, partial

import torch

from dpb_triton import reference

from ..memory import free
from ..options import DTYPES
from .providers import SDPA, forward, limit_providers, training
from .shapes import inputs, seen_of

CHECK_BYTES = {"cpu": 2**26, "cuda": 2**29}  # of one float64 (batch, heads, rows, n) tensor in a check
CHECK_PAIRS = {"cpu": 2**27, "cuda": 2**32}  # of the entries with a reference: a second or two
CHECK_NUMBERS = {"cpu": 2**26, "cuda": 2**28}  # in their keys; keys, values and both gradients are held in float64
GRADIENTS = ("dq", "dk", "dv", "dtable")
DIRECTIONS = {"forward": forward, "training": training}
# On a CPU, for 256 to 8,192 tokens: the least speed over attention without a bias. From 64 tokens up, no peer with the
# bias should be faster.
AIMS = {"forward": 0.90, "training": 0.75}


class Cells:
    """The calls of one shape. `bench/cells.py` describes the methods."""

    DIRECTIONS = tuple(DIRECTIONS)

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        self.expected = {}

    @cached_property
    def distinct(self):
        """How many entries of the batch differ, a divisor of the batch: as many as the reference can afford."""
        shape = self.shape
        most = min(
            CHECK_PAIRS[self.device] // (shape.heads * shape.n**2),
            CHECK_NUMBERS[self.device] // (shape.heads * shape.n * shape.head_dim),
        )
        return max(d for d in range(1, shape.batch + 1) if shape.batch % d == 0 and d <= max(1, most))

    @cached_property
    def inputs(self):
        """query, key, value, table and the gradient of the output."""
        return inputs(self.shape, self.device, self.distinct)

    @cached_property
    def seen(self):
        """Which keys each query sees."""
        return seen_of(self.shape, self.distinct, self.device)

    def serves(self, direction, provider):
        return direction in provider.directions and self.shape.scores_mib <= provider.most_mib

    def facts(self, direction, provider):
        found = {}
        if direction == "training":
            found["gradients"] = "q k v table" if provider and provider.trains_table else "q k v"
        if provider and provider.backend and provider.trains_table and self._has_aim:
            found["aim"] = AIMS[direction] if 256 <= self.shape.n <= 8192 else 0.0
        return found

    @property
    def _has_aim(self):
        shape = self.shape
        return self.device == "cpu" and shape.n >= 64 and shape.mask in ("causal", "full") and shape.dtype != "fp16"

    def call(self, direction, provider):
        return partial(DIRECTIONS[direction], provider, *self.inputs, self.seen)

    def frozen(self, provider):
        return provider.frozen

    def replayed(self, direction, provider):
        """The call itself: its tensors do not move."""
        return self.call(direction, provider)

    def limits(self, direction):
        """Attention without a bias."""
        without_bias = limit_providers(self.device, self.shape.dtype)
        return {p.name: self.call(direction, p) for p in without_bias if self.serves(direction, p)}

    def rate(self, direction, milliseconds):
        """TFLOP/s of FlashAttention's products, 2 forward and 5 backward."""
        if self.device == "cpu":
            return {}
        products = {"forward": 2, "training": 7}[direction]
        return {"tflop_s": products * 2 * self.pairs * self.shape.head_dim / milliseconds / 1e9}

    @cached_property
    def pairs(self):
        """Pairs of a query and a key that it sees."""
        return self.shape.pairs(self.distinct)

    def wrong(self, direction, provider):
        """None if the provider's results are within the error budget, else what is wrong."""
        for name, (error, budget) in self.errors(direction, provider).items():
            if not error <= budget:
                return f"{name} off by {error:.3g}, budget {budget:.3g}"
        return None

    def errors(self, direction, provider):
        """{name: (error, budget)} of the output or of each gradient; the error is the largest distance from float64."""
        results = self.call(direction, provider)()
        named = {"out": results} if direction == "forward" else dict(zip(GRADIENTS, results, strict=False))
        return {name: (self._distance(name, actual), self._budget(name)) for name, actual in named.items()}

    def largest(self, name):
        """max|exact| of that result over the whole batch."""
        return self._times(name) * self._exact()[name].abs().max().item()

    def _times(self, name):
        """The reference covers the distinct entries only. The table's gradient sums over the whole batch."""
        return self.shape.batch // self.distinct if name == "dtable" else 1

    def _distance(self, name, actual):
        """max|actual - exact| over all entries of the batch; NaN if one of them is NaN."""
        exact = self._exact()[name]
        if name == "dtable":
            return (actual.double() - exact * self._times(name)).abs().max().item()
        parts = actual.split(len(exact))
        return torch.stack([(part.double() - exact).abs().max() for part in parts]).max().item()

    def _budget(self, name):
        """2 (error + eps max|exact|); `error` is a peer's error at this precision on the same inputs.

        The peer is the definition in eager torch. In float32 on a GPU there is a second peer, SDPA with the bias as its
        mask, and the larger error counts: eager uses cuBLAS' exact float32 products, and no fused kernel does. SDPA's
        EFFICIENT kernel splits float32 into three TF32 products on the tensor cores, as ours do. Its sums round in the
        same accumulator.
        """
        eps = torch.finfo(DTYPES[self.shape.dtype]).eps
        others = [self._times(name) * (self._eager()[name].double() - self._exact()[name]).abs().max().item()]
        others += [self._sdpa_errors()[name]] if name in self._sdpa_errors() else []
        return 2 * (max(others) + eps * self.largest(name))

    def _sdpa_errors(self):
        """{name: error} of SDPA with the bias; empty if it does not fit in memory, or does not count."""
        if self.device != "cuda" or self.shape.dtype != "fp32":
            return {}
        if "sdpa" not in self.expected:
            found = self.expected["sdpa"] = {}
            try:
                found["out"] = self._distance("out", self.call("forward", SDPA)())
                results = zip(GRADIENTS, self.call("training", SDPA)(), strict=True)
                found |= {name: self._distance(name, actual) for name, actual in results}
            except RuntimeError:  # out of memory, or the kernel refuses the shape: eager decides
                free(self.device)
        return self.expected["sdpa"]

    def _exact(self):
        return self._reference("exact", torch.float64, torch.float64)

    def _eager(self):
        return self._reference("eager", DTYPES[self.shape.dtype], torch.float32)

    def _reference(self, name, dtype, table_dtype):
        """The output and all gradients of the distinct entries, by rows of queries: all pairs may not fit."""
        if name not in self.expected:
            entries, n = slice(self.distinct), self.shape.n
            *qkv, table, dout = (tensor.detach() for tensor in self.inputs)
            leaves = [*(tensor[entries].to(dtype) for tensor in qkv), table.to(table_dtype)]
            for leaf in leaves:
                leaf.requires_grad_()
            query, key, value, table = leaves
            out, sums = torch.empty_like(query), [torch.zeros_like(x, dtype=table_dtype) for x in leaves]
            step = max(1, CHECK_BYTES[self.device] // (self.distinct * self.shape.heads * n * 8))
            for start in range(0, n, step):
                rows = slice(start, start + step)
                part = reference.attention(
                    query[:, :, rows], key, value, table, offset=start, **self.seen.options(entries)
                )
                out[:, :, rows] = part.detach()
                grads = torch.autograd.grad(part, leaves, dout[entries, :, rows].to(dtype))
                for total, grad in zip(sums, grads, strict=True):
                    total += grad
            self.expected[name] = dict(zip(("out", *GRADIENTS), (out.detach(), *sums), strict=True))
        return self.expected[name]
