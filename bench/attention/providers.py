# SPDX-License-Identifier: MIT
"""The providers of attention with a position bias from a table: eager, SDPA, FlexAttention, this library's backends.

`attend(query, key, value, table, seen) -> out`: query, key, value and out (batch, heads, n, head_dim), table (heads, n)
float32. Peers that materialise the bias use our `expand_bias`; `python -m bench expand` measures eager's own gather.
Causality and the window cost them nothing: they are -inf in the table.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from dpb_triton import bias_attention, expand_bias

from ..providers import why_not_measured
from .limits import limits_of


@dataclass(frozen=True)
class Provider:
    """One way to compute attention with the bias."""

    name: str
    attend: object
    directions: tuple = ("forward", "training")
    trains_table: bool = True
    backend: str | None = None  # of this library
    frozen: str | None = None  # the provider that does the same without the table's gradient, by name
    most_mib: float = float("inf")  # left out where a tensor of scores takes more


def _bias(table, seen, dtype):
    """(heads, n, n), contiguous; -inf where causality or the window hides the key."""
    n = table.shape[1]
    if seen.window is not None:
        signed = torch.cat((table.flip(1)[:, :-1], table), 1)  # by x - y + n - 1
        distance = torch.arange(1 - n, n, device=table.device)
        return expand_bias(signed.masked_fill(~seen.is_seen(distance), -torch.inf), n, n, signed=True, dtype=dtype)
    if seen.is_causal:
        return expand_bias(pad(table, (n - 1, 0), value=-torch.inf), n, n, signed=True, dtype=dtype)
    return expand_bias(table, n, n, dtype=dtype)


def eager(query, key, value, table, seen):
    """`dpb_triton.reference.attention`, but faster: products in the inputs' dtype, logits and softmax in float32."""
    s = (query @ key.mT).float() * query.shape[3] ** -0.5 + _bias(table, seen, table.dtype)
    if seen.padding is not None:
        s = s.masked_fill(seen.padding[:, None, None], -torch.inf)
    return s.softmax(-1).to(value.dtype) @ value


def _compiled(function):
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = 1000  # one graph for each shape
    # without fullgraph, one failed call silently makes all later calls run uncompiled
    return torch.compile(function, dynamic=False, fullgraph=True)


@cache
def _compiled_eager():
    return _compiled(eager)


def compiled_eager(query, key, value, table, seen):
    """Eager through torch.compile, compiled once for each shape."""
    return _compiled_eager()(query, key, value, table, seen)


def sdpa_with_bias(query, key, value, table, seen):
    """On CUDA by the EFFICIENT kernel: only it returns the bias's gradient. The bias must have query's dtype."""
    bias = _bias(table, seen, query.dtype)[None]
    if seen.padding is not None:
        bias = bias.masked_fill(seen.padding[:, None, None], -torch.inf)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if query.is_cuda else nullcontext():
        return scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(query.shape[0], -1, -1, -1))


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled(flex_attention)


def _uncompiled_flex(query, key, value):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value)


@lru_cache(maxsize=2)
def _blocks(seen, n, device):
    """The block mask, made once for each shape; None if every key is seen."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not seen.is_causal and seen.window is None:
        return None
    batch = None if seen.padding is None else len(seen.padding)

    def is_seen(b, h, x, y):
        is_in_sight = seen.is_seen(x - y)
        return is_in_sight if batch is None else is_in_sight & ~seen.padding[b, y]

    return create_block_mask(is_seen, batch, None, n, n, device=device)


# With FlexAttention's own blocks for Hopper (128 x 128, 3 stages) the table's elements do not fit in shared memory.
_FLEX_OPTIONS = [{}, {"fwd_BLOCK_N": 64}]


def call_flex(*args, **options):
    """Compiled FlexAttention with the first of _FLEX_OPTIONS that compiles; drops the others before it."""
    while True:
        try:
            return _compiled_flex()(*args, **options, kernel_options=_FLEX_OPTIONS[0])
        except RuntimeError as error:
            if len(_FLEX_OPTIONS) == 1 or "No valid triton configs" not in str(error):
                raise
            del _FLEX_OPTIONS[0]


def flex(query, key, value, table, seen):
    """Compiled FlexAttention; its score_mod captures the 1-D table."""

    def add_bias(score, b, h, x, y):
        return score + table[h, (x - y).abs()]

    if torch.__version__ < (2, 11) and query.requires_grad and not query.is_cuda:  # torch 2.10 does not know it
        raise NotImplementedError("FlexAttention does not support backward on CPU")
    blocks = _blocks(seen, query.shape[2], query.device)
    try:
        return call_flex(query, key, value, score_mod=add_bias, block_mask=blocks)
    except torch._dynamo.exc.Unsupported:
        _uncompiled_flex(*(tensor[:, :1, :16] for tensor in (query, key, value)))  # raises with the reason
        raise


EAGER = Provider("eager", eager)
SDPA = Provider("sdpa with bias", sdpa_with_bias)
PEERS = {
    peer.name: peer
    for peer in (
        EAGER,
        Provider("compiled eager", compiled_eager),
        SDPA,
        Provider("flex fixed table", flex, trains_table=False),
        # its forward is that of the fixed table
        Provider("flex trained table", flex, directions=("training",), frozen="flex fixed table"),
    )
}
MATERIALISE = ("eager", "compiled eager", "sdpa with bias")  # scores, or the bias
COMPILED_LONG = ("compiled eager", "flex fixed table", "flex trained table")


def _ours(query, key, value, table, seen, backend):
    return bias_attention(query, key, value, table, **seen.options(), backend=backend)


def providers(device, peers, backends):
    """([Provider] that can run here, {name: reason} of the others)."""
    absent = {backend: reason for backend in backends if (reason := why_not_measured(backend, device))}
    found = [PEERS[name] for name in PEERS if name in peers]
    for backend in backends:
        if backend not in absent:
            attend, name = partial(_ours, backend=backend), f"dpb {backend}"
            found.append(Provider(name, attend, backend=backend, frozen=f"{name} frozen"))
            found.append(
                Provider(f"{name} frozen", attend, directions=("training",), trains_table=False, backend=backend)
            )
    return found, absent


def limit_providers(device, dtype):
    """Attention without a bias, as providers."""
    return [Provider(name, attend, trains_table=False) for name, attend in limits_of(device, dtype).items()]


def forward(provider, query, key, value, table, dout, seen):
    """The output without autograd, as in inference. FlexAttention reads requires_grad even under no_grad."""
    with torch.no_grad():
        return provider.attend(query.detach(), key.detach(), value.detach(), table.detach(), seen)


def training(provider, query, key, value, table, dout, seen):
    """dq, dk, dv and, if the provider trains the table, dtable."""
    table = table if provider.trains_table else table.detach()
    wanted = (query, key, value, *([table] if provider.trains_table else []))
    return torch.autograd.grad(provider.attend(query, key, value, table, seen), wanted, dout)
