# SPDX-License-Identifier: MIT
"""The cases of the smoke phase, simplest first.

Each computes with a kernel, in float64, and with eager torch in the kernel's dtype. A case is a function of (device, n)
that returns {name: (actual, exact, eager)}; eager is None where actual and exact must be equal bit for bit.
"""

from functools import partial

import torch

from dpb_triton import bias_attention, bias_attention_paged, bias_attention_varlen, expand_bias, reference

BF16, FP32 = torch.bfloat16, torch.float32
GRADIENTS = ("dq", "dk", "dv", "dtable")


def _randn(*shape, device, dtype=FP32):
    """Fresh numbers in every run, so that no case is right only for one draw."""
    return torch.randn(shape, device=device).to(dtype)


def expand(device, n, *, dtype, j, backend):
    """The bias of n queries and j keys, which must be exact, and its gradient."""
    table = _randn(3, max(n, j), device=device, dtype=dtype).requires_grad_()
    bias = expand_bias(table, n, j, backend=backend)
    dbias = _randn(3, n, j, device=device, dtype=dtype)
    (actual,) = torch.autograd.grad(bias, table, dbias)
    exact = reference.reduce(dbias.double(), table.shape[1])
    eager = reference.reduce(dbias, table.shape[1])
    return {"bias": (bias, reference.expand(table, n, j), None), "dtable": (actual, exact, eager)}


def _attention_inputs(device, n, *, dtype, head_dim, heads=4, kv_heads=None, batch=2):
    shapes = [(batch, count, n, head_dim) for count in (heads, kv_heads or heads, kv_heads or heads)]
    tensors = [_randn(*shape, device=device, dtype=dtype) for shape in shapes]
    return *tensors, _randn(heads, n, device=device), _randn(*shapes[0], device=device, dtype=dtype)


def _all_of(function, inputs, dtype, table_dtype):
    """The output of `function` and its gradients."""
    *qkv, table, dout = inputs
    leaves = [tensor.to(dtype) for tensor in qkv] + [table.to(table_dtype)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))


def _compared(ours, theirs, inputs, dtype, exact=None):
    """{name: (actual, exact, eager)}; `exact` is `theirs` where it can compute in float64."""
    results = [
        _all_of(ours, inputs, dtype, FP32),
        _all_of(exact or theirs, inputs, torch.float64, torch.float64),
        _all_of(theirs, inputs, dtype, FP32),
    ]
    return {name: found for name, *found in zip(("out", *GRADIENTS), *results, strict=True)}


def attention(device, n, *, dtype=BF16, head_dim=64, kv_heads=None, **options):
    """Attention and all its gradients, with the Triton kernels."""
    inputs = _attention_inputs(device, n, dtype=dtype, head_dim=head_dim, kv_heads=kv_heads)
    options |= {"enable_gqa": kv_heads is not None}
    ours = partial(bias_attention, backend="triton", **options)
    return _compared(ours, partial(reference.attention, **options), inputs, dtype)


