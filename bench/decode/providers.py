# SPDX-License-Identifier: MIT
"""The providers of a decoding step, `attend(step) -> out`, and the limits: the same step without a bias.

The peers get the bias of the new queries ready-made: for one query it is a view into a flipped table, which a decoder
can keep. Making it costs them nothing here.

SDPA reads grouped heads in two ways, and neither is always the faster one:

enable_gqa    every query head reads its key head; torch's kernels for CUDA that take a mask repeat keys and values
folded        the query heads of a key head are rows of one product, so their keys are read once
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dpb_triton import DynamicPositionBias, bias_attention

from ..attention import providers as attention_providers
from ..providers import why_not_measured


@dataclass(frozen=True, eq=False)
class Step:
    """The tensors of a step: some new queries of each sequence of a batch, the last of the keys' positions."""

    query: torch.Tensor  # (batch, heads, queries, head_dim)
    key: torch.Tensor  # (batch, kv_heads, keys, head_dim)
    value: torch.Tensor
    module: DynamicPositionBias  # in eval mode, so it keeps its table
    table: torch.Tensor  # (heads, keys) float32, the module's
    rows: torch.Tensor  # (heads, queries, keys) in query's dtype, -inf at keys after the query

    @property
    def options(self):
        """The arguments of `bias_attention` and `DynamicPositionBias.attention`: only what the step needs."""
        return {"is_causal": self.query.shape[2] > 1, "enable_gqa": self.query.shape[1] > self.key.shape[1]}

    def folded(self):
        """(query (batch, kv_heads, group * queries, head_dim), rows (kv_heads, group * queries, keys))."""
        batch, kv_heads, keys, head_dim = self.key.shape
        return self.query.reshape(batch, kv_heads, -1, head_dim), self.rows.reshape(kv_heads, -1, keys)


@dataclass(frozen=True)
class Provider:
    """One way to compute a step."""

    name: str
    attend: object
    backend: str | None = None  # of this library
    is_grouped: bool = False  # without groups it is the same as another provider
    is_module: bool = False


def eager(step):
    """Products in the inputs' dtype, logits and softmax in float32; the query heads of a key head are rows."""
    query, rows = step.folded()
    s = (query @ step.key.mT).float() * query.shape[3] ** -0.5 + rows
    return (s.softmax(-1).to(query.dtype) @ step.value).reshape(step.query.shape)


def sdpa_with_row(step):
    """SDPA as a user calls it; it chooses the kernel."""
    rows = step.rows.expand(len(step.query), -1, -1, -1)
    return scaled_dot_product_attention(step.query, step.key, step.value, attn_mask=rows, enable_gqa=True)


def sdpa_folded(step):
    """SDPA with the query heads of a key head as rows."""
    query, rows = step.folded()
    rows = rows.expand(len(query), -1, -1, -1)
    return scaled_dot_product_attention(query, step.key, step.value, attn_mask=rows).reshape(step.query.shape)


def flex(step):
    """Compiled FlexAttention; its score_mod captures the 1-D table."""
    table, offset = step.table, step.key.shape[2] - step.query.shape[2]

    def add_bias(score, b, h, x, y):
        distance = x + offset - y
        return torch.where(distance >= 0, score + table[h, distance.abs()], -torch.inf)

    return attention_providers.call_flex(step.query, step.key, step.value, score_mod=add_bias, enable_gqa=True)


PEERS = {
    peer.name: peer
    for peer in (
        Provider("eager", eager),
        Provider("sdpa with row", sdpa_with_row),
        Provider("sdpa with row folded", sdpa_folded, is_grouped=True),
        Provider("flex", flex),
    )
}
SDPA = PEERS["sdpa with row"]


def _ours(step, backend):
    return bias_attention(step.query, step.key, step.value, step.table, **step.options, backend=backend)


def _module(step, backend):
    """With the kept table: no MLP runs."""
    return step.module.attention(step.query, step.key, step.value, **step.options, backend=backend)


def _with_constants(step, tile, programs):
    """Triton's kernel with other launch constants than its own. The host takes longer than in a user's call."""
    from dpb_triton.attention.kernels import decode, forward
    from dpb_triton.attention.kernels.blocks import Tile

    (i, head_dim), keys = step.query.shape[2:], step.key.shape[2]
    with mock.patch.multiple(decode, tile_of=lambda *_: Tile(*tile), PROGRAMS=programs or decode.PROGRAMS):
        return forward.forward.__wrapped__(  # a repeated call would repeat its constants
            step.query, step.key, step.value, step.table, None, None, None, i, keys, keys - i, False, None,
            0 if step.options["is_causal"] else None, head_dim**-0.5, 0.0, 0.0,
        )[0]  # fmt: skip


def providers(device, peers, backends, tiles=()):
    """([Provider] that can run here, {name: reason} of the others).

    tiles: ((BLOCK_M, BLOCK_N, warps, stages), programs or None), each one more provider where Triton can be measured.
    """
    absent = {backend: reason for backend in backends if (reason := why_not_measured(backend, device))}
    found = [PEERS[name] for name in PEERS if name in peers]
    for backend in backends:
        if backend not in absent:
            found.append(Provider(f"dpb {backend}", partial(_ours, backend=backend), backend))
            module = partial(_module, backend=backend)
            found.append(Provider(f"dpb {backend} module", module, backend, is_module=True))
    reason = why_not_measured("triton", device) if tiles else None
    for tile, programs in tiles:
        name = f"tile {','.join(map(str, (*tile, programs) if programs else tile))}"
        if reason:
            absent[name] = reason
        else:
            found.append(Provider(name, partial(_with_constants, tile=tile, programs=programs), "triton"))
    return found, absent


def _without_bias(step, backend=None, is_folded=False):
    query = step.folded()[0] if is_folded else step.query
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return scaled_dot_product_attention(query, step.key, step.value, enable_gqa=not is_folded)


def limits_of(device, dtype, group):
    """{name: attend} of a step without a bias; it sees all keys. CUDA's EFFICIENT kernel knows no groups."""
    if device == "cuda" and dtype == "fp32":
        return {"no bias efficient": partial(_without_bias, backend=SDPBackend.EFFICIENT_ATTENTION, is_folded=True)}
    if device == "cuda":
        kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        return {f"no bias {name}": partial(_without_bias, backend=backend) for name, backend in kernels.items()}
    folded = {"no bias folded": partial(_without_bias, is_folded=True)} if group > 1 else {}
    return {"no bias": _without_bias} | folded
