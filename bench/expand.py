# SPDX-License-Identifier: MIT
"""`python -m bench expand`: the position bias, forward and backward, against every peer and the machine's limit.

Each cell is checked against float64 before it is timed. Speeds are ratios to calls timed in the same rounds: `x eager`,
and the share of a limit. A limit only moves the bytes: forward fills a fresh tensor (on a CPU also: clones one),
backward sums the gradient.
"""

import copy
from dataclasses import dataclass
from functools import cached_property, partial

import click
import torch

from dpb_triton import ReduceBias, reference
from dpb_triton.dispatch import BACKENDS, SUFFIXES

from .cells import run
from .environment import describe, one_line
from .options import DTYPES, shared_options
from .providers import EAGER, PEERS, modules, providers

DEFAULT_SEQS = {"cpu": (1023, 2048), "cuda": (1024, 2047, 2048, 4095, 4096, 8191, 8192, 16383, 16384)}
DIM = 64  # of the module's MLP


@dataclass(frozen=True)
class Shape:
    """One row group of the report."""

    dtype: str
    heads: int
    n: int


class Cells:
    """The calls of one shape and their checks. `cells.py` describes the methods."""

    DIRECTIONS = ("forward", "backward", "module")

    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        self.exact = {}

    @cached_property
    def table(self):
        """(heads, n)."""
        generator = torch.Generator().manual_seed(self.shape.n)
        table = torch.randn(self.shape.heads, self.shape.n, generator=generator)
        return table.to(self.device, DTYPES[self.shape.dtype]).requires_grad_()

    @cached_property
    def dbias(self):
        """(heads, n, n)."""
        size = (self.shape.heads, self.shape.n, self.shape.n)
        return torch.empty(size, dtype=DTYPES[self.shape.dtype], device=self.device).normal_()

    @cached_property
    def modules(self):
        """Eager's module and ours, with the same weights."""
        return modules(self.shape.heads, DIM, self.device)

    def forward(self, provider):
        """expand(table) without autograd, as in inference."""

        def call():
            with torch.no_grad():
                return provider.expand(self.table, self.shape.n)

        return call

    def backward(self, provider):
        """The gradient of the table; the autograd graph is made once."""
        bias = provider.expand(self.table, self.shape.n)
        return partial(torch.autograd.grad, bias, self.table, self.dbias, retain_graph=True)

    def module(self, provider):
        """Forward and backward of the whole module with its MLP; the gradient has the dtype of the bias."""
        module = self.modules[provider.backend is not None]
        dtype = DTYPES[self.shape.dtype]
        autocast = partial(torch.autocast, self.device, dtype, enabled=dtype != torch.float32)

        def call():
            module.zero_grad()
            with autocast():
                bias = provider.forward(module, self.shape.n)
            bias.backward(self.dbias)
            return module.mlp[0].weight.grad

        return call

    def serves(self, direction, provider):
        return True

    def facts(self, direction, provider):
        return {}

    def call(self, direction, provider):
        return getattr(self, direction)(provider)

    def frozen(self, provider):
        return None

    def replayed(self, direction, provider):
        """A CUDA graph captures the operator alone: autograd would run on the stream of its forward."""
        if direction == "module" or provider.backend is None:
            return None
        if direction == "forward":
            return self.forward(provider)
        suffix = SUFFIXES[provider.backend]
        return partial(ReduceBias.apply, self.dbias, self.shape.n, 0, False, self.dbias.dtype, suffix)

    def limits(self, direction):
        """Calls that only move the bytes."""
        fresh = partial(torch.empty_like, self.dbias)
        forward = {"fill": lambda: fresh().fill_(1.0)}
        if self.device == "cpu":
            forward["clone"] = self.dbias.clone
        return {"forward": forward, "backward": {"sum": self.dbias.sum}, "module": {}}[direction]

    def rate(self, direction, milliseconds):
        if direction == "module":
            return {}
        gigabytes = self.shape.heads * self.shape.n**2 * DTYPES[self.shape.dtype].itemsize / 1e9
        return {"gb_s": gigabytes / milliseconds * 1e3}

    def wrong(self, direction, provider):
        """None if the provider's result is within the error budget, else what is wrong.

        The budget: |result - exact| <= 2 (|eager at this precision - exact| + eps scale), with `exact` in float64. The
        scale is max|exact|. For the module it is the largest sum of |addends| of a weight's gradient: the addends
        cancel, so both errors are many eps max|exact|, and one may be several times the other.
        """
        n, dtype = self.shape.n, DTYPES[self.shape.dtype]
        eps = torch.finfo(dtype).eps
        if direction == "forward":
            bias = self.forward(provider)()
            index = reference.distance(n, n, 0, self.device).abs()
            heads = zip(bias, self.table.detach(), strict=True)  # head by head: a whole float64 bias may not fit
            error = max((ours.double() - table.double()[index]).abs().max().item() for ours, table in heads)
            budget = 0.0  # the forward only copies
        else:
            actual = self.backward(provider)()[0] if direction == "backward" else self.module(provider)().clone()
            exact, eager, scale = self._exact(direction)
            error = (actual.double() - exact).abs().max().item()
            budget = 2 * ((eager.double() - exact).abs().max().item() + eps * scale)
        if not error <= budget:
            return f"off by {error:.3g}, budget {budget:.3g}"
        return None

    def _exact(self, direction):
        """(the gradient in float64, eager's gradient at this precision, the scale of their errors)."""
        if direction not in self.exact:
            n = self.shape.n
            if direction == "backward":
                heads = [reference.reduce(head[None].double(), n) for head in self.dbias]
                exact = torch.cat(heads)
                (eager,) = self.backward(EAGER)()
                scale = exact.abs().max()
            else:
                module = copy.deepcopy(self.modules[True]).double()
                gradients = []
                module.mlp[0].register_forward_hook(lambda *call: call[-1].register_hook(gradients.append) and None)
                module.table(n).backward(self._exact("backward")[0])
                exact = module.mlp[0].weight.grad
                eager = self.module(EAGER)().clone()
                distances = torch.arange(n, device=exact.device)[:, None]
                scale = (gradients[0].abs() * distances).sum(0).max()
            self.exact[direction] = exact, eager, scale.item()
        return self.exact[direction]


@click.command()
@shared_options(PEERS, PEERS, BACKENDS, {"cpu": 8, "cuda": 8},
                "1023, 2048 on a CPU, 1024 to 16384 with odd ones on a GPU")  # fmt: skip
def expand(common):
    """Time the bias and its gradient against eager, compiled eager and the limit of this machine."""
    environment = describe(common.device)
    click.echo(one_line(environment))
    found, absent = providers(common.device, common.peers, common.backends)
    lengths = common.seqs or DEFAULT_SEQS[common.device]
    shapes = [Shape(dtype, common.heads, n) for dtype in common.dtypes for n in lengths]
    run(Cells, shapes, found, {"bench": "expand", "environment": environment, "absent": absent}, common)
