# SPDX-License-Identifier: MIT
"""The dropout mask depends on the seed and the position alone: it is the same for every backend, tiling and pass."""

import math
from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import Case, check, run, seed_of
from quick import slow

from dpb_triton import bias_attention, bias_attention_varlen, dispatch


def identity(batch, heads, j, device):
    return torch.eye(j, device=device).expand(batch, heads, j, j)


def forward(backend, query, key, value, table, seed, dropout_p, longest_query=None):
    """Call the operator itself, which takes a seed."""
    i, j = query.shape[2], key.shape[2]
    seed = torch.tensor([seed], device=query.device)
    arguments = (None, None, seed, longest_query or i, j, j - i, False, None, None)
    operator = dispatch.OPERATORS[f"attention_forward{dispatch.SUFFIXES[backend]}"]
    return operator(query, key, value, table, *arguments, 0.3, 0.0, dropout_p)[:2]


def kept(out):
    """The mask, read from an output whose value was the identity."""
    return out.detach().cpu() != 0


@pytest.mark.parametrize(
    ("seed", "dropout_p"),
    [
        (pytest.param if dropout_p == 0.5 or seed == 1 else slow)(seed, dropout_p)
        for seed in (0, 1, -1, 0x0123456789ABCDEF, -(2**63), 2**63 - 1)
        for dropout_p in (0.1, 0.5, 0.999)
    ],
)
def test_mask_is_the_hash(seed, dropout_p, attention_backend, device):
    query, key, _, table, *_ = Case(batch=2, heads=3, i=19, j=83).draw(device)
    out, lse = forward(attention_backend, query, key, identity(2, 3, 83, device), table, seed, dropout_p)
    keep = torch.from_numpy(attention_oracle.dropout_keep(seed, 2, 3, 19, 83, dropout_p))
    assert torch.equal(kept(out), keep)
    plain, plain_lse = forward(attention_backend, query, key, identity(2, 3, 83, device), table, seed, 0.0)
    torch.testing.assert_close(out, plain * keep.to(device) / (1 - dropout_p))
    assert torch.equal(lse, plain_lse), "dropout comes after the softmax"


@pytest.mark.parametrize("dropout_p", [1 - 2**-31, 1 - 2**-33, 1 - 2**-40])
def test_all_but_one_in_billions_is_dropped(dropout_p, attention_backend, device):
    """The threshold is rounded to 2^-32, and stays a number of 32 bits."""
    query, key, value, table, *_ = Case(batch=2, heads=3, i=19, j=83).draw(device)
    out, lse = forward(attention_backend, query, key, value, table, 1, dropout_p)
    assert not out.any() and lse.isfinite().all()


@pytest.mark.parametrize("attention_backend", ["torch", "cpp"])  # test_tiles.py has Triton's
def test_rows_beyond_32_bits(attention_backend, device):
    """A packed call numbers its rows by the longest sequence, and the hash takes all bits of a number."""
    query, key, _, table, *_ = Case(heads=5, i=3, j=83).draw(device)
    longest = 2**31 + 7
    value = identity(1, 5, 83, device)
    out, _ = forward(attention_backend, query, key, value, table, 5, 0.5, longest_query=longest)
    keep = attention_oracle.dropout_keep(5, 1, 5, 3, 83, 0.5, longest_query=longest)
    assert torch.equal(kept(out), torch.from_numpy(keep))


def test_mask_of_many_blocks(attention_backend, device):
    """The public function, with 150 rows and 200 keys, and with a window."""
    query, key, _, table, *_ = Case(i=150, j=200).draw(device)
    attend = partial(bias_attention, query, key, table=table, backend=attention_backend, dropout_p=0.4)
    torch.manual_seed(3)
    keep = kept(attend(identity(1, 2, 200, device)))
    seed = seed_of(3, device)
    assert torch.equal(keep, torch.from_numpy(attention_oracle.dropout_keep(seed, 1, 2, 150, 200, 0.4)))
    torch.manual_seed(3)
    windowed = attend(identity(1, 2, 200, device), window=(31, 12))
    band = torch.ones(150, 200).tril(50 + 12).triu(50 - 31).bool()
    assert torch.equal(kept(windowed), keep & band)


