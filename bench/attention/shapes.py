# SPDX-License-Identifier: MIT
"""The shapes of the attention bench, which keys a query sees, and the tensors of a shape.

causal    key y <= query x
full      every key
window    `window` keys on either side of the query, and its own key
padded    causal, and each sequence of the batch ends at a random length: no query sees the keys after it
"""

from dataclasses import dataclass

import torch

from ..options import DTYPES

MASKS = ("causal", "full", "window", "padded")
# The options that --cell stands for. An option on the command line replaces its part.
CELLS = {
    # flash-bias-attn published for a GH200: forward 64.4 ms, backward 97.3 ms with a frozen table and 193.5 ms with a
    # trained one; 749 ms a step for its Triton version, 9,386 ms for FlexAttention with a trained table
    "window": {"dtypes": ("bf16",), "batch": 600, "heads": 8, "head_dim": 16, "seqs": (4600,), "masks": ("window",),
               "window": 128},
    # the cells that `AIMS` in cells.py speaks of
    "cpu": {"dtypes": ("fp32", "bf16"), "batch": 1, "heads": 8, "head_dim": 64, "masks": ("causal", "full"),
            "seqs": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
            "peers": ("eager", "compiled eager", "sdpa with bias")},
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One row group of the report."""

    dtype: str
    batch: int
    heads: int
    n: int
    head_dim: int
    mask: str
    window: int | None = None  # keys on either side, for mask "window"

    @property
    def scores_mib(self):
        """MiB of one float32 tensor (batch, heads, n, n)."""
        return self.batch * self.heads * self.n**2 * 4 / 2**20

    def pairs(self, distinct):
        """Pairs of a query and a key that it sees, in the whole batch."""
        n = self.n
        if self.mask == "full":
            each = n * n
        elif self.mask == "window":
            each = sum(min(n - 1, x + self.window) - max(0, x - self.window) + 1 for x in range(n))
        else:
            each = sum(range(1, n + 1))
        if self.mask == "padded":
            cut = sum(max(0, x + 1 - length) for length in lengths(self, distinct) for x in range(n))
            each -= cut / distinct
        return self.batch * self.heads * each


@dataclass(frozen=True, eq=False)
class Seen:
    """Which keys a query sees."""

    is_causal: bool = False
    window: int | None = None
    padding: torch.Tensor | None = None  # (batch, n) bool, True for a key that no query sees

    def options(self, entries=slice(None)):
        """The arguments of `bias_attention` and `reference.attention` for these entries of the batch."""
        return {
            "is_causal": self.is_causal,
            "window": None if self.window is None else (self.window, self.window),
            "key_padding_mask": None if self.padding is None else self.padding[entries],
        }

    def is_seen(self, distance):
        """Bool tensor like `distance`, which is the signed x - y of pairs. Ignores the padding."""
        if self.window is not None:
            return distance.abs() <= self.window
        return distance >= 0 if self.is_causal else torch.ones_like(distance, dtype=torch.bool)


def lengths(shape, distinct):
    """The lengths of the sequences with mask "padded", one for each distinct entry: from half of n to n."""
    generator = torch.Generator().manual_seed(shape.n)
    return torch.randint((shape.n + 1) // 2, shape.n + 1, (distinct,), generator=generator).tolist()


def seen_of(shape, distinct, device):
    """The Seen of a shape."""
    padding = None
    if shape.mask == "padded":
        ends = torch.tensor(lengths(shape, distinct), device=device)
        padding = (torch.arange(shape.n, device=device) >= ends[:, None]).repeat(shape.batch // distinct, 1)
    return Seen(shape.mask in ("causal", "padded"), shape.window if shape.mask == "window" else None, padding)


def inputs(shape, device, distinct=None):
    """query, key, value, table and the gradient of the output.

    The batch repeats its first `distinct` entries (default: all). Only these need a reference, and the whole batch is
    checked against it.
    """
    torch.manual_seed(shape.n)
    distinct = distinct or shape.batch
    dtype, copies = DTYPES[shape.dtype], shape.batch // distinct

    def random():
        size = (distinct, shape.heads, shape.n, shape.head_dim)
        return torch.randn(size, dtype=dtype, device=device).repeat(copies, 1, 1, 1)

    query, key, value = (random().requires_grad_() for _ in range(3))
    table = torch.randn((shape.heads, shape.n), device=device).requires_grad_()
    return query, key, value, table, random()
