# SPDX-License-Identifier: MIT
"""Cases for several processes: ContextShards' placements, both methods, masks, packed sequences, dropout, compile."""

from functools import partial

import torch
import torch.distributed as dist
from distributed_context import EVERYTHING, TOLERANCES, inputs
from torch.distributed.device_mesh import init_device_mesh

from dpb_triton import ContextShards, bias_attention, bias_attention_varlen
from dpb_triton import context_parallel_attention as attend
from dpb_triton.dispatch import why_not

TOTAL = 37
PACKED = [0, 9, 9, 10, 26, 31, 37]  # with an empty sequence, and one of a single position
METHODS = ("ring", "all_to_all")


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def mask_of(kind, batch, total, dtype):
    """A key_padding_mask for all keys. The floating one has large numbers, -inf, and a gradient."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.rand(batch, total, generator=generator) < 0.3
    hidden[0, :20] = True  # no key of some ranks is seen
    if kind == "bool":
        return hidden
    numbers = 1e6 + 3 * torch.randn(batch, total, generator=generator, dtype=torch.float64)
    return numbers.masked_fill(hidden, -torch.inf).to(dtype).requires_grad_()


def compare(
    placement="zigzag",
    method="ring",
    *,
    dtype=torch.float64,
    heads=4,
    kv_heads=4,
    total=TOTAL,
    cu_seqlens=None,
    mask=None,
    mesh=None,
    backend="torch",
    call=attend,
    **options,
):
    """This rank's rows, their gradients, and the table's gradient summed over the ranks equal those of one process."""
    if why_not(backend, "cpu") is not None:
        return
    mesh = mesh_of_all() if mesh is None else mesh
    total = total if cu_seqlens is None else cu_seqlens[-1]
    *whole, table = inputs(dtype, heads, kv_heads, options.get("signed", False), total)
    mask = None if mask is None else mask_of(mask, 2, total, table.dtype)
    if cu_seqlens is not None:
        whole = [x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in whole]
        mask = None if mask is None else mask.detach()[1].requires_grad_(mask.requires_grad)
    dim = 2 if cu_seqlens is None else 0
    options |= {"enable_gqa": heads != kv_heads, "backend": backend, "return_lse": True}
    if cu_seqlens is None:
        expected, expected_lse = bias_attention(*whole, table, key_padding_mask=mask, **options)
        shards = ContextShards(mesh, total, placement=placement)
    else:
        cu = torch.tensor(cu_seqlens, dtype=torch.int32)
        expected, expected_lse = bias_attention_varlen(*whole, table, cu, cu, key_padding_mask=mask, **options)
        shards = ContextShards(mesh, cu_seqlens=cu_seqlens, placement=placement)
    generator = torch.Generator().manual_seed(2)
    dout, dlse = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (expected, expected_lse))
    dlse = dlse.masked_fill(expected_lse == -torch.inf, 0)
    torch.autograd.backward([expected, expected_lse], [dout, dlse])

    local = [shards.shard(x.detach(), dim).requires_grad_() for x in whole]
    local_table = table.detach().clone().requires_grad_()
    local_mask = (
        None if mask is None else shards.shard(mask.detach(), mask.dim() - 1).requires_grad_(mask.requires_grad)
    )
    out, lse = call(*local, local_table, shards, method=method, key_padding_mask=local_mask, **options)
    assert out.dtype == dtype and out.shape[dim] == shards.length
    assert (out.transpose(1, 2) if dim == 2 else out).is_contiguous()
    torch.autograd.backward([out, lse], [shards.shard(dout, dim), shards.shard(dlse, dim)])
    dist.all_reduce(local_table.grad, group=mesh.get_group())

    close = partial(torch.testing.assert_close, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])
    close(out, shards.shard(expected, dim))
    close(lse, shards.shard(expected_lse, dim))
    close(shards.unshard(out, dim), expected)
    for name, ours, theirs in zip(("query", "key", "value"), local, whole, strict=True):
        close(ours.grad, shards.shard(theirs.grad, dim), msg=lambda m, name=name: f"gradient of {name}: {m}")
    size = table.grad.abs().max()
    close(local_table.grad / size, table.grad / size, msg=lambda m: f"gradient of table: {m}")
    if mask is not None and mask.requires_grad:
        close(local_mask.grad, shards.shard(mask.grad, mask.dim() - 1), msg=lambda m: f"gradient of mask: {m}")


CASES = {
    f"shards {placement} {method} {name}": partial(compare, placement, method, **options)
    for placement in ("zigzag", "contiguous")
    for method in METHODS
    for name, options in {
        "causal": {"is_causal": True},
        "everything": EVERYTHING | ({} if method == "ring" else {"kv_heads": 4}),
        "packed": {"cu_seqlens": PACKED, "is_causal": True, "kv_heads": 2, "softcap": 1.5},
        "packed and hidden": {"cu_seqlens": PACKED, "mask": "bool", "window": (4, 3)},
        "packed and weighted": {"cu_seqlens": PACKED, "mask": "floating", "signed": True},
        "hidden": {"mask": "bool", "is_causal": True},
        "weighted": {"mask": "floating", "softcap": 2.0},
    }.items()
}
