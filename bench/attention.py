# SPDX-License-Identifier: MIT
"""`python -m bench attention`: attention with a trained position bias, forward and training, against every peer.

Each cell is checked against float64 before it is timed. Every speed is quoted next to one measured in the same rounds:
`x eager`, and the share of the limit, which is scaled_dot_product_attention without any bias. With `--memory` the
peak memory of training over the length is measured instead, and with it the longest sequence that fits.
"""

from functools import cached_property, partial

import click
import torch

from dpb_triton import reference
from dpb_triton.attention import BACKENDS

from .attention_memory import measure_memory
from .attention_providers import NO_BIAS, PEERS, Shape, forward, inputs, providers, training
from .cells import run
from .environment import describe, one_line
from .options import DTYPES, shared_options

DEFAULT_SEQS = {"cpu": (512, 1024), "cuda": (2048, 4096, 8192, 16384)}
CHECK_BYTES = {"cpu": 2**26, "cuda": 2**29}  # of one float64 (batch, heads, rows, n) of the check
GRADIENTS = ("dq", "dk", "dv", "dtable")


class Cells:
    """The calls of one shape: what is timed, and whether it is right. `cells.py` says what each method is for."""

    DIRECTIONS = ("forward", "training")

    def __init__(self, shape, device):
        self.shape, self.device, self.is_causal = shape, device, shape.mask == "causal"
        self.expected = {}

    @cached_property
    def inputs(self):
        """query, key, value, table and the gradient of the output."""
        return inputs(self.shape, self.device)

    def serves(self, direction, provider):
        return direction in provider.directions

    def facts(self, direction, provider):
        if direction == "forward":
            return {}
        return {"gradients": "q k v table" if provider and provider.trains_table else "q k v"}

    def call(self, direction, provider):
        return partial({"forward": forward, "training": training}[direction], provider, *self.inputs, self.is_causal)

    def frozen(self, provider):
        return None

    def replayed(self, direction, provider):
        return self.call(direction, provider)

    def limits(self, direction):
        return {NO_BIAS.name: self.call(direction, NO_BIAS)}

    def rate(self, direction, milliseconds):
        """Of the products that FlashAttention does: two forward, five backward, half of each if causal."""
        if self.device == "cpu":
            return {}
        shape, products = self.shape, {"forward": 2, "training": 7}[direction]
        pairs = shape.batch * shape.heads * shape.n**2 / (2 if self.is_causal else 1)
        return {"tflop_s": products * 2 * pairs * shape.head_dim / milliseconds / 1e9}

    def wrong(self, direction, provider):
        """None if the provider's results are within the error budget, else what is wrong.

        |result - exact| <= 2 (|eager at that precision - exact| + eps max|exact|), exact in float64.
        """
        results = self.call(direction, provider)()
        named = {"out": results} if direction == "forward" else dict(zip(GRADIENTS, results, strict=False))
        eps = torch.finfo(DTYPES[self.shape.dtype]).eps
        for name, actual in named.items():
            exact, eager = self._exact()[name], self._eager()[name]
            error = (actual.double() - exact).abs().max().item()
            budget = 2 * ((eager.double() - exact).abs().max().item() + eps * exact.abs().max().item())
            if not error <= budget:
                return f"{name} off by {error:.3g}, budget {budget:.3g}"
        return None

    def _exact(self):
        return self._reference("exact", torch.float64, torch.float64)

    def _eager(self):
        return self._reference("eager", DTYPES[self.shape.dtype], torch.float32)

    def _reference(self, name, dtype, table_dtype):
        """The output and all gradients from the definition, in rows of queries: never all pairs at once."""
        if name not in self.expected:
            *qkv, table, dout = (tensor.detach() for tensor in self.inputs)
            query, key, value = (tensor.to(dtype) for tensor in qkv)
            leaves = [query, key, value, table.to(table_dtype)]
            for leaf in leaves:
                leaf.requires_grad_()
            out, sums = torch.empty_like(query), [torch.zeros_like(leaf, dtype=table_dtype) for leaf in leaves]
            pairs = self.shape.batch * self.shape.heads * self.shape.n * 8
            step = max(1, CHECK_BYTES[self.device] // pairs)
            for start in range(0, self.shape.n, step):
                rows = slice(start, start + step)
                part = reference.attention(
                    query[:, :, rows], key, value, leaves[3], offset=start, is_causal=self.is_causal
                )
                out[:, :, rows] = part.detach()
                for total, grad in zip(
                    sums, torch.autograd.grad(part, leaves, dout[:, :, rows].to(dtype)), strict=True
                ):
                    total += grad
            self.expected[name] = dict(zip(("out", *GRADIENTS), (out, *sums), strict=True))
        return self.expected[name]


@click.command()
@shared_options(tuple(PEERS), tuple(PEERS), BACKENDS, {"cpu": 8, "cuda": 16},
                "512, 1024 on a CPU, 2048 to 16384 on a GPU")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--head-dim", type=click.IntRange(1, 256), default=64, show_default=True)
@click.option("--mask", "masks", multiple=True, type=click.Choice(["causal", "full"]), default=("causal",),
              show_default=True)  # fmt: skip
@click.option("--memory", "budgets", multiple=True, type=click.IntRange(1), metavar="MIB",
              help="Instead: peak memory of training over the length, up to this much beyond the inputs.")  # fmt: skip
@click.option("--longest", type=click.IntRange(1), default=16384, show_default=True,
              help="With --memory: where to stop all the same.")  # fmt: skip
def attention(common, batch, head_dim, masks, budgets, longest):
    """Attention and all its gradients against eager, SDPA, FlexAttention and attention without a bias.

    On a GPU backend "torch", which serves it too, is measured only if a --backend asks for it; --smoke leaves
    FlexAttention, which compiles for long, out unless a --peer asks for it.
    """
    if budgets and "seqs" in common.asked:
        raise click.UsageError("--memory doubles the length by itself, up to --longest: it takes no --seq")
    if common.device == "cuda" and "backends" not in common.asked:
        common.backends = ("triton",)
    if common.smoke:
        longest = min(longest, 512)
        if "peers" not in common.asked:
            common.peers = [name for name in common.peers if not name.startswith("flex")]
    environment = describe(common.device)
    click.echo(one_line(environment))
    found, absent = providers(common.device, common.peers, common.backends)
    setting = f"batch {batch}, {common.heads} heads, head_dim {head_dim}"
    result = {"bench": "attention", "environment": environment, "setting": setting, "absent": absent}

    def shape(dtype, n, mask):
        return Shape(dtype, batch, common.heads, n, head_dim, mask)

    if budgets:
        makers = {(dtype, mask): partial(shape, dtype, mask=mask) for dtype in common.dtypes for mask in masks}
        measure_memory(makers, found, sorted(budgets), longest, result, common.device, common.path, common.picture)
        return
    lengths = common.seqs or DEFAULT_SEQS[common.device]
    shapes = [shape(dtype, n, mask) for dtype in common.dtypes for n in lengths for mask in masks]
    run(Cells, shapes, found, result, common)
