# SPDX-License-Identifier: MIT
"""The operators `dpb_triton::attention_forward` and `…_backward`: schemas, fake kernels, implementations per backend.

`dispatch.py` lists the operator of each backend. On the CPU `cpp_path.py` calls the functions of csrc/, which are no
operators. For float64 on a GPU the torch path runs.

`key_bias` is None, or (batch, j) in float32 (float64 for float64), added to the scores of a key; -inf hides the key.
Its gradient dkey_bias is (batch, kv_heads, j); the caller sums it over the heads. `seqlens` is None, or locates packed
sequences: int32 (sequences, 5), one row (first query, i, first key, j, offset) per sequence. The batch is then 1, and
the operator ignores `offset`. `longest_query` and `longest_key` are the largest i and j. `left` and `right` bound the
keys of a query, x + offset - left <= y <= x + offset + right; None sets no bound. `seed`, one int64, decides which
scores dropout drops. softcap 0.0 means none. Backward recomputes probabilities from `state` (2, batch, heads, i): for
each query the largest score, in units of log2, and the sum of exp2(score - largest). lse alone is not enough, because
for large scores it swallows that sum. `is_part`: the keys are only a part of those behind `out`, `state` and `dlse`, as
in context parallelism, and the gradients are this part's terms of the whole's. Outputs lie in memory as (batch, length,
heads, head_dim), the layout that the projection after an attention reads.

`attention_paged` has no derivative. Its key and value are pools of pages, (pages, kv_heads, page, head_dim). Sequence b
has `lengths[b]` keys, in the pages `block_table[b]`, (batch, blocks); its queries are the last ones.
"""

import torch

from .. import dispatch
from . import cpp_path, torch_paged, torch_path

_OPTIONS = (
    "Tensor? seqlens, Tensor? seed, SymInt longest_query, SymInt longest_key, SymInt offset, bool signed, "
    "SymInt? left, SymInt? right, float scale, float softcap, float dropout_p"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor table, Tensor? key_bias"
_FORWARD = f"({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor state)"
_BACKWARD = (
    f"(Tensor dout, Tensor? dlse, {_INPUTS}, Tensor out, Tensor state, {_OPTIONS}, bool is_part, bool needs_dq, "
    "bool needs_dkv, bool needs_dtable, bool needs_dkey_bias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable, "
    "Tensor dkey_bias)"
)
_PAGED = (
    "(Tensor query, Tensor key, Tensor value, Tensor table, Tensor block_table, Tensor lengths, bool signed, "
    "SymInt? left, SymInt? right, float scale, float softcap) -> (Tensor out, Tensor lse)"
)
BACKENDS = ("torch", "cpp", "triton")


_triton_forward = dispatch.on_its_device(f"{__package__}.kernels.forward", "forward")
_triton_backward = dispatch.on_its_device(f"{__package__}.kernels.backward", "backward")

_triton_paged = dispatch.on_its_device(f"{__package__}.kernels.paged", "paged")


def fake_forward(query, key, value, table, key_bias, *options):
    """Empty results of attention_forward's shapes, dtypes and strides."""
    accumulator = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:3], dtype=accumulator)
    return torch_path.like(query, value.shape[3]), lse, lse.new_empty((2, *lse.shape))


def _fake_paged(query, key, value, *_):
    return fake_forward(query, key, value, *_)[:2]


def fake_backward(dout, dlse, query, key, value, table, *args):
    """Empty results of attention_backward's shapes and dtypes; the last four arguments say which are needed."""
    needs_dq, needs_dkv, needs_dtable, needs_dkey_bias = args[-4:]
    return (
        torch_path.like(query) if needs_dq else query.new_empty((0,)),
        torch_path.like(key) if needs_dkv else key.new_empty((0,)),
        torch_path.like(value) if needs_dkv else value.new_empty((0,)),
        table.new_empty(table.shape) if needs_dtable else table.new_empty((0,)),
        table.new_empty(key.shape[:3] if needs_dkey_bias else (0,)),
    )


def _on_cuda(by_torch, by_triton):
    by_torch = dispatch.below_autograd(by_torch)

    def implementation(tensor, *args):
        # The kernel would need another shape for float64 on tensor cores, so torch's products serve it.
        return (by_torch if tensor.dtype == torch.float64 else by_triton)(tensor, *args)

    return implementation


for _name, _schema, _fake, _by_torch, _by_triton, _on_cpu in (
    ("attention_forward", _FORWARD, fake_forward, torch_path.forward, _triton_forward, cpp_path.forward),
    ("attention_backward", _BACKWARD, fake_backward, torch_path.backward, _triton_backward, cpp_path.backward),
    ("attention_paged", _PAGED, _fake_paged, torch_paged.paged, _triton_paged, torch_paged.paged_cpp),
):
    dispatch.define(
        _name, _schema, fake=_fake, by_torch=_by_torch, by_triton=_by_triton, served_by=BACKENDS,
        on_cuda=_on_cuda(_by_torch, _by_triton), on_cpu=_on_cpu,
    )  # fmt: skip
