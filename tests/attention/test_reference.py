# SPDX-License-Identifier: MIT
"""The oracle and `reference.attention` were written independently; in float64 they agree up to rounding."""

import attention_oracle
import pytest
import torch
from attention_oracle import Case

from dpb_triton import reference

OPTIONS = {
    "plain": {},
    "signed": {"signed": True},
    "causal": {"is_causal": True},
    "causal signed window": {"is_causal": True, "signed": True, "window": (6, 3)},
    "softcap and scale": {"softcap": 1.5, "scale": 0.3},
    "left": {"window": (5, None)},
    "right": {"window": (None, 1)},
    "both": {"window": (3, 2)},
    "before the keys": {"offset": -30, "is_causal": True},
    "beyond the keys": {"offset": 60, "window": (4, 0)},
    "in between": {"offset": -7},
}


def assert_same(case, keep=None):
    tensors = case.draw()
    mask = None if keep is None else torch.from_numpy(keep)
    options = case.options | {"enable_gqa": case.kv_heads is not None}
    exact = attention_oracle.attention(*tensors, options=options, keep=keep)
    ours = attention_oracle.run(reference.attention, *tensors, keep=mask, **options)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, exact[name][0], msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("table", attention_oracle.TABLES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, table):
    common = {"dtype": torch.float64, "heads": 4, "kv_heads": 2, "i": 7, "j": 11, "head_dim": 5, "value_dim": 3}
    assert_same(Case(**common, table=table, options=options))


@pytest.mark.parametrize("layout", attention_oracle.LAYOUTS)
def test_layouts(layout):
    assert_same(Case(dtype=torch.float64, layout=layout, i=8, j=8))


@pytest.mark.parametrize(("i", "j"), [(1, 1), (1, 7), (0, 5), (0, 0), (3, 0)])
def test_small_and_empty(i, j):
    assert_same(Case(dtype=torch.float64, i=i, j=j, options={"offset": j - i}))


def test_dropout():
    keep = attention_oracle.dropout_keep(0x0123456789ABCDEF, 2, 2, 21, 37, 0.3)
    assert_same(Case(batch=2, dtype=torch.float64, options={"dropout_p": 0.3}), keep)


def test_dropout_hash():
    """The oracle's hash agrees with one written here with Python's big integers."""
    mask = 0xFFFFFFFF

    def mix(h):
        h = ((h ^ (h >> 16)) * 0x7FEB352D) & mask
        h = ((h ^ (h >> 15)) * 0x846CA68B) & mask
        return h ^ (h >> 16)

    def keeps(seed, row, y, threshold):
        k1 = mix((mix((row & mask) ^ (seed & mask)) + (seed >> 32 & mask) + (row >> 32) * 0x9E3779B9) & mask)
        k2 = mix(k1 ^ 0x6A09E667)
        return mix(((y ^ k1) * 0x9E3779B1 + k2) & mask) >= threshold

    for seed in (0, -1, 2**63 - 1, -(2**62) + 12345):
        mine = attention_oracle.dropout_keep(seed, 2, 3, 5, 40, 0.25, longest_query=2**31 + 7)
        for b, h, x, y in ((0, 0, 0, 0), (0, 2, 1, 39), (1, 2, 4, 17), (1, 0, 3, 8)):
            assert mine[b, h, x, y] == keeps(seed, (b * 3 + h) * (2**31 + 7) + x, y, 2**30)