@pytest.mark.parametrize("case", [
    Case(options={"dropout_p": 0.3}),
    Case(options={"dropout_p": 0.8, "is_causal": True, "softcap": 2.0}),
    Case(batch=2, heads=2, kv_heads=1, i=33, j=61, dtype=torch.bfloat16, options={"dropout_p": 0.25, "signed": True}),
    Case(heads=4, kv_heads=2, i=70, j=141, options={"dropout_p": 0.5, "window": (60, 20)}),
    Case(i=5, j=9, table="masked", options={"dropout_p": 0.9}),
    Case(i=41, j=17, options={"dropout_p": 0.3, "offset": -24, "is_causal": True}),
])  # fmt: skip
def test_forward_and_backward_use_that_mask(case, attention_backend, device):
    keep = attention_oracle.dropout_keep(
        seed_of(11, device), case.batch, case.heads, case.i, case.j, case.options["dropout_p"]
    )
    torch.manual_seed(11)
    check(partial(bias_attention, backend=attention_backend), case, device, keep=keep)


def test_rate_and_independence(attention_backend, device):
    """Within five deviations the mean is 1 - p, and heads, rows, keys and calls agree as often as if independent."""
    query, key, _, table, *_ = Case(batch=2, heads=4, i=64, j=128).draw(device)
    p = 0.3
    attend = partial(bias_attention, query, key, identity(2, 4, 128, device), table, dropout_p=p)
    torch.manual_seed(0)
    first, second = (kept(attend(backend=attention_backend)) for _ in range(2))

    def assert_rate(events, rate):
        deviation = math.sqrt(rate * (1 - rate) / events.numel())
        assert abs(events.double().mean() - rate) < 5 * deviation

    assert_rate(first, 1 - p)
    agreement = p**2 + (1 - p) ** 2
    assert_rate(first == second, agreement)
    assert_rate(first[0] == first[1], agreement)
    assert_rate(first[:, 0] == first[:, 3], agreement)
    assert_rate(first[:, :, 1:] == first[:, :, :-1], agreement)
    assert_rate(first[..., 1:] == first[..., :-1], agreement)
    assert_rate(first[:, :, 1:, 1:] == first[:, :, :-1, :-1], agreement)
    assert_rate(first[0, 0], 1 - p)


def test_manual_seed_reproduces_and_two_calls_differ(attention_backend, device):
    tensors = Case().draw(device)
    attend = partial(bias_attention, backend=attention_backend, dropout_p=0.4)
    torch.manual_seed(1)
    first, second = run(attend, *tensors), run(attend, *tensors)
    torch.manual_seed(1)
    again = run(attend, *tensors)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["out"], second["out"])
    assert torch.equal(first["lse"], second["lse"])


def test_no_dropout_draws_no_number(attention_backend, device):
    query, key, value, table, *_ = Case().draw(device)
    torch.manual_seed(1)
    expected = torch.rand(3, device=device)
    torch.manual_seed(1)
    bias_attention(query, key, value, table, dropout_p=0.0, backend=attention_backend)
    assert torch.equal(torch.rand(3, device=device), expected)


def test_both_backends_drop_the_same(device):
    from dpb_triton.dispatch import why_not

    if why_not("triton", device):
        pytest.skip(why_not("triton", device))
    query, key, _, table, *_ = Case(batch=2, i=37, j=53).draw(device)
    masks = []
    for backend in ("torch", "triton", None):
        torch.manual_seed(9)
        out = bias_attention(query, key, identity(2, 2, 53, device), table, dropout_p=0.5, backend=backend)
        masks.append(kept(out))
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_packed_sequences_count_rows_by_the_longest(attention_backend, device):
    """row = (sequence * heads + head) * longest_query + x."""
    check_packed_rows(attention_backend, device)


def test_packed_sequences_count_rows_in_tiles_too(small_cuts, device):
    check_packed_rows("torch", device)


def check_packed_rows(attention_backend, device):
    lengths, longest = (5, 0, 19, 1), 23
    query, key, _, table, *_ = Case(i=25, j=25).draw(device)
    query, key = query[0].transpose(0, 1), key[0].transpose(0, 1)
    value = torch.cat([torch.eye(n, 19, device=device) for n in lengths])[:, None].expand(25, 2, 19)
    cu = torch.tensor([0, 5, 5, 24, 25], dtype=torch.int32, device=device)
    torch.manual_seed(6)
    out = bias_attention_varlen(
        query,
        key,
        value,
        table,
        cu,
        cu,
        max_seqlen_q=longest,
        max_seqlen_k=19,
        dropout_p=0.3,
        backend=attention_backend,
    )
    keep = attention_oracle.dropout_keep(seed_of(6, device), 4, 2, 19, 19, 0.3, longest_query=longest)
    start = 0
    for sequence, n in enumerate(lengths):
        mine = kept(out[start : start + n]).transpose(0, 1)
        assert torch.equal(mine[..., :n], torch.from_numpy(keep[sequence, :, :n, :n])), f"sequence {sequence}"
        start += n
