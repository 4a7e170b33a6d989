# SPDX-License-Identifier: MIT
"""DynamicPositionBias: an MLP over the distance, one bias per head."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention.api import Backend as AttentionBackend
from .attention.api import bias_attention
from .checks import check_dtype, check_flag, check_grid, check_int, check_tensor, constant_under_compile, is_autocast
from .expand.api import Backend, expand_bias
from .mlp import dtype_and_device, run
from .reference import Window
from .table_cache import TableCache
from .tracing import largest

if TYPE_CHECKING:
    from typing_extensions import Self


@constant_under_compile
def _is_rounding(device_type: str) -> bool:
    """Whether float32 matrix products may keep 11 bits of their factors (TF32), or 8: positions would share a distance.

    The answer is `torch.backends.….matmul.fp32_precision`, which takes two microseconds to ask.
    """
    backend = {"cuda": "cuda", "cpu": "mkldnn"}.get(device_type)
    return backend is not None and torch._C._get_fp32_precision_getter(backend, "matmul") in ("tf32", "bf16")


class DynamicPositionBias(nn.Module):
    """bias[h, x, y] = MLP(|x + offset - y|)[h]: a learned position bias for any length.

    Drop-in for `zeta.nn.DynamicPositionBias`: same constructor, same `forward(i, j)`, same state_dict keys, same
    numbers. Only the unique distances go through the MLP. The MLP always runs in float32 (float64 for float64
    parameters), also under autocast and for bfloat16 parameters, because bfloat16 cannot hold the distances of long
    sequences. The result is rounded once, at the end.

    In eval mode without gradients the module keeps the table from call to call until a parameter changes, so a decoding
    step runs no MLP (inside torch.compile it does). On a GPU the module does not see a write through `parameter.data`:
    call `eval()` after it. The module keeps no table if its MLP may be more than its parameters: with hooks, patched
    methods, layers of other classes, or parameters that another library manages.

    The layers are called as modules, so FSDP, nn.DataParallel, ZeRO-3, quantisation or offloading may fill their
    parameters. A trace (torch.jit.trace, torch.onnx.export) holds only torch's own operators. Its lengths stay free
    where they are sizes of tensors; dtypes and options are fixed.

    Args:
        dim: width of the MLP's hidden layers.
        heads: number of attention heads.
        depth: number of hidden layers; zeta has 2.
        norm: LayerNorm after each hidden Linear, the first without bias, as in x-transformers.
        log_distance: feed sign(distance) * log(|distance| + 1) instead of the distance.
        signed: tell past (positive distances) from future, as x-transformers does; else only |distance| counts.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: the message names the argument, its value, and what was expected.

    The formula is CrossFormer's dynamic position bias (Wang et al. 2021, arXiv:2108.00154, section 3.3) for
    sequences.
    """

    if TYPE_CHECKING:  # torch's __call__ would hide the signature of forward

        def __call__(
            self,
            i: int,
            j: int,
            *,
            offset: int | None = None,
            dtype: torch.dtype | None = None,
            backend: Backend | None = None,
        ) -> Tensor: ...

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        depth: int = 2,
        norm: bool = False,
        log_distance: bool = False,
        signed: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim: int = check_int("dim", dim, 1)
        self.heads: int = check_int("heads", heads, 1)
        self.depth: int = check_int("depth", depth, 1)
        self.norm: bool = check_flag("norm", norm)
        self.log_distance: bool = check_flag("log_distance", log_distance)
        self.signed: bool = check_flag("signed", signed)
        if dtype is not None:
            check_dtype("dtype", dtype)

        options: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for layer in range(depth):
            layers.append(nn.Linear(dim if layer else 1, dim, **options))
            if norm:
                layers.append(nn.LayerNorm(dim, bias=layer > 0, **options))
            layers.append(nn.SiLU())
        self.mlp: nn.Sequential = nn.Sequential(*layers, nn.Linear(dim, heads, **options))
        self._cache = TableCache()

    @property
    def device(self) -> torch.device:
        """The parameters' device; without parameters, the device of what replaces them."""
        return dtype_and_device(self)[1]

    def table(self, n: int) -> Tensor:
        """The bias of each distance, a curve per head, for `expand_bias`: (heads, n), with `signed` (heads, 2n - 1).

        float32, or float64 for float64 parameters, whatever the autocast state. If float32 products may be rounded
        (TF32), the MLP runs in float64. Column d belongs to distance d, in a signed table to distance d - (n - 1).
        """
        n = check_int("n", n, 0)
        kept = self._kept(n)
        if kept is None:
            return self._compute(n)
        spare = (kept.shape[1] + 1) // 2 - n if self.signed else 0
        return kept[:, spare : spare + max(2 * n - 1, 0) if self.signed else n].clone()

    def _kept(self, n: int) -> Tensor | None:
        """The kept table, of n distances or more, or None."""
        if type(self)._compute is not _COMPUTE or "_compute" in vars(self):
            return None  # a replaced method may depend on anything
        options = self.signed, self.log_distance, _is_rounding("cpu"), _is_rounding("cuda")
        return self._cache.get(self, n, self._compute, options)

    def _table(self, n: int, query: Tensor | None = None) -> Tensor:
        """A read-only table of n distances or more, on query's device if the module has no device of its own."""
        kept = self._kept(n)
        return self._compute(n, query) if kept is None else kept

    def _compute(self, n: int, query: Tensor | None = None) -> Tensor:
        found, device = dtype_and_device(self, query)
        dtype = torch.float64 if found == torch.float64 else torch.float32
        # layers without floating tensors are quantised, and may support only float32
        mlp_dtype = torch.float64 if found is not None and _is_rounding(device.type) else dtype
        with torch.autocast(device.type, enabled=False) if is_autocast(device.type) else nullcontext():
            if self.signed:
                distance = torch.arange(2 * n, dtype=mlp_dtype, device=device)[1:] - n  # also for n = 0
            else:
                distance = torch.arange(n, dtype=mlp_dtype, device=device)
            if self.log_distance:
                distance = distance.sign() * (distance.abs() + 1).log()
            rows = run(self.mlp, rearrange(distance, "n -> n 1"))
            return rearrange(rows, "n heads -> heads n").to(dtype).contiguous()

    def forward(
        self,
        i: int,
        j: int,
        *,
        offset: int | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> Tensor:
        """The bias of i queries and j keys, (heads, i, j), contiguous.

        Args:
            i, j: numbers of queries and keys.
            offset: position of the first query relative to the first key, any integer. Default j - i: the queries
                are the last i of the j positions.
            dtype: of the result. Default: autocast's dtype if autocast is on, else the parameters'.
            backend: as in `expand_bias`.

        Raises:
            TypeError, ValueError, RuntimeError: as `expand_bias`.
        """
        n = j if offset is None else None
        i, j, offset = check_grid(i, j, offset)
        if n is None:
            n = _reach(i, j, offset)
        if dtype is None:
            dtype, device = dtype_and_device(self)
            dtype = torch.get_default_dtype() if dtype is None else dtype
            if is_autocast(device.type) and dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device.type)
        return expand_bias(self._table(n), i, j, offset=offset, signed=self.signed, dtype=dtype, backend=backend)

    @overload
    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, offset: int | None = None, is_causal: bool = False,
        scale: float | None = None, window: Window | None = None, softcap: float | None = None, dropout_p: float = 0,
        key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
        return_lse: Literal[False] = False, backend: AttentionBackend | None = None,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, offset: int | None = None, is_causal: bool = False,
        scale: float | None = None, window: Window | None = None, softcap: float | None = None, dropout_p: float = 0,
        key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
        return_lse: Literal[True], backend: AttentionBackend | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, offset: int | None = None, is_causal: bool = False,
        scale: float | None = None, window: Window | None = None, softcap: float | None = None, dropout_p: float = 0,
        key_padding_mask: Tensor | None = None, enable_gqa: bool = False,
        return_lse: bool, backend: AttentionBackend | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, *, offset: int | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`bias_attention` with this module's bias, which is never materialised; trains the MLP.

        Args:
            query: (batch, heads, i, head_dim). key, value: (batch, kv_heads, j, head_dim).
            offset, options: as in `bias_attention`, except `table` and `signed`, which come from the module.

        Returns:
            As `bias_attention`.

        Raises:
            TypeError, ValueError, RuntimeError: as `bias_attention`.
        """
        for name, tensor in (("query", query), ("key", key)):
            check_tensor(name, tensor, ("batch", "heads", "length", "head_dim"))
        i, j, offset = check_grid(query.shape[2], key.shape[2], offset)
        table = self._table(_reach(i, j, offset), query)
        return bias_attention(query, key, value, table, offset=offset, signed=self.signed, **options)

    def train(self, mode: bool = True) -> "Self":
        self._cache.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, depth={self.depth}, norm={self.norm}, "
            f"log_distance={self.log_distance}, signed={self.signed}"
        )

    @classmethod
    def from_x_transformers(
        cls,
        state_dict: Mapping[str, Any],
        *,
        heads: int | None = None,
        dim: int | None = None,
        depth: int | None = None,
        norm: bool | None = None,
        log_distance: bool = False,
        prefix: str = "",
    ) -> "Self":
        """A module with the weights, and so the numbers, of an x-transformers `DynamicPositionBias`.

        Args:
            state_dict: of that module, or of a model that holds it at `prefix` (in x-transformers' decoders
                "attn_layers.rel_pos.").
            heads, dim, depth, norm: read from the state_dict; a given value must agree with it.
            log_distance: as the module was built; the state_dict does not tell.

        Raises:
            TypeError: state_dict is no mapping.
            ValueError: the state_dict holds no such module, or its sizes differ from the arguments.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, got {prefix!r} of type {type(prefix).__name__}")
        weights = {
            key[len(prefix) :]: value
            for key, value in state_dict.items()
            if isinstance(key, str) and re.fullmatch(r"mlp\.\d+(\.\d+)?\.\w+", key[len(prefix) :])
            if key.startswith(prefix)
        }
        for key, value in weights.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"state_dict's {prefix}{key} must be a Tensor, got {type(value).__name__}")
        found_depth = sum(key.endswith(".0.weight") for key in weights)
        last = weights.get(f"mlp.{found_depth}.weight")
        if last is None or last.dim() != 2:
            raise ValueError(
                f"state_dict must hold an x-transformers DynamicPositionBias at prefix {prefix!r} (keys "
                f"{prefix}mlp.0.0.weight … {prefix}mlp.DEPTH.weight), got the keys {sorted(map(str, state_dict))[:8]} …"
            )
        found = {
            "heads": last.shape[0],
            "dim": last.shape[1],
            "depth": found_depth,
            "norm": "mlp.0.1.gamma" in weights or "mlp.0.1.weight" in weights,
        }
        for name, value in {"heads": heads, "dim": dim, "depth": depth, "norm": norm}.items():
            if value is not None and value != found[name]:
                raise ValueError(f"{name} must be {found[name]}, as in the state_dict, got {value!r}")

        module = cls(**found, log_distance=log_distance, signed=True, device=last.device, dtype=last.dtype)
        if "mlp.0.1.bias" in weights:  # older versions have a bias in the first LayerNorm too
            module.mlp[1] = nn.LayerNorm(found["dim"], device=last.device, dtype=last.dtype)
        stride = 3 if found["norm"] else 2  # Linear, (LayerNorm), SiLU
        renamed = {}
        for key, value in weights.items():
            _, layer, *rest = key.split(".")
            inner = int(rest[0]) if len(rest) == 2 else 0
            renamed[f"mlp.{int(layer) * stride + inner}.{rest[-1].replace('gamma', 'weight')}"] = value
        module.load_state_dict(renamed)
        return module


_COMPUTE = DynamicPositionBias._compute


def _reach(i: int, j: int, offset: int) -> int:
    """How many distances the grid needs."""
    if isinstance(i, torch.Tensor) or isinstance(j, torch.Tensor) or isinstance(offset, torch.Tensor):
        return largest(i + offset, j - offset)
    return max(i + offset, j - offset) if i > 0 and j > 0 else 0