NOBODY = [[False] * 3 + [True] * 2 + [False] * 3 + [True] * 3] * 2
UNSEEN = {  # (options, the keys that they hide from all queries)
    "mask": ({"key_padding_mask": torch.tensor(NOBODY)}, NOBODY[0]),
    "mask of -inf": ({"key_padding_mask": torch.zeros(2, 11).masked_fill(torch.tensor(NOBODY), -torch.inf)}, NOBODY[0]),
    "a cache's end": ({"is_causal": True, "offset": 1}, [False] * 8 + [True] * 3),
    "a cache's end and mask": ({"is_causal": True, "offset": 1, "key_padding_mask": torch.tensor(NOBODY)}, NOBODY[0]),
    "window": ({"window": (2, 4), "offset": 3}, [True] + [False] * 10),
}


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize(("options", "is_unseen"), UNSEEN.values(), ids=UNSEEN)
def test_keys_that_nobody_sees_hold_anything(options, is_unseen, number):
    case = Case(batch=2, heads=4, kv_heads=2, dtype=torch.float64, i=7, j=11, head_dim=5, options=options)
    query, key, value, *others = case.draw()
    for tensor in (key, value):
        tensor[:, :, torch.tensor(is_unseen)] = number
    options = options | {"enable_gqa": True}
    exact = attention_oracle.attention(query, key, value, *others, options=options)
    ours = attention_oracle.run(reference.attention, query, key, value, *others, **options)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), exact[name][0], msg=lambda m, name=name: f"{name}: {m}")


def test_nan_in_a_future_key_and_in_a_seen_one():
    query, key, value, table, *_ = Case(i=8, j=8).draw()
    key[:, :, 5] = torch.nan
    out, lse = reference.attention(query, key, value, table, is_causal=True, return_lse=True)
    assert out[:, :, :5].isfinite().all() and lse[:, :, :5].isfinite().all()
    assert out[:, :, 5:].isnan().all() and lse[:, :, 5:].isnan().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_inf_in_the_mask_of_a_future_key(number):
    query, key, value, table, *_ = Case(i=8, j=8).draw()
    mask = torch.zeros(1, 8).index_fill(1, torch.tensor(5), number)
    options = {"is_causal": True, "return_lse": True}
    found = reference.attention(query, key, value, table, key_padding_mask=mask, **options)
    for ours, expected in zip(found, reference.attention(query, key, value, table, **options), strict=True):
        torch.testing.assert_close(ours[:, :, :5], expected[:, :, :5])


@pytest.mark.parametrize("offset", [2**64, -(2**64)])
def test_no_pair_is_seen_from_far_away(offset):
    """Whatever int64 holds."""
    query, key, value, table, *_ = Case(i=3, j=4).draw()
    out, lse = reference.attention(query, key, value, table, offset=offset, window=(2, 1), return_lse=True)
    assert not out.any() and lse.isneginf().all()


def test_a_pair_outside_the_table_is_refused():
    query, key, value, table, *_ = Case(i=8, j=8).draw()
    with pytest.raises((IndexError, RuntimeError)):
        reference.attention(query, key, value, table[:, :7], is_causal=True)


def test_a_large_number_on_all_keys_moves_lse_only():
    query, key, value, table, *_ = Case(batch=2, i=5, j=9).draw()
    mask = torch.arange(18.0).view(2, 9) * 8  # float32 adds these to -6e7 exactly
    out, lse = reference.attention(query, key, value, table, return_lse=True, key_padding_mask=mask)
    for number in (-6e7, 1e6):
        ours, moved = reference.attention(query, key, value, table, return_lse=True, key_padding_mask=mask + number)
        torch.testing.assert_close(ours, out, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(moved, lse + number)


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(lambda t: f(t).sin().sum())(t),
    "vmap": lambda f, t: torch.func.vmap(f)(torch.stack([t, 2 * t])),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,))[1],
    "hessian": lambda f, t: torch.func.hessian(lambda t: f(t).sin().sum())(t),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_torch_func(transform):
    """Every transform agrees with autograd through a softmax written here, and is finite for a row without a key."""
    query, key, value, table, *_ = Case(heads=1, i=3, j=4, head_dim=2, dtype=torch.float64).draw()

    def first_row_has_no_key(table):
        return reference.attention(query, key, value, table, window=(0, 0), offset=-1)

    def plain(table):
        return reference.attention(query, key, value, table)

    def written(table):
        e = (query @ key.mT / 2**0.5 + table[:, reference.distance(3, 4, 1).abs()]).exp()
        return e @ value / e.sum(-1, keepdim=True)

    torch.testing.assert_close(transform(plain, table), transform(written, table))
    assert transform(first_row_has_no_key, table).isfinite().all()
