# SPDX-License-Identifier: MIT
"""Properties that hold for any numbers: plain attention, sums of gradients, slices, decoding, shards, repeats."""

from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import Case, run
from quick import slow

from dpb_triton import bias_attention, expand_bias

close = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)
SDPA = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def attend(attention_backend):
    return partial(bias_attention, backend=attention_backend)


@pytest.mark.parametrize("is_causal", [False, True])
def test_zero_table_is_plain_attention(is_causal, attend, device):
    query, key, value, table, dout, _ = Case(i=37, heads=2, kv_heads=1, table="zero").draw(device)
    options = {"is_causal": is_causal, "scale": 0.2, "enable_gqa": True}
    ours, theirs = ([x.detach().requires_grad_() for x in (query, key, value)] for _ in range(2))
    out, plain = attend(*ours, table, **options), SDPA(*theirs, **options)
    close(out, plain)
    out.backward(dout)
    plain.backward(dout)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine.grad, other.grad)


@pytest.mark.parametrize("signed", [False, True])
def test_is_sdpa_with_the_expanded_bias(signed, attend, device):
    tensors = Case(layout="transposed", options={"signed": signed}).draw(device)
    query, key, value, table, dout, _ = tensors
    ours, theirs = ([x.detach().requires_grad_() for x in (query, key, value, table)] for _ in range(2))
    bias = expand_bias(theirs[3], query.shape[2], key.shape[2], signed=signed, backend="torch")
    out, plain = attend(*ours, signed=signed), SDPA(*theirs[:3], attn_mask=bias[None])
    close(out, plain)
    out.backward(dout)
    plain.backward(dout)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine.grad, other.grad)


@pytest.mark.parametrize(
    "options", [{}, {"signed": True}, {"is_causal": True}, {"window": (3, 5), "softcap": 2.0}], ids=str
)
def test_the_gradients_of_a_row_sum_to_zero(options, attend, device):
    """A softmax ignores a constant added to all its scores, so the table's gradient sums to zero."""
    results = run(attend, *Case(i=33, j=61, options=options).draw(device)[:5], **options)
    total, size = results["dtable"].sum(1), results["dtable"].abs().sum(1)
    assert (total.abs() <= 1e-5 * size).all(), f"{total} of {size}"


def test_a_constant_added_to_the_table_moves_lse_only(attend, device):
    query, key, value, table, *_ = Case().draw(device)
    out, lse = attend(query, key, value, table, return_lse=True)
    other, moved = attend(query, key, value, table + 3.0, return_lse=True)
    close(other, out)
    close(moved, lse + 3.0)


OPTIONS = [{}, {"signed": True, "is_causal": True}, {"window": (9, 2), "softcap": 1.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_slice_of_queries_has_its_offset(options, attend, device):
    """The bias is Toeplitz: queries start .. stop with offset + start give rows start .. stop of the whole."""
    query, key, value, table, *_ = Case(i=29, j=43, options=options).draw(device)
    out, lse = attend(query, key, value, table, return_lse=True, **options)
    for start, stop in ((0, 10), (10, 29), (28, 29), (3, 4)):
        part = attend(query[:, :, start:stop], key, value, table, return_lse=True, offset=14 + start, **options)
        close(part[0], out[:, :, start:stop])
        close(part[1], lse[:, :, start:stop])


def test_moving_queries_and_keys_together_changes_nothing(attend, device):
    """Only the distance counts: queries 5 .. 20 with keys 2 .. 30 give these rows of the whole, other keys masked."""
    query, key, value, table, *_ = Case(i=43, j=43).draw(device)
    out = attend(query[:, :, 5:20], key[:, :, 2:30], value[:, :, 2:30], table, offset=3)
    mask = torch.zeros(43, dtype=torch.bool, device=device)
    mask[2:30] = True
    bias = expand_bias(table, 43, 43, backend="torch").masked_fill(~mask, -torch.inf)
    close(out, SDPA(query, key, value, attn_mask=bias[None])[:, :, 5:20])


@pytest.mark.parametrize("options", [{}, {"window": (6, None)}], ids=str)
def test_decoding_token_by_token_is_the_causal_whole(options, attend, device):
    query, key, value, table, *_ = Case(i=12, j=12).draw(device)
    whole = attend(query, key, value, table, is_causal=True, **options)
    for t in range(12):
        step = attend(query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1], table, **options)
        close(step[:, :, 0], whole[:, :, t])


def merge(parts):
    """Attention over all keys, from (out, lse) of each shard of the keys."""
    outs, lses = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    return ((lses - lse).exp()[..., None] * outs).sum(0), lse


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"signed": True, "window": (11, 20)}], ids=str)
def test_shards_of_keys_merge_by_lse(options, attend, device):
    """Values and gradients merge; under causality the last shard has no key for some rows."""
    tensors = Case(i=37, j=37, heads=2, kv_heads=1, options=options).draw(device)

    def sharded(query, key, value, table, return_lse):
        shards = zip(key.split([9, 17, 11], 2), value.split([9, 17, 11], 2), (0, 9, 26), strict=True)
        return merge(
            [attend(query, k, v, table, offset=-s, return_lse=True, enable_gqa=True, **options) for k, v, s in shards]
        )

    ours = run(sharded, *tensors)
    whole = run(partial(attend, enable_gqa=True), *tensors, **options)
    for name, tensor in ours.items():
        close(tensor, whole[name], msg=lambda message, name=name: f"{name}: {message}")


EVERYTHING = {"is_causal": True, "softcap": 3.0, "dropout_p": 0.2}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        slow(torch.float32, {}, id="float32"),
        pytest.param(torch.float32, EVERYTHING, id="float32, everything"),
        pytest.param(torch.bfloat16, {}, id="bfloat16"),
        slow(torch.bfloat16, EVERYTHING, id="bfloat16, everything"),
    ],
)
def test_repeats_bit_for_bit(dtype, options, attend, device):
    tensors = Case(i=70, j=133, heads=2, kv_heads=1, dtype=dtype).draw(device)

    def repeat():
        torch.manual_seed(5)
        return run(attend, *tensors, enable_gqa=True, **options)

    first, second = repeat(), repeat()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_forward_is_the_same_with_and_without_gradients(attend, device):
    query, key, value, table, *_ = Case().draw(device)
    trained = attend(query.requires_grad_(), key, value, table)
    with torch.no_grad():
        assert torch.equal(attend(query, key, value, table), trained)


def test_inputs_are_left_alone(attend, device):
    tensors = Case().draw(device)
    before = [tensor.clone() for tensor in tensors]
    run(attend, *tensors, window=(8, 3))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    "table, is_infinite",
    [("all masked", False), ("normal", False), ("normal", True)],
    ids=["all masked", "normal", "infinite dout"],
)
def test_rows_without_a_key(table, is_infinite, attend, device):
    """A row without a key gives out 0, lse -inf and zero gradients, and never NaN.

    The same holds for an infinite gradient from above if causality hides the keys. If -inf in the table hides them, it
    holds for backend "torch" only (docs/limits.md).
    """
    options = {} if table == "all masked" else {"offset": -60, "is_causal": True}
    *tensors, dout, dlse = Case(table=table, options=options).draw(device)
    if is_infinite:
        dout[..., ::2, :], dlse[..., ::3] = torch.inf, -torch.inf
    tensors = (*tensors, dout, dlse)
    with attention_oracle.poison():
        results = run(attend, *tensors, **options)
    assert (results.pop("lse") == -torch.inf).all()
    assert all((tensor == 0).all() for tensor in results.values())
