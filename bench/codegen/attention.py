# SPDX-License-Identifier: MIT
"""Launches of the attention kernels on tensors without memory: head_dims, option sets, strides, tiles."""

TILED = ("_forward_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel")  # their constants are arguments
KERNELS = (*TILED, "_decode_kernel")

# Options that people train with, one at a time: the promises hold for these.
TRAINED = {
    "causal": {},
    "full": {"is_causal": False},
    "dropout": {"dropout_p": 0.1},
    "gqa": {"group": 4},
    "window": {"window": 1000},
    "softcap": {"softcap": 30.0},
    "varlen": {"is_packed": True},
    "mask": {"has_mask": True},
    "qkv": {"is_projection": True},  # query, key and value are slices of one projection
}
OPTIONS = TRAINED | {
    "3 heads": {"heads": 3},  # rows of 40 or 72 elements then have a stride that is a multiple of 8, not of 16
    "ragged": {"i": 4095, "j": 4095},
    "all": {"is_packed": True, "dropout_p": 0.1, "softcap": 30.0, "window": 1000, "group": 4},
}


def launch_forward(dtype, *, head_dim, i=4096, j=4096, blocks=None, **options):
    """Launch the forward pass, in the layout (batch, length, heads, head_dim); `blocks`: {kernel: its constants}.

    options: of `_arguments`; value_dim is head_dim unless they say otherwise.
    """
    from dpb_triton.attention.kernels import forward as attention_forward

    query, key, value, table, key_bias, *arguments = _arguments(dtype, head_dim, i, j, **options)
    attention_forward.forward(query, key, value, table, key_bias, *arguments, blocks=(blocks or {}).get("forward"))


def launch_paged(dtype, *, head_dim, page, group=8, heads=8, i=1, j=8192):
    """Launch attention over a paged cache."""
    import torch

    from dpb_triton.attention.kernels import paged

    query = _rows(dtype, 4, heads, i, head_dim)
    key = value = _rows(dtype, 512, heads // group, page, head_dim)
    pages = -(-j // page)
    table = torch.empty((heads, pages * page), device="meta")
    blocks, lengths = (torch.empty(size, dtype=torch.int32, device="meta") for size in ((4, pages), (4,)))
    paged.paged(query, key, value, table, blocks, lengths, False, None, None, head_dim**-0.5, 0.0)


def launch_backward(dtype, *, head_dim, i=4096, j=4096, blocks=None, **options):
    """Launch the backward pass with every gradient except a mask's: the masks that people train with are bool."""
    import torch

    from dpb_triton.attention.kernels import backward as attention_backward

    query, key, value, table, key_bias, *arguments = _arguments(dtype, head_dim, i, j, **options)
    state = torch.empty((2, *query.shape[:3]), device="meta")
    dlse = state[0] if options.get("dropout_p") else None
    out = _rows(dtype, *query.shape[:3], value.shape[3])
    inputs = query, key, value, table, key_bias
    needs = False, True, True, True, False
    attention_backward.backward(out, dlse, *inputs, out, state, *arguments, *needs, blocks=blocks)


def _rows(dtype, batch, heads, length, head_dim):
    import torch  # here, to keep torch and Triton out of the command's own process

    return torch.empty((batch, length, heads, head_dim), dtype=dtype, device="meta").transpose(1, 2)


def _arguments(dtype, head_dim, i, j, is_causal=True, window=None, softcap=0.0, dropout_p=0.0, group=1,
               is_packed=False, is_projection=False, has_mask=False, heads=8, value_dim=None):  # fmt: skip
    import torch

    batch = 1 if is_packed else 2
    dims = head_dim, head_dim, value_dim or head_dim
    lengths_heads = (i, heads), (j, heads // group), (j, heads // group)
    query, key, value = (_rows(dtype, batch, h, n, dim) for dim, (n, h) in zip(dims, lengths_heads, strict=True))
    if is_projection:
        packed = torch.empty((batch, i, heads * sum(dims)), dtype=dtype, device="meta")
        parts = packed.split([heads * dim for dim in dims], 2)
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts)
    table = torch.empty((heads, max(i, j)), device="meta")
    key_bias = torch.empty((batch, j), device="meta") if has_mask else None
    seqlens = torch.empty((4, 5), dtype=torch.int32, device="meta") if is_packed else None
    seed = torch.empty((1,), dtype=torch.int64, device="meta") if dropout_p else None
    bounds = window, 0 if is_causal else None
    numbers = i, j, j - i, False, *bounds, head_dim**-0.5, softcap, dropout_p
    return query, key, value, table, key_bias, seqlens, seed, *numbers


def main_loop(loops):
    """The loop over whole tiles: the shortest one with tensor-core instructions; the others have masks."""
    return min(
        (loop for loop in loops if loop["counts"].get("tensor")), key=lambda loop: loop["instructions"], default=None
    )
