# SPDX-License-Identifier: MIT
"""Which heads of a MultiheadAttention a process computes. By default all; `distributed/own_heads.py` has a rank's."""

from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T", bound=Tensor | None)


class AllHeads:
    """All heads, so every tensor stays as it is. A subclass takes the part of its heads."""

    def shared(self, *tensors: T) -> tuple[T, ...]:
        """Inputs of the call, or None: their gradient comes from all heads. Tensors that are one stay one."""
        return tensors

    def mask(self, attn_mask: Tensor | None) -> Tensor | None:
        """(i, j), or (batch * heads, i, j) of these heads."""
        return attn_mask

    def packed(self, parameter: Tensor | None) -> Tensor | None:
        """The rows of in_proj_weight or in_proj_bias, (3 * heads * head_dim, …): of q, of k, of v."""
        return parameter

    def part(self, parameter: Tensor) -> Tensor:
        """Of q_proj_weight, k_proj_weight, v_proj_weight, bias_k or bias_v."""
        return parameter

    def output(self, out_proj: nn.Module, out: Tensor) -> Tensor:
        """out_proj of these heads' out, (…, heads * head_dim), and of all others'."""
        return out_proj(out)

    def weights(self, weights: Tensor, is_averaged: bool) -> Tensor:
        """The result of need_weights: the mean of weights (batch, heads, i, j) over all heads, or those of all."""
        return weights.mean(1) if is_averaged else weights
