# SPDX-License-Identifier: MIT
"""The attention kernels' launches, and what their compiled code promises.

No spill to memory, and in the loop over whole tiles: tensor-core instructions, no local memory, and on NVIDIA at most
one load of the bias a score. It is about half of one where a thread holds two rows of an accumulator, 8 apart, and
columns 8 apart, whose elements share diagonals (sm_80, sm_90); on sm_100 it holds one row. The table's gradient loads
its bias tile outside of its loop.
"""

KERNELS = ("_forward_kernel", "_dkdv_kernel", "_dq_kernel", "_dtable_kernel")


def launch_forward(dtype, *, head_dim, i=4096, j=4096, **options):
    """Launch the forward pass, in the layout (batch, length, heads, head_dim)."""
    from dpb_triton.kernels import attention_forward

    query, key, table, seqlens, arguments = _arguments(dtype, head_dim, i, j, **options)
    attention_forward.forward(query, key, key, table, seqlens, *arguments)


def launch_backward(dtype, *, head_dim, i=4096, j=4096, **options):
    """Launch the backward pass with all its gradients."""
    import torch

    from dpb_triton.kernels import attention_backward

    query, key, table, seqlens, arguments = _arguments(dtype, head_dim, i, j, **options)
    state = torch.empty((2, *query.shape[:3]), device="meta")
    dlse = state[0] if options.get("dropout_p") else None
    attention_backward.backward(
        query, dlse, query, key, key, table, query, state, seqlens, *arguments, False, True, True, True
    )


def _arguments(
    dtype,
    head_dim,
    i,
    j,
    is_causal=True,
    window=None,
    softcap=0.0,
    dropout_p=0.0,
    group=1,
    is_packed=False,
    is_float32=False,
):
    import torch  # here, so that the command's own process stays free of torch and Triton

    dtype = torch.float32 if is_float32 else dtype
    batch, heads = (1, 8) if is_packed else (2, 8)
    query = torch.empty((batch, i, heads, head_dim), dtype=dtype, device="meta").transpose(1, 2)
    key = torch.empty((batch, j, heads // group, head_dim), dtype=dtype, device="meta").transpose(1, 2)
    table = torch.empty((heads, max(i, j)), device="meta")
    seqlens = torch.empty((4, 5), dtype=torch.int32, device="meta") if is_packed else None
    seed = torch.empty((1,), dtype=torch.int64, device="meta") if dropout_p else None
    bounds = window, 0 if is_causal else None
    return query, key, table, seqlens, (seed, i, j, j - i, False, *bounds, head_dim**-0.5, softcap, dropout_p)


def main_loop(loops):
    """The loop over whole tiles: of those with tensor-core instructions the shortest, the others have masks."""
    return min(
        (loop for loop in loops if loop["counts"].get("tensor")), key=lambda loop: loop["instructions"], default=None
    )


def bias_loads(record):
    """Loads of single elements in the main loop: the bias tile's, and in backward's a few of each query's numbers."""
    return record["interior"]["counts"].get("load.32", 0) if record["interior"] else None


def broken(record):
    """What an attention kernel breaks of what it promises, beyond spills and room, as sentences."""
    loop = record["interior"]
    if loop is None:
        return ["no loop with tensor-core instructions"]
    found = []
    if loop["counts"].get("local"):
        found.append(f"main loop: {loop['counts']['local']} accesses of local memory")
    # One exp2 a score that a thread holds. Backward's three numbers a query are single loads too; in dkdv's transposed
    # tiles a thread may hold as many queries as scores.
    scores = loop["counts"].get("exp2", 0)
    most = {"_dtable_kernel": 12, "_dkdv_kernel": 4 * scores + 12}.get(record["kernel"], scores + 12)
    if record["arch"].startswith("sm_") and bias_loads(record) > most:
        found.append(f"main loop: {bias_loads(record)} loads of single elements for {scores} scores, more than {most}")
    return found
