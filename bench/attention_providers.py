# SPDX-License-Identifier: MIT
"""Who computes attention with a position bias from a table: eager, SDPA, FlexAttention, and this library's backends.

`attend(query, key, value, table, is_causal) -> out`, all (batch, heads, n, head_dim) but the float32 table (heads, n).
Who materialises the bias does it with this library's `expand_bias` (eager's own gather is what `python -m bench expand`
measures), and gets the causal mask for free, as -inf in the table at negative distances.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from dpb_triton import bias_attention, expand_bias

from .options import DTYPES
from .providers import why_not_measured


@dataclass(frozen=True)
class Provider:
    """One way to compute attention with the bias."""

    name: str
    attend: object
    directions: tuple = ("forward", "training")
    trains_table: bool = True
    backend: str | None = None  # of this library


def _bias(table, n, is_causal, dtype):
    """(heads, n, n), contiguous."""
    if is_causal:
        return expand_bias(pad(table, (n - 1, 0), value=-torch.inf), n, n, signed=True, dtype=dtype)
    return expand_bias(table, n, n, dtype=dtype)


def eager(query, key, value, table, is_causal):
    """Products in the inputs' dtype, logits and softmax in float32: `dpb_triton.reference.attention`, but faster."""
    s = (query @ key.mT).float() * query.shape[3] ** -0.5 + _bias(table, query.shape[2], is_causal, table.dtype)
    return s.softmax(-1).to(value.dtype) @ value


def sdpa_with_bias(query, key, value, table, is_causal):
    """On CUDA the EFFICIENT kernel, the only one that returns the bias's gradient; it wants query's dtype."""
    bias = _bias(table, query.shape[2], is_causal, query.dtype)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if query.is_cuda else nullcontext():
        return scaled_dot_product_attention(query, key, value, attn_mask=bias[None].expand(query.shape[0], -1, -1, -1))


def sdpa_without_bias(query, key, value, table, is_causal):
    """The limit: no bias at all; FlashAttention where there is one."""
    flash = SDPBackend.EFFICIENT_ATTENTION if query.dtype == torch.float32 else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(flash) if query.is_cuda else nullcontext():
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal)


@cache
def _compiled_flex():
    import torch._dynamo.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 1000  # one graph a shape
    # without fullgraph a call that fails once makes all later ones run uncompiled, silently
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _uncompiled_flex(query, key, value):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value)


@cache
def _causal_blocks(n, device):
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, x, y: x >= y, None, None, n, n, device=device)


def flex(query, key, value, table, is_causal):
    """FlexAttention, compiled, the 1-D table captured by its score_mod; the block mask is made once a length."""

    def add_bias(score, b, h, x, y):
        return score + table[h, (x - y).abs()]

    blocks = _causal_blocks(query.shape[2], query.device) if is_causal else None
    try:
        return _compiled_flex()(query, key, value, score_mod=add_bias, block_mask=blocks)
    except torch._dynamo.exc.Unsupported:
        _uncompiled_flex(*(tensor[:, :1, :16] for tensor in (query, key, value)))  # says why, if it refuses too
        raise


EAGER = Provider("eager", eager)
NO_BIAS = Provider("no bias", sdpa_without_bias, trains_table=False)
PEERS = {
    peer.name: peer
    for peer in (
        EAGER,
        Provider("sdpa with bias", sdpa_with_bias),
        Provider("flex fixed table", flex, trains_table=False),
        Provider("flex trained table", flex, directions=("training",)),  # its forward is the other's
    )
}


def _ours(query, key, value, table, is_causal, backend):
    return bias_attention(query, key, value, table, is_causal=is_causal, backend=backend)


def providers(device, peers, backends):
    """The providers that can run here, and why the others cannot: ([Provider], {name: reason})."""
    absent = {backend: reason for backend in backends if (reason := why_not_measured(backend, device))}
    found = [PEERS[name] for name in PEERS if name in peers]
    for backend in backends:
        if backend not in absent:
            found.append(Provider(f"dpb {backend}", partial(_ours, backend=backend), backend=backend))
    return found, absent


@dataclass(frozen=True)
class Shape:
    """One row group of the report."""

    dtype: str
    batch: int
    heads: int
    n: int
    head_dim: int
    mask: str  # causal or full


def inputs(shape, device):
    """query, key, value, table and the gradient of the output."""
    torch.manual_seed(shape.n)
    dtype, size = DTYPES[shape.dtype], (shape.batch, shape.heads, shape.n, shape.head_dim)
    query, key, value = (torch.randn(size, dtype=dtype, device=device).requires_grad_() for _ in range(3))
    table = torch.randn((shape.heads, shape.n), device=device).requires_grad_()
    return query, key, value, table, torch.randn(size, dtype=dtype, device=device)


def forward(provider, query, key, value, table, dout, is_causal):
    """The output, without autograd, as in inference: FlexAttention looks at requires_grad even under no_grad."""
    with torch.no_grad():
        return provider.attend(query.detach(), key.detach(), value.detach(), table.detach(), is_causal)


def training(provider, query, key, value, table, dout, is_causal):
    """dq, dk, dv and, where the provider trains the table, dtable."""
    table = table if provider.trains_table else table.detach()
    wanted = (query, key, value, *([table] if provider.trains_table else []))
    return torch.autograd.grad(provider.attend(query, key, value, table, is_causal), wanted, dout)
