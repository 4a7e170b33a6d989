# SPDX-License-Identifier: MIT
"""Attention over a paged cache equals attention over the same keys in a row; bad arguments are refused."""

import re

import attention_oracle
import pytest
import torch
from torch.autograd import forward_ad

from dpb_triton import bias_attention, bias_attention_paged, dispatch
from dpb_triton.attention import cpp_path, paged


def draw(lengths, *, i=1, page=16, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32, signed=False,
         spare=1, device="cpu"):  # fmt: skip
    """Arguments; the pages of each sequence are scattered in the pool, and whatever no sequence uses holds NaN."""
    torch.manual_seed(0)
    blocks = max(-(-length // page) for length in lengths) + spare
    order = torch.randperm(len(lengths) * blocks + 3)
    table = torch.full((len(lengths), blocks), 10**6, dtype=torch.int32)  # only the used blocks have a page
    pools = [torch.full((len(order), page, kv_heads, dim), torch.nan, dtype=dtype) for dim in (head_dim, value_dim)]
    rows, place = [], 0
    for b, length in enumerate(lengths):
        key, value = (torch.randn(length, kv_heads, dim).to(dtype) for dim in (head_dim, value_dim))
        for block in range(-(-length // page)):
            table[b, block] = order[place]
            for pool, whole in zip(pools, (key, value), strict=True):
                part = whole[block * page : (block + 1) * page]
                pool[order[place], : len(part)] = part
            place += 1
        rows.append((key.to(device), value.to(device)))
    query = torch.randn(len(lengths), heads, i, head_dim).to(device, dtype)
    n = max(lengths)
    curve = torch.randn(heads, 2 * n - 1 if signed else n, device=device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return [query, *(pool.to(device) for pool in pools), curve, table.to(device), lengths], rows


CASES = {
    "one query": ({}, {}),
    "odd page": ({"page": 7, "i": 2, "spare": 0}, {"is_causal": True}),
    "page of one": ({"page": 1}, {"window": (9, 0)}),
    "long page": ({"page": 64, "i": 5}, {"is_causal": True, "window": (30, None), "softcap": 3.0, "scale": 0.3}),
    "a prompt": ({"i": 33, "heads": 6, "kv_heads": 2}, {"is_causal": True}),
    "signed": ({"i": 3, "signed": True, "value_dim": 24}, {"window": (None, 2), "signed": True}),
    "bf16": ({"dtype": torch.bfloat16, "head_dim": 40}, {"is_causal": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_like_keys_in_a_row(name, attention_backend, device):
    sizes, options = CASES[name]
    arguments, rows = draw([33, 100, 48], **sizes, device=device)
    out, lse = bias_attention_paged(*arguments, enable_gqa=True, return_lse=True, backend=attention_backend, **options)
    assert torch.equal(out, bias_attention_paged(*arguments, enable_gqa=True, backend=attention_backend, **options))
    query, table = arguments[0], arguments[3]
    n = (table.shape[1] + 1) // 2 if options.get("signed") else table.shape[1]
    assert n == 100
    for b, (key, value) in enumerate(rows):
        whole = [x.transpose(0, 1)[None] for x in (key, value)]
        expected = bias_attention(
            query[b : b + 1], *whole, table, enable_gqa=True, return_lse=True, backend="torch", **options
        )
        tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), expected, atol=tolerance, rtol=tolerance)


def test_the_compiled_kernels_serve_a_cpu(monkeypatch):
    if reason := dispatch.why_not("cpp", "cpu"):
        pytest.skip(reason)
    calls, forward = [], cpp_path.forward
    monkeypatch.setattr(cpp_path, "forward", lambda *args: calls.append(args) or forward(*args))
    arguments, _ = draw([33, 20])
    for backend, expected in ((None, 2), ("cpp", 4), ("torch", 4)):
        bias_attention_paged(*arguments, enable_gqa=True, backend=backend)
        assert len(calls) == expected


def test_float64(device):
    arguments, rows = draw([33], dtype=torch.float64, device=device)
    out = bias_attention_paged(*arguments, enable_gqa=True)
    key, value = (x.transpose(0, 1)[None] for x in rows[0])
    torch.testing.assert_close(out, bias_attention(arguments[0], key, value, arguments[3], enable_gqa=True))


@pytest.mark.parametrize("big", [2**31 - 1, 2**62])
def test_a_window_without_end(big, attention_backend, device):
    arguments, _ = draw([33, 100], i=3, device=device)
    options = {"enable_gqa": True, "backend": attention_backend}
    expected = bias_attention_paged(*arguments, is_causal=True, **options)
    torch.testing.assert_close(bias_attention_paged(*arguments, window=(big, 0), **options), expected)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_pages_far_apart(dim, attention_backend, device):
    """Addresses beyond element 2^31: of pages, of keys in a page, of heads; and of the rows of block_table."""
    if device != "cpu":
        pytest.skip("the test needs memory that is reserved but never touched; a GPU has none")
    lengths, sizes, stride = (
        ([100], {"page": 3}, attention_oracle.FAR),
        ([97, 3, 1], {"page": 100, "kv_heads": 1, "head_dim": 8, "value_dim": 9}, 2**25 - 8),
        ([33, 2, 1], {"heads": 3, "kv_heads": 3, "head_dim": 8}, attention_oracle.FARTHER),
    )[dim]
    arguments, _ = draw(lengths, **sizes, device=device)
    assert dim > 0 or len(arguments[1]) > 34
    near = bias_attention_paged(*arguments, enable_gqa=True, backend=attention_backend)
    arguments[1:3] = [attention_oracle.far_apart(pool, dim, stride) for pool in arguments[1:3]]
    arguments[4] = attention_oracle.far_apart(arguments[4], 0, attention_oracle.FARTHER)
    assert torch.equal(near, bias_attention_paged(*arguments, enable_gqa=True, backend=attention_backend))


def test_strided_integers(attention_backend, device):
    """block_table and seqlens_k may be slices, or transposed."""
    arguments, _ = draw([33, 100, 48], device=device)
    expected = bias_attention_paged(*arguments, enable_gqa=True, backend=attention_backend)
    table, lengths = arguments[4:]
    arguments[5] = torch.stack((lengths, lengths * 0 - 1), 1)[:, 0]
    for arguments[4] in (table.mT.contiguous().mT, torch.stack((table, table * 0), 2)[..., 0], table[:, :7]):
        found = bias_attention_paged(*arguments, enable_gqa=True, backend=attention_backend)
        assert torch.equal(found, expected)


def test_wrong_numbers_stay_in_the_pool(device):
    """A GPU's numbers are not checked: a wrong page or length reads other keys, but no other memory."""
    if reason := dispatch.why_not("triton", device):
        pytest.skip(reason)
    paged = dispatch.OPERATORS["attention_paged_triton"]
    (query, *pools, table, pages, lengths), _ = draw([33, 100, 48], spare=0, device=device)
    pools = [pool.transpose(1, 2).nan_to_num(0.0) for pool in pools]
    pages[:, 1], pages[:, 2] = 10**6, -5
    lengths[:] = torch.tensor([48, -7, 2**31 - 1], device=device)
    out, lse = paged(query, *pools, table, pages, lengths, False, None, None, 0.25, 0.0)
    assert out.isfinite().all() and lse[1].isneginf().all() and not out[1].any()
    assert lse[0].isfinite().all() and lse[2].isfinite().all()


def test_under_compile(attention_backend, device):
    def step(*arguments):
        return bias_attention_paged(*arguments, enable_gqa=True, is_causal=True, backend=attention_backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for lengths in ([33, 100], [40, 7, 3]):
            arguments, _ = draw(lengths, device=device)
            assert torch.equal(compiled(*arguments), step(*arguments))


def test_nothing_to_do(attention_backend, device):
    arguments, _ = draw([3], i=0, device=device)
    assert bias_attention_paged(*arguments, enable_gqa=True, backend=attention_backend).shape == (1, 4, 0, 16)
    query, keys, values, table, *_ = arguments
    none = torch.zeros(0, 2, dtype=torch.int32, device=device)
    out = bias_attention_paged(
        query[:0], keys, values, table, none, none[:, 0], enable_gqa=True, backend=attention_backend
    )
    assert out.shape == (0, 4, 0, 16)


def change(place, function):
    def changed(arguments):
        arguments[place] = function(arguments[place])

    return changed


BAD = {
    "query": (change(0, lambda x: x[0]), ValueError, "query must have 4 dimensions"),
    "dtype": (change(1, lambda x: x.half()), TypeError, "key_pages must have query's dtype torch.float32"),
    "dtype of values": (change(2, lambda x: x.half()), TypeError, "value_pages must have query's dtype torch.float32"),
    "pages": (change(2, lambda x: x[:-1]), ValueError, "value_pages must have the pages"),
    "heads": (change(2, lambda x: x[:, :, :1]), ValueError, "value_pages must have the pages"),
    "page of values": (change(2, lambda x: x[:, :-1]), ValueError, "value_pages must have the pages"),
    "head_dim": (change(1, lambda x: x[..., :8]), ValueError, "key_pages must have query's head_dim 16"),
    "value_dim": (
        change(2, lambda x: x.repeat(1, 1, 1, 20)),
        ValueError,
        "value_pages must have a head_dim of 1 to 256",
    ),
    "head_dim of both": (
        lambda a: a.__setitem__(slice(0, 2), [x.repeat(1, 1, 1, 17) for x in a[:2]]),
        ValueError,
        "query must have a head_dim of 1 to 256",
    ),
    "page": (lambda a: a.__setitem__(slice(1, 3), [x[:, :0] for x in a[1:3]]), ValueError, "at least one key"),
    "table": (change(3, lambda x: x[:, :50]), ValueError, "table is too short"),
    "block_table": (change(4, lambda x: x.long()), TypeError, "block_table must be int32"),
    "blocks": (change(4, lambda x: x[0]), ValueError, "block_table must have 2 dimensions"),
    "rows": (change(4, lambda x: x[:1]), ValueError, "block_table must have one row a sequence, 2"),
    "number": (change(4, lambda x: x + 50), ValueError, "block_table must hold pages below"),
    "seqlens_k": (change(5, lambda x: x[:, None]), ValueError, "seqlens_k must have 1 dimension"),
    "length": (change(5, lambda x: x + 1000), ValueError, "seqlens_k must be between the number of queries, 1, and"),
    "a key too many": (
        lambda a: a.__setitem__(slice(4, 6), (a[4][:, :4], a[5] + 5)),
        ValueError,
        "block_table holds, 64, got 65 for sequence 1",
    ),
    "no keys": (change(5, lambda x: x * 0), ValueError, "got 0 for sequence 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    damage, error, message = BAD[name]
    arguments, _ = draw([33, 60])
    damage(arguments)
    with pytest.raises(error, match=re.escape(message)):
        bias_attention_paged(*arguments, enable_gqa=True)


@pytest.mark.parametrize(("place", "page"), [((0, 2), 13), ((1, 0), 13), ((1, 3), -1)])
def test_the_first_page_that_is_none(place, page):
    """The pool has 13 pages. The last block of a sequence may hold one key."""
    arguments, _ = draw([33, 60])
    arguments[4][place] = 12
    bias_attention_paged(*arguments, enable_gqa=True)
    arguments[4][place] = page
    with pytest.raises(ValueError, match=f"pages below 13, got .* for sequence {place[0]}"):
        bias_attention_paged(*arguments, enable_gqa=True)


def test_the_shortest_table():
    """Of 60 keys the query is the last one, so without a window its distances reach 59, into the past."""
    arguments, _ = draw([33, 60])
    table = arguments[3]
    for n, options in ((60, {"is_causal": True}), (6, {"window": (5, 0)}), (60, {})):
        arguments[3] = table[:, :n]
        bias_attention_paged(*arguments, enable_gqa=True, **options)
        arguments[3] = table[:, : n - 1]
        with pytest.raises(ValueError, match="table is too short"):
            bias_attention_paged(*arguments, enable_gqa=True, **options)
    arguments[3] = torch.randn(4, 2 * 60 - 1)
    bias_attention_paged(*arguments, enable_gqa=True, signed=True)
    arguments[3] = arguments[3][:, 1:-1]
    with pytest.raises(ValueError, match="table is too short"):
        bias_attention_paged(*arguments, enable_gqa=True, signed=True)


@pytest.mark.parametrize("place", range(4))
def test_no_argument_may_need_a_gradient(place):
    arguments, _ = draw([33])
    arguments[place].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        bias_attention_paged(*arguments, enable_gqa=True)


@pytest.mark.parametrize("place", range(4))
def test_no_argument_may_have_a_tangent(place):
    arguments, _ = draw([33])
    with forward_ad.dual_level():
        arguments[place] = forward_ad.make_dual(arguments[place], torch.ones_like(arguments[place]))
        with pytest.raises(RuntimeError, match=r"neither torch\.func transforms"):
            bias_attention_paged(*arguments, enable_gqa=True)


def test_no_onnx_export(monkeypatch):
    monkeypatch.setattr(paged, "is_in_onnx_export", lambda: True)
    arguments, _ = draw([33])
    with pytest.raises(RuntimeError, match=r"nor torch\.jit\.trace"):
        bias_attention_paged(*arguments, enable_gqa=True)


def test_no_trace():
    arguments, _ = draw([33])
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"neither torch.func transforms nor torch.jit.trace"):
        torch.jit.trace(lambda *args: bias_attention_paged(*args, enable_gqa=True), tuple(arguments))


def test_no_gradients():
    arguments, _ = draw([33])
    arguments[3].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        bias_attention_paged(*arguments, enable_gqa=True)
    inputs = arguments[0], *(x.transpose(1, 2) for x in arguments[1:3]), *arguments[3:], False, None, None, 0.25, 0.0
    with torch.no_grad():
        out = bias_attention_paged(*arguments, enable_gqa=True)
        torch.testing.assert_close(torch.ops.dpb_triton.attention_paged(*inputs)[0], out)
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.ops.dpb_triton.attention_paged(*inputs)
    with pytest.raises(ValueError, match="must have query's 4 heads"):
        bias_attention_paged(arguments[0], *arguments[1:3], arguments[3].detach(), *arguments[4:])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.jvp(
            lambda x: bias_attention_paged(x, *arguments[1:3], arguments[3].detach(), *arguments[4:], enable_gqa=True),
            (arguments[0],), (arguments[0],),
        )  # fmt: skip
