# SPDX-License-Identifier: MIT
"""torch.nn.MultiheadAttention with a position bias in every head, fused where the call allows it."""

import torch
from einops import rearrange, repeat
from torch import nn
from torch.nn import functional as F

from .attention_checks import LARGEST_HEAD_DIM
from .checks import check_int
from .module import DynamicPositionBias


class MultiheadAttention(nn.MultiheadAttention):
    """softmax(q k^T / sqrt(head_dim) + pos_bias) v, with the interface of `torch.nn.MultiheadAttention`.

    Same constructor, forward arguments, parameters and results, with the bias of `pos_bias` added to the scores. Goes
    where torch's module goes: `layer.self_attn = MultiheadAttention(…)` in a `torch.nn.TransformerEncoderLayer` (whose
    own fast path, which would skip the bias, it switches off). A state_dict of torch's module loads, strictly too: it
    has no position bias, so the last layer of `pos_bias` is set to zero and the numbers are torch's.

    Never materialises the bias when need_weights is False, there is no attn_mask but one that is_causal stands for
    (of as many queries as keys), and neither add_bias_kv nor add_zero_attn was asked for; any key_padding_mask is fine.
    All else goes to torch with the bias in its attn_mask, (batch * heads, i, j): the same numbers.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch's module. Keys that add_bias_kv and add_zero_attn append have no position, and a bias of zero.
        pos_bias: a `DynamicPositionBias` of num_heads heads, perhaps one that other layers share. Default: a new one
            of width max(embed_dim // 4, 1), as x-transformers'.

    Raises:
        TypeError, ValueError: a pos_bias that is none, or of other heads.
        AssertionError: what torch's module raises for sizes that do not divide.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
        *,
        pos_bias=None,
    ):
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if pos_bias is None:
            pos_bias = DynamicPositionBias(max(embed_dim // 4, 1), num_heads, device=device, dtype=dtype)
        if not isinstance(pos_bias, DynamicPositionBias):
            raise TypeError(f"pos_bias must be a DynamicPositionBias or None, got {type(pos_bias).__name__}")
        if pos_bias.heads != num_heads:
            raise ValueError(f"pos_bias must have num_heads = {num_heads} heads, got {pos_bias.heads}")
        self.pos_bias = pos_bias
        # what torch's encoder layers ask before they compute attention by themselves, from our weights without our bias
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
        *,
        offset=None,
    ):
        """(out, weights): as torch's module, which documents all arguments but the last.

        Args:
            query: (i, batch, embed_dim), with batch_first (batch, i, embed_dim), or (i, embed_dim).
            key, value: likewise with j, and of kdim and vdim.
            key_padding_mask: (batch, j), or (j,) without a batch; bool, True for a key to ignore, or added.
            need_weights: also return the weights, (batch, i, j) or, with average_attn_weights False,
                (batch, num_heads, i, j). True, torch's default, materialises the bias: ask for False to train.
            attn_mask: (i, j) or (batch * num_heads, i, j); bool, True where a query must not look, or added.
            is_causal: attn_mask is the causal one. Without attn_mask, which torch insists on: query x sees the keys
                y <= x + offset.
            offset: position of the first query relative to the first key, for the bias; j - i unless given, so the
                last query stands at the last key, whichever side is longer.

        Raises:
            TypeError: nested tensors, an offset that is no int.
            ValueError: tensors of other ranks or sizes.
            RuntimeError, AssertionError: what torch raises for masks of a wrong shape or dtype.
        """
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.is_nested:
                raise TypeError(f"{name} must not be a nested tensor: give a key_padding_mask")
            if x.dim() != query.dim() or x.dim() not in (2, 3):
                raise ValueError(f"{name} must have 2 or 3 dimensions, as query, got shape {tuple(x.shape)}")
        is_batched = query.dim() == 3
        if self.batch_first and is_batched:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        i, j = query.shape[0], key.shape[0]
        offset = j - i if offset is None else check_int("offset", offset)

        if self._is_fused(need_weights, attn_mask, is_causal, i == j):
            if not is_batched:
                query, key, value = (x.unsqueeze(1) for x in (query, key, value))
                key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            out, weights = self._fused(query, key, value, key_padding_mask, is_causal, offset), None
            out = out if is_batched else out.squeeze(1)
        else:
            batch = query.shape[1] if is_batched else 1
            attn_mask = self._biased_mask(query, i, j, batch, attn_mask, is_causal, offset)
            out, weights = self._materialised(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights
            )
        return (out.transpose(0, 1) if self.batch_first and is_batched else out), weights

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A state_dict of torch's module means a bias of zero: pos_bias's last layer becomes that, the others stay."""
        prefix_bias = prefix + "pos_bias."
        if prefix + "out_proj.weight" in state_dict and not any(key.startswith(prefix_bias) for key in state_dict):
            last = f"{prefix_bias}mlp.{len(self.pos_bias.mlp) - 1}."
            for key, tensor in self.pos_bias.state_dict(prefix=prefix_bias).items():
                if not tensor.is_meta:  # which strict loading then calls missing
                    state_dict[key] = torch.zeros_like(tensor) if key.startswith(last) else tensor
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _is_fused(self, need_weights, attn_mask, is_causal, is_square):
        return (
            not need_weights
            and (attn_mask is None or (is_causal and is_square))
            and self.bias_k is None
            and not self.add_zero_attn
            and self.head_dim <= LARGEST_HEAD_DIM
        )

    def _fused(self, query, key, value, key_padding_mask, is_causal, offset):
        q, k, v = (rearrange(x, "n b (h d) -> b h n d", d=self.head_dim) for x in self._project(query, key, value))
        dropout_p = self.dropout if self.training else 0.0
        out = self.pos_bias.attention(
            q, k, v, is_causal=is_causal, offset=offset, key_padding_mask=key_padding_mask, dropout_p=dropout_p
        )
        return self.out_proj(rearrange(out, "b h n d -> n b (h d)"))

    def _project(self, query, key, value):
        """(length, batch, embed_dim) each; one product for self-attention."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        return [F.linear(*arguments) for arguments in zip((query, key, value), weights, biases, strict=True)]

    def _biased_mask(self, query, i, j, batch, attn_mask, is_causal, offset):
        """What torch adds to the scores: the bias and the mask, (batch * num_heads, i, j)."""
        mask = self.pos_bias(i, j, offset=offset, dtype=query.dtype)
        if attn_mask is None and is_causal:
            attn_mask = torch.ones(i, j, dtype=torch.bool, device=query.device).triu(offset + 1)
        if attn_mask is None or attn_mask.dim() == 2:
            mask = mask if attn_mask is None else _add(mask, attn_mask)
            return repeat(mask, "h i j -> (b h) i j", b=batch)
        return rearrange(
            _add(mask, rearrange(attn_mask, "(b h) i j -> b h i j", h=mask.shape[0])), "b h i j -> (b h) i j"
        )

    def _materialised(self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights):
        if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:  # of attn_mask's type, torch insists
            key_padding_mask = _add(query.new_zeros(key_padding_mask.shape), key_padding_mask)
        return F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, self.in_proj_weight, self.in_proj_bias, self.bias_k,
            self.bias_v, self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias,
            training=self.training, key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None, q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight, v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
        )  # fmt: skip


def _add(bias, mask):
    return bias.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else bias + mask.to(bias.dtype)
