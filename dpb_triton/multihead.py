# SPDX-License-Identifier: MIT
"""torch.nn.MultiheadAttention with a position bias in every head, fused where the call allows it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from .attention.checks import LARGEST_HEAD_DIM
from .checks import check_int, is_transformed
from .expand.api import Backend
from .module import DynamicPositionBias
from .multihead_heads import AllHeads
from .multihead_masks import CausalHint, biased_mask, check_call, check_mask_dtype
from .tracing import is_tracing, unrecorded

_causal_hint = CausalHint()  # shared, because all layers get one mask


class MultiheadAttention(nn.MultiheadAttention):
    """softmax(q k^T / sqrt(head_dim) + pos_bias) v, with the interface of `torch.nn.MultiheadAttention`.

    Same constructor, forward arguments, parameters and results, with the bias of `pos_bias` added to the scores. It
    goes where torch's module goes: `layer.self_attn = MultiheadAttention(…)` in a `torch.nn.TransformerEncoderLayer`,
    also in an existing encoder. The layer's own fast path would skip the bias; a forward pre-hook that does nothing
    keeps the layer off it. A state_dict of torch's module loads, with strict=True too. It has no position bias, so the
    last layer of `pos_bias` is set to zero and the numbers are torch's.

    The bias is never materialised if need_weights is False, attn_mask is None or the causal mask (is_causal), and
    add_bias_kv and add_zero_attn are False; any key_padding_mask is fine. All other calls hold their scores in memory,
    (batch, heads, i, j), and compute the same numbers. So do torch.func's transforms and forward-mode derivatives.

    Unlike in torch's module, a query that sees no key always gets weights of 0 and `out_proj` of 0; torch's module
    gives this or NaN, depending on need_weights. A key that no query sees may hold NaN. torch.jit.script does not
    support this module (torch.jit.trace, torch.compile and torch.export do).

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch's module. Keys that add_bias_kv and add_zero_attn append have no position, and a bias of zero.
        pos_bias: a `DynamicPositionBias` with num_heads heads; layers may share one. Default: a new one of width
            max(embed_dim // 4, 1), as x-transformers'.

    Raises:
        TypeError, ValueError: pos_bias is no `DynamicPositionBias`, or has another number of heads.
        AssertionError: as torch's module, for sizes that do not divide.
    """

    _heads: AllHeads = AllHeads()  # which heads this process computes; HeadParallel sets it
    pos_bias: DynamicPositionBias

    if TYPE_CHECKING:  # torch's __call__ would hide the signature of forward

        def __call__(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            key_padding_mask: Tensor | None = None,
            need_weights: bool = True,
            attn_mask: Tensor | None = None,
            average_attn_weights: bool = True,
            is_causal: bool = False,
            *,
            offset: int | None = None,
        ) -> tuple[Tensor, Tensor | None]: ...

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        pos_bias: DynamicPositionBias | None = None,
    ) -> None:
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
        self.register_forward_pre_hook(_no_fast_path)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        offset: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, weights), as torch's module, which documents all arguments but the last.

        Args:
            query: (i, batch, embed_dim), with batch_first (batch, i, embed_dim), or (i, embed_dim). For self-attention
                with batch_first also a nested tensor (torch.strided), as torch's encoder makes of padded sequences.
            key, value: likewise with j, and of kdim and vdim.
            key_padding_mask: (batch, j), or (j,) without a batch. bool: True for a key to ignore. Floating: added.
            need_weights: also return the weights, (batch, i, j) or, with average_attn_weights False,
                (batch, num_heads, i, j). True, torch's default, materialises the bias: pass False to train.
            attn_mask: (i, j) or (batch * num_heads, i, j). bool: True where a query must not look. Floating: added.
                Floating masks have query's dtype or, with need_weights False, may be float32.
            is_causal: attn_mask is the causal mask, y <= x + offset. The module reads the mask (once for all layers
                that get it), and uses the mask if the hint is wrong. Inside torch.compile, a trace or a CUDA graph the
                module cannot read it, and believes the hint if i == j and offset is 0, as torch's module always does.
                Without attn_mask, which torch's module requires, query x sees the keys y <= x + offset.
            offset: position of the first query relative to the first key, for the bias. Default j - i: the last query
                stands at the last key, whichever side is longer.

        Raises:
            TypeError: an argument is no tensor, or offset is no int.
            AssertionError, RuntimeError: as torch's module, for tensors and masks of a wrong shape or dtype.
        """
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            return self._nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, offset
            )
        with unrecorded() if is_tracing() else nullcontext():
            is_batched = check_call(self, query, key, value, key_padding_mask, attn_mask)
        tokens = "b n" if self.batch_first or not is_batched else "n b"
        q, k, v = self._project(query, key, value)
        if not is_batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        q, k, v = (rearrange(x, f"{tokens} (h d) -> b h n d", d=self.head_dim) for x in (q, k, v))
        i, j = q.shape[2], k.shape[2]
        offset = j - i if offset is None else check_int("offset", offset)

        has_mask = attn_mask is not None
        is_causal = bool(is_causal) and (not has_mask or _causal_hint.is_true_of(attn_mask, offset))
        is_dropped = is_causal and not need_weights and key_padding_mask is None  # torch's module ignores the mask then
        check_mask_dtype(q, (None if is_dropped else attn_mask, key_padding_mask), is_exact=need_weights)
        attn_mask, key_padding_mask = self._heads.shared(None if is_causal else attn_mask, key_padding_mask)
        attn_mask = self._heads.mask(attn_mask)
        if self._is_fused(q, k, v, need_weights, attn_mask):
            out, weights = self._fused(q, k, v, key_padding_mask, is_causal, offset), None
        else:
            out, weights = self._materialised(q, k, v, key_padding_mask, need_weights, attn_mask, is_causal, offset)
        out = self._heads.output(self.out_proj, rearrange(out, f"b h n d -> {tokens} (h d)"))
        if weights is None or not need_weights:
            return (out if is_batched else out.squeeze(0)), None
        weights = self._heads.weights(weights.to(q.dtype), average_attn_weights)
        return (out, weights) if is_batched else (out.squeeze(0), weights.squeeze(0))

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """Refused: torch calls it to compute attention from the weights alone, without the bias."""
        raise RuntimeError(
            "torch's fast path would skip the position bias. MultiheadAttention's forward pre-hook keeps it off: put "
            "that back, or call torch.backends.mha.set_fastpath_enabled(False)"
        )

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        if "pos_bias" in self._modules:  # torch's constructor calls this too, before there is one
            nn.init.kaiming_uniform_(self.out_proj.weight, a=5**0.5)  # as nn.Linear; torch's module does not reset it
            for layer in self.pos_bias.modules():
                reset = getattr(layer, "reset_parameters", None)
                if reset is not None:
                    reset()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """A state_dict of torch's module means a bias of zero: pos_bias's last layer becomes zero, the others stay."""
        prefix_bias = prefix + "pos_bias."
        if prefix + "out_proj.weight" in state_dict and not any(key.startswith(prefix_bias) for key in state_dict):
            last = f"{prefix_bias}mlp.{len(self.pos_bias.mlp) - 1}."
            for key, tensor in self.pos_bias.state_dict(prefix=prefix_bias).items():
                if not tensor.is_meta:  # strict loading then reports it as missing
                    state_dict[key] = torch.zeros_like(tensor) if key.startswith(last) else tensor
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The call with its sequences padded; out is nested, as query."""
        is_self = query is key and key is value and query.layout == torch.strided and query.dim() == 3
        if not (is_self and self.batch_first and key_padding_mask is None and attn_mask is None):
            raise AssertionError(
                "MultiheadAttention supports a NestedTensor (layout torch.strided, 3 dimensions) for self-attention "
                "only (query, key and value are one tensor), with batch_first and without masks, got "
                f"query {_describe(query)}, key {_describe(key)}, value {_describe(value)}, "
                f"batch_first {self.batch_first}, key_padding_mask {_describe(key_padding_mask)}, attn_mask "
                f"{_describe(attn_mask)}"
            )
        padded = query.to_padded_tensor(0.0)
        lengths = query._nested_tensor_size()[:, :1].to(padded.device)
        padding = torch.arange(padded.shape[1], device=padded.device) >= lengths
        average_attn_weights, is_causal, offset = options
        out, weights = self.forward(
            padded, padded, padded, padding, need_weights, None, average_attn_weights, is_causal, offset=offset
        )
        if weights is not None:  # padded, as torch's
            rows = rearrange(padding, "b i -> b i 1" if average_attn_weights else "b i -> b 1 i 1")
            weights = weights.masked_fill(rows, 0)
        return torch._nested_tensor_from_mask(out, ~padding, mask_check=False), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """embed_dim features each. Arguments that are one tensor share one product."""
        query, key, value = self._heads.shared(query, key, value)
        weight, bias = self._heads.packed(self.in_proj_weight), self._heads.packed(self.in_proj_bias)
        if weight is None:
            parts = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            weights = tuple(map(self._heads.part, parts))
        elif query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            width = weight.shape[0] // 3
            weight_q, weight_kv = weight.split([width, 2 * width])
            bias_q, bias_kv = (None, None) if bias is None else bias.split([width, 2 * width])
            return F.linear(query, weight_q, bias_q), *F.linear(key, weight_kv, bias_kv).chunk(2, -1)
        else:
            weights = weight.chunk(3)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return [F.linear(*arguments) for arguments in zip((query, key, value), weights, biases, strict=True)]

    def _is_fused(self, q: Tensor, k: Tensor, v: Tensor, need_weights: bool, attn_mask: Tensor | None) -> bool:
        return (
            not need_weights
            and attn_mask is None
            and self.bias_k is None
            and not self.add_zero_attn
            and self.head_dim <= LARGEST_HEAD_DIM
            and not (self.training and self.dropout >= 1)
            and not self._is_transformed(q, k, v)
        )

    def _is_transformed(self, *tensors: Tensor) -> bool:
        is_forward_ad = forward_ad._current_level >= 0  # else no parameter has a tangent
        return is_transformed(*tensors, *(self.pos_bias.parameters() if is_forward_ad else ()))

    def _fused(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, is_causal: bool, offset: int
    ) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return self.pos_bias.attention(
            q, k, v, is_causal=is_causal, offset=offset, key_padding_mask=key_padding_mask, dropout_p=dropout_p
        )

    def _materialised(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
        offset: int,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, weights) from torch's own operations, which every transform knows."""
        backend: Backend | None = "torch" if self._is_transformed(q, k, v) else None
        dtype = torch.promote_types(q.dtype, torch.float32)
        bias = self.pos_bias(q.shape[2], k.shape[2], offset=offset, dtype=dtype, backend=backend)
        mask = biased_mask(bias, attn_mask, key_padding_mask, is_causal, offset)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = _append(k, self._heads.part(self.bias_k)), _append(v, self._heads.part(self.bias_v))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        if self.bias_k is not None or self.add_zero_attn:
            mask = F.pad(mask, (0, (self.bias_k is not None) + self.add_zero_attn))
        has_mask = is_causal or attn_mask is not None or key_padding_mask is not None
        if has_mask:
            hidden = mask == -torch.inf
            dead, unseen = hidden.all(3, keepdim=True), rearrange(hidden.all(2), "b h j -> b h j 1")
            mask = mask.masked_fill(dead, 0)  # the softmax of nothing is NaN, forward and backward
            k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)

        dropout_p = self.dropout if self.training else 0.0
        if not need_weights and dtype == q.dtype and backend is None:
            weights, out = None, F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        else:  # SDPA would round the bias to q's dtype, and has neither forward-mode derivatives nor a batching rule
            weights = (((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).to(dtype) + mask).softmax(-1)
            weights = F.dropout(weights, dropout_p)
            out = weights.to(v.dtype) @ v
            weights = weights.masked_fill(dead, 0) if has_mask and need_weights else weights
        return (out.masked_fill(dead, 0) if has_mask else out), weights


def _no_fast_path(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A forward pre-hook: with one, torch.nn.TransformerEncoderLayer always calls its self_attn, and so the bias."""


def _append(x: Tensor, row: Tensor) -> Tensor:
    """One more key, row (1, 1, heads * head_dim), after x (batch, heads, j, head_dim)."""
    row = repeat(row.to(x.dtype), "1 1 (h d) -> b h 1 d", b=x.shape[0], h=x.shape[1])
    return torch.cat([x, row], 2)


def _describe(x: Tensor | None) -> str:
    if not isinstance(x, Tensor):
        return str(x)
    return f"of {x.dim()} dimensions, {'nested, ' if x.is_nested else ''}{x.layout}"
