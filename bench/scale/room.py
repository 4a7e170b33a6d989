# SPDX-License-Identifier: MIT
"""Bytes that a rank holds at the peak of one layer's forward and backward.

    own        q, k, v, their gradients, out and dout of the rank's positions, and the softmax's state
    travelling the ring's shards and their float32 gradients, two of each; all-to-all's whole sequences of its heads,
               and the messages that brought them
    sums       what the ring adds up in float32, and the operators' results before they are added
    table      of all distances, and its gradient: O(total), the same on every rank
    MLP        what its backward needs of all distances: O(total), too

Left out: small buffers of the kernels, and what the allocator rounds.
"""

from .model import ALL_TO_ALL, _cdiv

FLOAT = 4
MIB = 2**20


def own_bytes(work, ranks):
    """(q and out, k and v, the state) of a rank's positions."""
    state = 2 * FLOAT * work.batch * work.total * work.heads // ranks
    return work.rows(ranks), work.shard(ranks, work.size), state


def _wide(size, work):
    """The bytes of the same numbers in float32."""
    return size * FLOAT // work.size


def ring_forward(work, ranks):
    """Beyond q, k, v and the table."""
    rows, keys, state = own_bytes(work, ranks)
    shards = (2 if ranks > 1 else 1) * keys
    # float32 sums, a call's own result with its state and lse, and the result
    return {"own": rows + state, "travelling": shards, "sums": _wide(rows, work) + rows + 1.5 * state}


def ring_backward(work, ranks):
    """Beyond q, k, v, dout, the table and what forward saved."""
    rows, keys, _ = own_bytes(work, ranks)
    copies = 2 if ranks > 1 else 1
    shards = copies * (keys + _wide(keys, work))
    of_a_call = 2 * _cdiv(work.total, ranks)  # distances, or half of them in a zigzag
    table = FLOAT * work.heads * (work.total + of_a_call)
    return {"travelling": shards, "sums": _wide(rows, work) + rows + keys, "table": table}


def all_to_all_forward(work, ranks):
    """Beyond q, k, v and the table: all heads of own positions become some heads of all positions."""
    rows, keys, state = own_bytes(work, ranks)
    keys *= max(1, ranks // work.kv_heads)
    # q, k and v side by side, sent and received; out of the operator, sent, received, and in the order of the rows
    return {"own": rows, "travelling": 2 * (rows + keys) + 3 * rows + 1.5 * state}


def all_to_all_backward(work, ranks):
    """Beyond q, k, v, dout, the table and what forward saved."""
    rows, keys, _ = own_bytes(work, ranks)
    keys *= max(1, ranks // work.kv_heads)
    table = FLOAT * work.total * (work.heads // ranks + work.heads)
    # dout received; the gradients of the operator, and sent
    return {"travelling": rows + 2 * (rows + keys), "table": table}


def saved_bytes(work, ranks, method):
    """What forward keeps for backward, and its result: beyond q, k and v."""
    rows, keys, state = own_bytes(work, ranks)
    if method == ALL_TO_ALL:  # q, k and v as received, and the operator's out
        return 3 * rows + keys * max(1, ranks // work.kv_heads) + state
    return rows + state


def mlp_bytes(work):
    """What the MLP's backward needs: of each hidden layer, before and after its activation; and the table."""
    return FLOAT * work.total * (2 * work.depth * work.mlp_dim + work.heads)


def peak(work, ranks, method):
    """{part: bytes} of forward and backward of a layer with its MLP."""
    parts = all_to_all_backward(work, ranks) if method == ALL_TO_ALL else ring_backward(work, ranks)
    rows, keys, _ = own_bytes(work, ranks)
    # q, k, v; dout, dq, dk, dv
    parts["own"] = saved_bytes(work, ranks, method) + 3 * rows + 2 * keys
    parts["MLP"] = mlp_bytes(work)
    return parts


# csrc/attention_cpu.cpp: TASKS and SPLIT
CPU_TASKS, CPU_SPLIT = 16, 512


def cpu_buffers(work, queries, keys, heads, kv_heads):
    """The buffers of the CPU's backward kernel: a dq for each part of the keys, and a dtable for each task."""
    wanted = -(-CPU_TASKS // kv_heads)
    parts = min(wanted, work.batch)
    splits = min(max(1, keys // CPU_SPLIT), -(-wanted // parts))
    tables = parts * splits * heads * work.total
    return FLOAT * (tables + (work.batch * heads * splits * queries * work.head_dim if splits > 1 else 0))