def masked(device, n, **options):
    """A batch whose sequences end at other lengths."""
    ends = torch.tensor([n, n // 2 + 5], device=device)
    return attention(device, n, key_padding_mask=torch.arange(n, device=device) >= ends[:, None], **options)


def repeated(device, n, **options):
    """A call that is repeated from a recording (launching/replay.py), with other tensors than the recorded ones."""
    for _ in range(3):
        *leaves, dout = _attention_inputs(device, n, dtype=BF16, head_dim=options.get("head_dim", 64))
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = bias_attention(*leaves, is_causal=True, backend="triton")
        torch.autograd.grad(out, leaves, dout)
    return attention(device, n, is_causal=True, **options)


def dropout(device, n, *, dropout_p=0.3):
    """The mask depends only on the seed from torch's generator, so backend "torch" has the same mask."""
    inputs = _attention_inputs(device, n, dtype=BF16, head_dim=64)

    def seeded(backend, *tensors):
        torch.manual_seed(n)
        return bias_attention(*tensors, is_causal=True, dropout_p=dropout_p, backend=backend)

    return _compared(partial(seeded, "triton"), partial(seeded, "torch"), inputs, BF16)


def varlen(device, n, *, has_mask=False):
    """Packed sequences against each sequence alone."""
    lengths = (n // 2 + 3, 1, n // 4, n - n // 2 - n // 4 - 4)
    query, key, value, _, dout = (x[0] for x in _attention_inputs(device, n, dtype=BF16, head_dim=64, batch=1))
    inputs = *(x.transpose(0, 1) for x in (query, key, value)), _randn(4, n, device=device), dout.transpose(0, 1)
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    mask = _randn(n, device=device) if has_mask else None

    def packed(query, key, value, table):
        return bias_attention_varlen(
            query, key, value, table, starts, starts, is_causal=True, key_padding_mask=mask, backend="triton"
        )

    def alone(query, key, value, table):
        outs = []
        masks = mask[None].split(lengths, 1) if has_mask else [None] * len(lengths)
        for *rows, part in zip(*(x.split(lengths) for x in (query, key, value)), masks, strict=True):
            one = [x.transpose(0, 1)[None] for x in rows]
            outs.append(reference.attention(*one, table, is_causal=True, key_padding_mask=part)[0].transpose(0, 1))
        return torch.cat(outs)

    return _compared(packed, alone, inputs, BF16)


def step(device, n, *, i=1, head_dim=128, kv_heads=2, has_mask=False, **options):
    """The last i of n positions against all keys, as in decoding."""
    n = max(n, 256)  # fewer keys would go to the ordinary kernel
    sizes = {"head_dim": head_dim, "heads": 8, "kv_heads": kv_heads}
    query, key, value, table, _ = _attention_inputs(device, n, dtype=BF16, **sizes)
    query = query[:, :, n - i :]
    if has_mask:
        hidden = torch.rand(2, n, device=device) < 0.3
        value = value.masked_fill(hidden[:, None, :, None], float("nan"))  # must not matter
        options["key_padding_mask"] = hidden
    ours = bias_attention(query, key, value, table, enable_gqa=True, backend="triton", **options)
    inputs = query, key, value.nan_to_num(), table
    exact = reference.attention(*(x.double() for x in inputs), enable_gqa=True, **options)
    return {"out": (ours, exact, reference.attention(*inputs, enable_gqa=True, **options))}


def paged(device, n, *, page):
    """Two sequences of other lengths over a cache whose pages are scattered."""
    blocks = -(-n // page)
    query, pages = _randn(2, 8, 1, 128, device=device, dtype=BF16), torch.randperm(2 * blocks, device=device)
    pools = [_randn(2 * blocks, page, 2, 128, device=device, dtype=BF16) for _ in range(2)]
    table, lengths = _randn(8, n, device=device), (n, n // 2 + 1)
    seqlens, block_table = (torch.tensor(lengths, dtype=torch.int32, device=device), pages.view(2, blocks).int())
    ours = bias_attention_paged(query, *pools, table, block_table, seqlens, enable_gqa=True, backend="triton")
    results = []
    for dtype in (torch.float64, BF16):
        outs = []
        for b, length in enumerate(lengths):
            rows = [pool[pages.view(2, -1)[b]].flatten(0, 1)[:length].transpose(0, 1)[None].to(dtype) for pool in pools]
            curve = table.double() if dtype == torch.float64 else table
            outs.append(reference.attention(query[b : b + 1].to(dtype), *rows, curve, enable_gqa=True))
        results.append(torch.cat(outs))
    return {"out": (ours, *results)}


def _captured(call):
    """What `call` returns from the second replay of a CUDA graph; on a CPU from a second call."""
    if not torch.cuda.is_available():
        call()
        return call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and creates autograd's buffers
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for tensor in results:
        tensor.fill_(float("nan"))  # the replay must overwrite all of it
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return results


def graph(device, n, *, is_training):
    """A replayed graph gives the same bits as a plain call."""
    *leaves, dout = _attention_inputs(device, n, dtype=BF16, head_dim=64)
    leaves = [leaf.requires_grad_(is_training) for leaf in leaves]

    def call():
        out = bias_attention(*leaves, is_causal=True, backend="triton")
        return (out.detach(), *torch.autograd.grad(out, leaves, dout)) if is_training else (out,)

    plain = [tensor.clone() for tensor in call()]
    names = ("out", *GRADIENTS)[: len(plain)]
    return {name: (a, b, None) for name, a, b in zip(names, _captured(call), plain, strict=True)}


CASES = {
    "expand fp32": partial(expand, dtype=FP32, j=512, backend="triton"),
    "expand bf16": partial(expand, dtype=BF16, j=512, backend="triton"),
    "expand bf16, odd": partial(expand, dtype=BF16, j=515, backend="triton"),
    "attention bf16 d64": partial(attention),
    "attention bf16 d64 causal": partial(attention, is_causal=True),
    "attention bf16 d128 causal": partial(attention, head_dim=128, is_causal=True),
    "attention bf16 d256 causal": partial(attention, head_dim=256, is_causal=True),
    "attention bf16 d40": partial(attention, head_dim=40, is_causal=True),
    "attention fp16 d64 causal": partial(attention, dtype=torch.float16, is_causal=True),
    "attention fp32 d64 causal": partial(attention, dtype=FP32, is_causal=True),
    "attention bf16 window": partial(attention, window=(100, 20)),
    "attention bf16 grouped heads": partial(attention, kv_heads=2, is_causal=True),
    "attention bf16 softcap": partial(attention, softcap=5.0, is_causal=True),
    "attention bf16 dropout": dropout,
    "attention bf16 varlen": varlen,
    "attention bf16 varlen, key mask": partial(varlen, has_mask=True),
    "attention bf16 d64, key mask": partial(masked, is_causal=True),
    "attention bf16 d64, repeated": repeated,
    "attention bf16 d128, repeated": partial(repeated, head_dim=128),
    "step bf16": step,
    "step bf16 d64, one head a key head": partial(step, head_dim=64, kv_heads=8),
    "step bf16, key mask": partial(step, has_mask=True),
    "chunk bf16": partial(step, i=8, is_causal=True, window=(100, 0)),
    "step bf16, pages of 16": partial(paged, page=16),
    "step bf16, pages of 256": partial(paged, page=256),
    "graph forward": partial(graph, is_training=False),
    "graph training": partial(graph, is_training=True),
    "csrc fp32": partial(expand, dtype=FP32, j=512, backend="cuda"),
    "csrc bf16, odd": partial(expand, dtype=BF16, j=515, backend="cuda"),
}
