# SPDX-License-Identifier: MIT
"""The step of one shape and its check."""

from dataclasses import dataclass
from functools import cached_property, partial

import torch

from dpb_triton import DynamicPositionBias, reference

from ..memory import free
from ..options import DTYPES
from .providers import SDPA, Step, limits_of

DIM = 64  # of the module's MLP


@dataclass(frozen=True)
class Shape:
    """One row group of the report."""

    dtype: str
    batch: int
    heads: int  # of the queries
    group: int  # query heads of a key head
    n: int  # keys
    head_dim: int
    queries: int

    @property
    def bytes(self):
        """Of keys and values together."""
        return 2 * self.batch * (self.heads // self.group) * self.n * self.head_dim * DTYPES[self.dtype].itemsize


def step_of(shape, device):
    """The Step of a shape, random except for the module's table, whose bias has a standard deviation of one."""
    torch.manual_seed(shape.n)
    dtype = DTYPES[shape.dtype]

    def random(heads, length):
        return torch.randn((shape.batch, heads, length, shape.head_dim), dtype=dtype, device=device)

    query = random(shape.heads, shape.queries)
    key, value = (random(shape.heads // shape.group, shape.n) for _ in range(2))
    module = DynamicPositionBias(DIM, shape.heads, log_distance=True).to(device).eval()
    with torch.no_grad():
        last = module.mlp[-1]
        last.weight /= module.table(shape.n).std(1, correction=0).clamp(min=1e-3)[:, None]
        table = module.table(shape.n)
    rows = reference.expand(table, shape.queries, shape.n, dtype=dtype)
    offset = shape.n - shape.queries
    rows = rows.masked_fill(reference.distance(shape.queries, shape.n, offset, device) < 0, -torch.inf)
    return Step(query, key, value, module, table, rows)


class Cells:
    """The calls of one shape. `bench/cells.py` describes the methods."""

    DIRECTIONS = ("step",)

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        self.expected = {}

    @cached_property
    def step(self):
        """The tensors."""
        return step_of(self.shape, self.device)

    def serves(self, direction, provider):
        return self.shape.group > 1 or not provider.is_grouped

    def facts(self, direction, provider):
        return {}

    def call(self, direction, provider):
        return partial(_without_gradients, provider.attend, self.step)

    def frozen(self, provider):
        return None

    def replayed(self, direction, provider):
        """None for a module: a CUDA graph would hold its MLP, because a kept table may be replaced by a longer one."""
        return None if provider.is_module else self.call(direction, provider)

    def limits(self, direction):
        """A step without a bias, and a copy that moves as many bytes as keys and values have.

        The copy goes to memory that is in use already: a CPU would spend most of a clone's time on new pages.
        """
        found = limits_of(self.device, self.shape.dtype, self.shape.group)
        calls = {name: partial(_without_gradients, attend, self.step) for name, attend in found.items()}
        return calls | {"copy": partial(torch.empty_like(self.step.key).copy_, self.step.key)}

    def rate(self, direction, milliseconds):
        """GB/s of reading keys and values once."""
        return {"gb_s": self.shape.bytes / milliseconds / 1e6}

    def wrong(self, direction, provider):
        """None if the step is within the error budget, else what is wrong.

        The budget: |out - exact| <= 2 (error + eps max|exact|); `error` is a peer's at this precision, on these inputs.
        The peer is the definition in eager torch, in float32 on a GPU also SDPA, whose products are on tensor cores as
        ours are; the larger error counts.
        """
        exact = self._exact
        error = _largest(self.call(direction, provider)() - exact)
        budget = 2 * (self._error_of_peers + torch.finfo(DTYPES[self.shape.dtype]).eps * _largest(exact))
        return None if error <= budget else f"off by {error:.3g}, budget {budget:.3g}"

    @cached_property
    def _exact(self):
        return self._definition(torch.float64, torch.float64)

    @cached_property
    def _error_of_peers(self):
        errors = [_largest(self._definition(DTYPES[self.shape.dtype], torch.float32) - self._exact)]
        if self.device == "cuda" and self.shape.dtype == "fp32":
            try:
                errors.append(_largest(self.call("step", SDPA)() - self._exact))
            except RuntimeError:  # out of memory, or no kernel takes the shape: eager decides
                free(self.device)
        return max(errors)

    def _definition(self, dtype, table_dtype):
        """The step by `reference.attention`, one key head at a time: keys and values may not fit in float64."""
        step, group = self.step, self.shape.group
        out = torch.empty_like(step.query, dtype=dtype)
        for entry in range(self.shape.batch):
            for head in range(self.shape.heads // group):
                one, rows = (slice(entry, entry + 1), slice(head, head + 1)), slice(head * group, (head + 1) * group)
                query, key, value = (x.to(dtype) for x in (step.query[one[0], rows], step.key[one], step.value[one]))
                table = step.table[rows].to(table_dtype)
                out[entry, rows] = reference.attention(query, key, value, table, is_causal=step.options["is_causal"])[0]
        return out


def _without_gradients(attend, step):
    """As in inference: with gradients the module keeps no table."""
    with torch.no_grad():
        return attend(step)


def _largest(x):
    """NaN if an element is."""
    return x.abs().max().item()
