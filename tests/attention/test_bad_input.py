# SPDX-License-Identifier: MIT
"""Bad input to attention raises before any kernel starts, and the message names the argument and the value."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from dpb_triton import DynamicPositionBias, bias_attention, bias_attention_varlen, dispatch
from dpb_triton.attention import checks
from dpb_triton.attention.checks import Call, Packing, _check_on_device, check_packed

INT32 = torch.int32
NESTED = torch.nested.nested_tensor([torch.randn(4, 2, 8), torch.randn(4, 3, 8)])
JAGGED = torch.nested.nested_tensor([torch.randn(2, 4, 8), torch.randn(3, 4, 8)], layout=torch.jagged)


def randn(*shape, **options):
    return torch.randn(*shape, **options)


def dense(query=None, key=None, value=None, table=None, **options):
    """A call that is valid except for the given arguments: batch 2, heads 4, i 5, j 9, head_dim 8, value_dim 6."""
    given = {"query": query, "key": key, "value": value, "table": table}
    right = {"query": randn(2, 4, 5, 8), "key": randn(2, 4, 9, 8), "value": randn(2, 4, 9, 6), "table": randn(4, 9)}
    return lambda: bias_attention(*(right[name] if given[name] is None else given[name] for name in right), **options)


def grouped(kv_heads, **options):
    return dense(key=randn(2, kv_heads, 9, 8), value=randn(2, kv_heads, 9, 6), **options)


def cu(*numbers, dtype=INT32):
    return torch.tensor(numbers, dtype=dtype)


def packed(cu_q=None, cu_k=None, query=None, key=None, value=None, table=None, **options):
    """A call that is valid except for the given arguments: 2 and 3 queries, 4 and 5 keys, heads 4, head_dim 8,
    value_dim 6."""
    query = randn(5, 4, 8) if query is None else query
    key, value = randn(9, 4, 8) if key is None else key, randn(9, 4, 6) if value is None else value
    table = randn(4, 5) if table is None else table
    cu_q, cu_k = cu(0, 2, 5) if cu_q is None else cu_q, cu(0, 4, 9) if cu_k is None else cu_k
    return lambda: bias_attention_varlen(query, key, value, table, cu_q, cu_k, **options)


def module(*args, **options):
    return lambda: DynamicPositionBias(8, 4).attention(*args, **options)


# name: (call, exception, words that the message must contain)
CASES = {
    # ranks and kinds
    "query 3-D": (dense(query=randn(4, 5, 8)), ValueError, ["query", "(4, 5, 8)"]),
    "key 5-D": (dense(key=randn(1, 2, 4, 9, 8)), ValueError, ["key", "(1, 2, 4, 9, 8)"]),
    "value 2-D": (dense(value=randn(9, 6)), ValueError, ["value", "(9, 6)"]),
    "table 1-D": (dense(table=randn(9)), ValueError, ["table", "(9,)"]),
    "table 3-D": (dense(table=randn(1, 4, 9)), ValueError, ["table", "(1, 4, 9)"]),
    "query list": (dense(query=[[[[1.0]]]]), TypeError, ["query", "list"]),
    "key None": (lambda: bias_attention(randn(2, 4, 5, 8), None, randn(2, 4, 9, 6), randn(4, 9)), TypeError, ["key", "NoneType"]),
    "value numpy": (dense(value=np.ones((2, 4, 9, 6), np.float32)), TypeError, ["value", "ndarray"]),
    "table module": (dense(table=DynamicPositionBias(8, 4)), TypeError, ["table", "DynamicPositionBias"]),
    "query nested": (dense(query=NESTED), TypeError, ["query", "nested"]),
    "key nested": (dense(key=NESTED), TypeError, ["key", "nested"]),
    "value jagged": (dense(value=JAGGED), TypeError, ["value", "nested"]),
    "table nested": (dense(table=NESTED), TypeError, ["table", "nested"]),
    "query sparse": (dense(query=randn(2, 4, 5, 8).to_sparse()), TypeError, ["query", "sparse"]),
    # the key mask
    "mask list": (dense(key_padding_mask=[[True]]), TypeError, ["key_padding_mask", "list"]),
    "mask int": (dense(key_padding_mask=torch.zeros(2, 9, dtype=torch.int64)), TypeError, ["key_padding_mask", "int64"]),
    "mask float8": (
        dense(key_padding_mask=torch.zeros(2, 9).to(torch.float8_e4m3fn)), TypeError, ["key_padding_mask", "float8"],
    ),
    "mask sparse": (dense(key_padding_mask=torch.zeros(2, 9).to_sparse()), TypeError, ["key_padding_mask", "sparse"]),
    "mask shape": (dense(key_padding_mask=torch.zeros(9, 2)), ValueError, ["key_padding_mask", "(2, 9)", "(9, 2)"]),
    "mask 4-D": (dense(key_padding_mask=torch.zeros(2, 1, 5, 9)), ValueError, ["key_padding_mask", "(2, 1, 5, 9)"]),
    "mask on meta": (dense(key_padding_mask=torch.zeros(2, 9, device="meta")), ValueError, ["key_padding_mask", "meta"]),
    # shapes that disagree
    "batch of key": (dense(key=randn(3, 4, 9, 8), value=randn(3, 4, 9, 6)), ValueError, ["key", "batch", "2", "(3, 4, 9, 8)"]),
    "batch of key alone": (dense(key=randn(3, 4, 9, 8)), ValueError, ["key", "batch 2", "(3, 4, 9, 8)"]),
    "batch of value": (dense(value=randn(1, 4, 9, 6)), ValueError, ["value", "(2, 4, 9, value_dim)", "(1, 4, 9, 6)"]),
    "length of value": (dense(value=randn(2, 4, 8, 6)), ValueError, ["value", "(2, 4, 9, value_dim)", "(2, 4, 8, 6)"]),
    "head_dim of key": (dense(key=randn(2, 4, 9, 7)), ValueError, ["key", "head_dim", "8", "(2, 4, 9, 7)"]),
    "head_dim 0": (dense(query=randn(2, 4, 5, 0), key=randn(2, 4, 9, 0)), ValueError, ["query", "head_dim", "(2, 4, 5, 0)"]),
    "head_dim 257": (dense(query=randn(2, 4, 5, 257), key=randn(2, 4, 9, 257)), ValueError, ["query", "256", "(2, 4, 5, 257)"]),
    "value_dim 0": (dense(value=randn(2, 4, 9, 0)), ValueError, ["value", "(2, 4, 9, 0)"]),
    "value_dim 300": (dense(value=randn(2, 4, 9, 300)), ValueError, ["value", "256", "(2, 4, 9, 300)"]),
    # heads
    "grouped unasked": (grouped(2), ValueError, ["key", "4", "2", "enable_gqa"]),
    "heads do not divide": (grouped(3, enable_gqa=True), ValueError, ["key", "4", "3"]),
    "more key heads": (grouped(8, enable_gqa=True), ValueError, ["key", "4", "8"]),
    "no key heads": (grouped(0, enable_gqa=True), ValueError, ["key", "0"]),
    "heads of value": (dense(value=randn(2, 2, 9, 6), enable_gqa=True), ValueError, ["value", "(2, 4, 9, value_dim)", "(2, 2, 9, 6)"]),
    "heads of table": (dense(table=randn(3, 9)), ValueError, ["table", "4", "(3, 9)"]),
    "one head of table": (dense(table=randn(1, 9)), ValueError, ["table", "4", "(1, 9)"]),
    "table of key heads": (grouped(2, enable_gqa=True, table=randn(2, 9)), ValueError, ["table", "4", "(2, 9)"]),
    # dtypes, devices
    "dtype of key": (dense(key=randn(2, 4, 9, 8).half()), TypeError, ["key", "float32", "float16"]),
    "dtype of value": (dense(value=randn(2, 4, 9, 6).double()), TypeError, ["value", "float32", "float64"]),
    "query int": (dense(query=torch.ones(2, 4, 5, 8, dtype=torch.int64)), TypeError, ["query", "int64"]),
    "query complex": (dense(query=randn(2, 4, 5, 8) * 1j), TypeError, ["query", "complex64"]),
    "query float8": (dense(query=randn(2, 4, 5, 8).to(torch.float8_e4m3fn)), TypeError, ["query", "float8"]),
    "table int": (dense(table=torch.ones(4, 9, dtype=torch.int32)), TypeError, ["table", "int32"]),
    "device of key": (dense(key=randn(2, 4, 9, 8, device="meta")), ValueError, ["key", "cpu", "meta"]),
    "device of value": (dense(value=randn(2, 4, 9, 6, device="meta")), ValueError, ["value", "cpu", "meta"]),
    "device of table": (dense(table=randn(4, 9, device="meta")), ValueError, ["table", "cpu", "meta"]),
    # distances
    "table short": (dense(table=randn(4, 8)), ValueError, ["table is too short", "j = 9", "distances -4 to 8", "(4, 8) holds those below 8"]),
    "table short for the offset": (dense(offset=5), ValueError, ["table is too short", "offset = 5", "(4, 9)"]),
    "table short behind": (dense(offset=-1), ValueError, ["table is too short", "offset = -1", "(4, 9)"]),
    "table short, causal": (dense(table=randn(4, 8), is_causal=True), ValueError, ["table is too short", "(4, 8)"]),
    "table short for the window": (dense(table=randn(4, 6), window=(6, 0)), ValueError, ["table is too short", "(4, 6)"]),
    "table empty": (dense(table=randn(4, 0)), ValueError, ["table is too short", "(4, 0)"]),
    "table huge offset": (dense(offset=2**60), ValueError, ["table is too short", str(2**60)]),
    "offset beyond int64": (dense(offset=2**63), ValueError, ["offset must be between -2^62 and 2^62", str(2**63)]),
    "offset below int64": (dense(offset=-(2**63) - 1, is_causal=True), ValueError, ["offset must be between", str(-(2**63) - 1)]),
    "signed even": (dense(signed=True, table=randn(4, 18)), ValueError, ["table", "odd", "(4, 18)"]),
    "signed short": (dense(signed=True, table=randn(4, 15)), ValueError, ["table is too short", "(4, 15)"]),
    "j < i": (dense(query=randn(2, 4, 10, 8)), ValueError, ["i = 10", "j = 9", "offset"]),
    "offset float": (dense(offset=1.0), TypeError, ["offset", "1.0", "float"]),
    "offset bool": (dense(offset=True), TypeError, ["offset", "True"]),
    "offset tensor": (dense(offset=torch.tensor(4)), TypeError, ["offset", "Tensor"]),
    # flags
    "signed int": (dense(signed=1), TypeError, ["signed", "1"]),
    "is_causal None": (dense(is_causal=None), TypeError, ["is_causal", "None"]),
    "is_causal int": (dense(is_causal=1), TypeError, ["is_causal", "1"]),
    "enable_gqa int": (dense(enable_gqa=0), TypeError, ["enable_gqa", "0"]),
    "return_lse str": (dense(return_lse="yes"), TypeError, ["return_lse", "'yes'"]),
    # window
    "window int": (dense(window=4), (TypeError, ValueError), ["window", "4"]),
    "window triple": (dense(window=(1, 2, 3)), (TypeError, ValueError), ["window", "(1, 2, 3)"]),
    "window single": (dense(window=(7,)), (TypeError, ValueError), ["window", "(7,)"]),
    "window empty": (dense(window=()), (TypeError, ValueError), ["window", "()"]),
    "window str": (dense(window="ab"), (TypeError, ValueError), ["window", "ab"]),
    "window tensor": (dense(window=torch.tensor([1, 2])), (TypeError, ValueError), ["window"]),
    "window left negative": (dense(window=(-1, 2)), ValueError, ["window", "-1"]),
    "window right negative": (dense(window=(1, -2)), ValueError, ["window", "-2"]),
    "window right negative, causal": (dense(window=(1, -2), is_causal=True), ValueError, ["window", "-2"]),
    "window float": (dense(window=(1.5, 2)), TypeError, ["window", "1.5"]),
    "window bool": (dense(window=(True, 2)), TypeError, ["window", "True"]),
    "window inf": (dense(window=(float("inf"), 2)), TypeError, ["window", "inf"]),
    # numbers
    "window negative and huge": (dense(window=(-(2**64), 2)), ValueError, ["window", "left", str(-(2**64))]),
    "softcap 0": (dense(softcap=0.0), ValueError, ["softcap", "0.0"]),
    "softcap int 0": (dense(softcap=0), ValueError, ["softcap", "0"]),
    "softcap negative": (dense(softcap=-2.0), ValueError, ["softcap", "-2.0"]),
    "softcap nan": (dense(softcap=float("nan")), ValueError, ["softcap", "nan"]),
    "softcap inf": (dense(softcap=float("inf")), ValueError, ["softcap", "inf"]),
    "softcap beyond floats": (dense(softcap=10**400), ValueError, ["softcap", "finite", "1000"]),
    "softcap no float": (dense(softcap=Fraction(1, 10**400)), ValueError, ["softcap", "positive", "Fraction"]),
    "scale beyond floats": (dense(scale=-(10**400)), ValueError, ["scale", "finite", "-1000"]),
    "scale tensor": (dense(scale=torch.tensor(0.5)), TypeError, ["scale", "tensor(0.5000)"]),
    "softcap str": (dense(softcap="30"), TypeError, ["softcap", "'30'"]),
    "softcap bool": (dense(softcap=True), TypeError, ["softcap", "True"]),
    "dropout_p negative": (dense(dropout_p=-0.1), ValueError, ["dropout_p", "-0.1"]),
    "dropout_p 1": (dense(dropout_p=1.0), ValueError, ["dropout_p", "1.0"]),
    "dropout_p 50": (dense(dropout_p=50), ValueError, ["dropout_p", "50"]),
    "dropout_p nan": (dense(dropout_p=float("nan")), ValueError, ["dropout_p", "nan"]),
    "dropout_p None": (dense(dropout_p=None), TypeError, ["dropout_p", "None"]),
    "dropout_p bool": (dense(dropout_p=False), TypeError, ["dropout_p", "False"]),
    "scale nan": (dense(scale=float("nan")), ValueError, ["scale", "nan"]),
    "scale inf": (dense(scale=float("inf")), ValueError, ["scale", "inf"]),
    "scale -inf": (dense(scale=-float("inf")), ValueError, ["scale", "-inf"]),
    "scale str": (dense(scale="auto"), TypeError, ["scale", "'auto'"]),
    "scale complex": (dense(scale=1j), TypeError, ["scale", "1j"]),
    # backends
    "backend unknown": (dense(backend="tpu"), ValueError, ["backend", "'tpu'", "'torch'", "'triton'"]),
    "backend cuda": (dense(backend="cuda"), ValueError, ["backend", "'cuda'", "'torch'"]),
    "backend type": (dense(backend=3), ValueError, ["backend", "3"]),
    "positional": (lambda: bias_attention(*[randn(1, 1, 2, 2)] * 3, randn(1, 2), True), TypeError, ["positional"]),
    # packed sequences
    "packed 4-D": (packed(query=randn(1, 5, 4, 8)), ValueError, ["query", "(1, 5, 4, 8)"]),
    "packed key 2-D": (packed(key=randn(9, 8)), ValueError, ["key", "(9, 8)"]),
    "packed length of value": (packed(value=randn(8, 4, 6)), ValueError, ["value", "(9, 4, value_dim)", "(8, 4, 6)"]),
    "packed query nested": (packed(query=NESTED), TypeError, ["query", "nested"]),
    "cu_seqlens_q sparse": (packed(cu_q=cu(0, 2, 5).to_sparse()), TypeError, ["cu_seqlens_q", "sparse"]),
    "cu_seqlens_k nested": (packed(cu_k=torch.nested.nested_tensor([cu(0, 4, 9)])), TypeError, ["cu_seqlens_k", "nested"]),
    "offsets sparse": (packed(offsets=cu(2, 2).to_sparse()), TypeError, ["offsets", "sparse"]),
    "cu_seqlens_k wraps": (packed(cu_q=cu(0, 0, 2, 5), cu_k=cu(0, 2**31 - 1, -(2**31), 9)), ValueError, ["cu_seqlens_k", str(2**31 - 1)]),
    "offsets near 2^31": (packed(offsets=cu(2**31 - 1, 2)), ValueError, ["table is too short", str(2**31 - 1)]),
    "offsets near -2^31": (packed(offsets=cu(2, -(2**31))), ValueError, ["table is too short", str(-(2**31))]),
    "packed dtype": (packed(key=randn(9, 4, 8).bfloat16()), TypeError, ["key", "bfloat16"]),
    "packed heads": (packed(key=randn(9, 2, 8), value=randn(9, 2, 6)), ValueError, ["key", "4", "2", "enable_gqa"]),
    "packed heads of table": (packed(table=randn(2, 5)), ValueError, ["table", "4", "(2, 5)"]),
    "packed mask of a batch": (
        packed(key_padding_mask=torch.zeros(2, 5)), ValueError, ["key_padding_mask", "(total_k,) = (9,)", "(2, 5)"],
    ),
    "packed mask of the queries": (packed(key_padding_mask=torch.zeros(5)), ValueError, ["key_padding_mask", "(9,)", "(5,)"]),
    "packed mask int": (packed(key_padding_mask=torch.zeros(9, dtype=INT32)), TypeError, ["key_padding_mask", "int32"]),
    "packed mask on meta": (packed(key_padding_mask=torch.zeros(9, device="meta")), ValueError, ["key_padding_mask", "meta"]),
    "cu_seqlens_q list": (packed(cu_q=[0, 2, 5]), TypeError, ["cu_seqlens_q", "list"]),
    "cu_seqlens_q int64": (packed(cu_q=cu(0, 2, 5, dtype=torch.int64)), TypeError, ["cu_seqlens_q", "int32", "int64"]),
    "cu_seqlens_k float": (packed(cu_k=cu(0, 4, 9, dtype=torch.float32)), TypeError, ["cu_seqlens_k", "int32", "float32"]),
    "cu_seqlens_q 2-D": (packed(cu_q=cu(0, 2, 5)[None]), ValueError, ["cu_seqlens_q", "(1, 3)"]),
    "cu_seqlens_q empty": (packed(cu_q=cu()), ValueError, ["cu_seqlens_q", "(0,)"]),
    "cu_seqlens_q start": (packed(cu_q=cu(1, 2, 5)), ValueError, ["cu_seqlens_q", "0", "1"]),
    "cu_seqlens_k start": (packed(cu_k=cu(-1, 4, 9)), ValueError, ["cu_seqlens_k", "0", "-1"]),
    "cu_seqlens_q decrease": (packed(cu_q=cu(0, 6, 5)), ValueError, ["cu_seqlens_q", "6", "5"]),
    "cu_seqlens_k decrease": (packed(cu_q=cu(0, 0, 2, 5), cu_k=cu(0, 7, 4, 9)), ValueError, ["cu_seqlens_k", "7", "4"]),
    "cu_seqlens_q end": (packed(cu_q=cu(0, 2, 4)), ValueError, ["cu_seqlens_q", "5", "4"]),
    "cu_seqlens_k end": (packed(cu_k=cu(0, 4, 10)), ValueError, ["cu_seqlens_k", "9", "10"]),
    "cu_seqlens lengths": (packed(cu_k=cu(0, 4, 6, 9)), ValueError, ["cu_seqlens_k", "3", "(4,)"]),
    "cu_seqlens device": (packed(cu_q=cu(0, 2, 5).to("meta")), ValueError, ["cu_seqlens_q", "cpu", "meta"]),
    "max_seqlen_q small": (packed(max_seqlen_q=2), ValueError, ["max_seqlen_q", "3", "2"]),
    "max_seqlen_k small": (packed(max_seqlen_q=3, max_seqlen_k=4), ValueError, ["max_seqlen_k", "5", "4"]),
    "max_seqlen_q negative": (packed(max_seqlen_q=-1), ValueError, ["max_seqlen_q", "-1"]),
    "max_seqlen_k float": (packed(max_seqlen_k=5.0), TypeError, ["max_seqlen_k", "5.0"]),
    "max_seqlen_q bool": (packed(max_seqlen_q=True), TypeError, ["max_seqlen_q", "True"]),
    "offsets list": (packed(offsets=[2, 2]), TypeError, ["offsets", "list"]),
    "offsets int64": (packed(offsets=cu(2, 2, dtype=torch.int64)), TypeError, ["offsets", "int32", "int64"]),
    "offsets length": (packed(offsets=cu(2, 2, 2)), ValueError, ["offsets", "2", "(3,)"]),
    "offsets 0-D": (packed(offsets=torch.tensor(2, dtype=INT32)), ValueError, ["offsets", "()"]),
    "offsets far": (packed(offsets=cu(2, 3)), ValueError, ["table is too short", "3", "(4, 5)"]),
    "packed table short": (packed(table=randn(4, 4)), ValueError, ["table is too short", "(4, 4)"]),
    "packed j < i": (packed(cu_q=cu(0, 5, 5)), ValueError, ["cu_seqlens", "5", "4", "offsets"]),
    "packed window": (packed(window=(1, -3)), ValueError, ["window", "-3"]),
    "packed dropout_p": (packed(dropout_p=2.0), ValueError, ["dropout_p", "2.0"]),
    "packed offset": (packed(offset=2), TypeError, ["offset"]),
    "packed backend": (packed(backend="cuda"), ValueError, ["backend", "'cuda'"]),
    # the module
    "module query 3-D": (module(randn(4, 5, 8), randn(2, 4, 9, 8), randn(2, 4, 9, 8)), ValueError, ["query", "(4, 5, 8)"]),
    "module key list": (module(randn(2, 4, 5, 8), [1.0], randn(2, 4, 9, 8)), TypeError, ["key", "list"]),
    "module heads": (module(*[randn(2, 3, 5, 8)] * 3), ValueError, ["table", "3", "(4, 5)"]),
    "module j < i": (module(randn(2, 4, 5, 8), *[randn(2, 4, 3, 8)] * 2), ValueError, ["i = 5", "j = 3"]),
    "module table": (module(*[randn(2, 4, 5, 8)] * 3, table=randn(4, 5)), TypeError, ["table"]),
    "module signed": (module(*[randn(2, 4, 5, 8)] * 3, signed=True), TypeError, ["signed"]),
    "module offset": (module(*[randn(2, 4, 5, 8)] * 3, offset="x"), TypeError, ["offset", "'x'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message(case):
    call, exception, words = case
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) in (exception if isinstance(exception, tuple) else (exception,))
    for word in words:
        assert word in str(caught.value)


def test_the_cases_are_right_but_for_what_is_wrong():
    assert dense()().shape == (2, 4, 5, 6)
    assert grouped(2, enable_gqa=True)().shape == (2, 4, 5, 6)
    assert packed()().shape == (5, 4, 6)
    assert module(*[randn(2, 4, 5, 8)] * 3)().shape == (2, 4, 5, 8)


@pytest.mark.parametrize("side", [2**31 - 1, 2**31, 2**61, sys.maxsize, 2**63, 10**30], ids=str)
def test_a_side_that_reaches_everything_is_no_limit(side):
    inputs = randn(2, 4, 5, 8), randn(2, 4, 9, 8), randn(2, 4, 9, 6), randn(4, 9)
    for window, same in (((side, side), None), ((side, 1), (None, 1)), ((2, side), (2, None))):
        assert torch.equal(bias_attention(*inputs, window=window), bias_attention(*inputs, window=same))


@pytest.mark.parametrize("longest", [9, 2**31, sys.maxsize, 10**30], ids=str)
def test_a_longest_sequence_that_nothing_reaches(longest):
    inputs = randn(5, 4, 8), randn(9, 4, 8), randn(9, 4, 6), randn(4, 5), cu(0, 2, 5), cu(0, 4, 9)
    expected = bias_attention_varlen(*inputs)
    assert torch.equal(bias_attention_varlen(*inputs, max_seqlen_q=longest, max_seqlen_k=longest), expected)


# Checks that run on the GPU. name: (cu_seqlens of 5 queries, of 9 keys, offsets, (left, right), the message)
ON_DEVICE = {
    "start": (cu(1, 2, 5), cu(0, 4, 9), None, (None, None), "cu_seqlens_q must rise"),
    "end": (cu(0, 2, 5), cu(0, 4, 8), None, (None, None), "cu_seqlens_k must rise"),
    "falls": (cu(0, 0, 2, 5), cu(0, 7, 4, 9), None, (None, None), "cu_seqlens_k must rise"),
    "longer": (cu(0, 4, 5), cu(0, 4, 9), None, (None, None), "cu_seqlens_q must rise"),
    "more queries": (cu(0, 0, 3, 5), cu(0, 2, 4, 9), None, (None, None), "more queries than keys"),
    "past": (cu(0, 2, 5), cu(0, 4, 9), cu(2, 3), (None, None), "table is too short"),
    "past 2^31": (cu(0, 2, 5), cu(0, 4, 9), cu(2**31 - 1, 2), (None, 0), "table is too short"),
    "future -2^31": (cu(0, 2, 5), cu(0, 4, 9), cu(2, -(2**31)), (3, None), "table is too short"),
}


@pytest.mark.parametrize("case", ON_DEVICE.values(), ids=ON_DEVICE)
def test_the_check_on_the_device(case):
    cu_q, cu_k, offsets, bounds, message = case

    def check(cu_q, cu_k, offsets, bounds, longest=5):
        i, j = cu_q.diff(), cu_k.diff()
        seqlens = torch.stack([cu_q[:-1], i, cu_k[:-1], j, j - i if offsets is None else offsets], 1)
        _check_on_device(randn(5, 4, 8), randn(9, 4, 8), 5, Packing(cu_q, cu_k, 3, longest, offsets), seqlens, *bounds)

    with pytest.raises(RuntimeError, match=message):
        check(cu_q, cu_k, offsets, bounds)
    check(cu(0, 2, 5), cu(0, 4, 9), None, (None, None))
    check(cu(0, 2, 5), cu(0, 4, 9), cu(2**31 - 1, -(2**31)), (3, 3))  # the window holds no pair
    with pytest.raises(RuntimeError, match="cu_seqlens_k must rise"):  # in int32 the differences wrap to valid lengths
        check(cu(0, 0, 2, 5), cu(0, 2**31 - 1, -2, 9), cu(0, 0, 0), (0, 0), longest=2**31 - 1)


def test_a_compiled_call_has_the_check_of_the_device():
    """A graph reads no number on the host, also on a CPU, so the operators of the check stop it when it runs."""
    torch._dynamo.reset()
    compiled = torch.compile(bias_attention_varlen, fullgraph=True, backend="eager")
    inputs = randn(5, 4, 8), randn(9, 4, 8), randn(9, 4, 6), randn(4, 5)
    options = {"max_seqlen_q": 3, "max_seqlen_k": 5}
    right = cu(0, 2, 5), cu(0, 4, 9)
    torch.testing.assert_close(compiled(*inputs, *right, **options), bias_attention_varlen(*inputs, *right, **options))
    for name in ("end", "longer"):
        cu_q, cu_k, _, _, message = ON_DEVICE[name]
        with pytest.raises(RuntimeError, match=message):
            compiled(*inputs, cu_q, cu_k, **options)


# (lengths of the queries, of the keys, offsets or None, (left, right), the largest distance)
REACHES = {
    "one sequence": ((3,), (5,), None, (None, None), 4),
    "the last of two": ((1, 3), (2, 7), None, (None, None), 6),
    "queries beyond the keys": ((2, 4), (2, 5), (0, 6), (None, None), 9),
    "keys beyond the queries": ((2, 4), (2, 5), (0, -6), (None, None), 10),
    "a window": ((3, 4), (3, 9), None, (4, 2), 4),
    "a window to the right": ((3, 4), (3, 9), (0, 0), (2, 5), 5),
    "no pair in the window": ((3, 4), (3, 9), (0, 30), (2, 5), 2),
    "empty sequences": ((0, 4, 3), (99, 0, 3), (70, 70, 0), (None, None), 2),
    "causal": ((3, 4), (3, 9), (0, 2), (None, 0), 5),
}


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("case", REACHES.values(), ids=REACHES)
def test_the_shortest_table_that_serves(case, is_compiled, monkeypatch):
    """By the host's check and by the one on the device."""
    q_lengths, k_lengths, offsets, (left, right), reach = case
    cu_q, cu_k = (cu(0, *torch.tensor(lengths).cumsum(0).tolist()) for lengths in (q_lengths, k_lengths))
    longest = {"max_seqlen_q": max(q_lengths), "max_seqlen_k": max(k_lengths)}
    offsets = None if offsets is None else cu(*offsets)
    packing = Packing(cu_q, cu_k, *(longest.values() if is_compiled else (None, None)), offsets)
    query, key = randn(sum(q_lengths), 1, 1), randn(sum(k_lengths), 1, 1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiled)
    for n in (reach + 1, reach):
        call = Call("", n, left, right, 1.0, 0.0, 0.0)
        if n > reach:
            seqlens, i, j = check_packed(query, key, randn(1, n), packing, call)
            assert (i, j) == tuple(longest.values())
            starts = cu_q[:-1].tolist(), q_lengths, cu_k[:-1].tolist(), k_lengths
            assert seqlens[:, :4].tolist() == [list(row) for row in zip(*starts, strict=True)]
        else:
            with pytest.raises((ValueError, RuntimeError), match="table is too short"):
                check_packed(query, key, randn(1, n), packing, call)


def test_float64_is_torch_only(device):
    inputs = [
        tensor.double().to(device) for tensor in (randn(1, 1, 3, 4), randn(1, 1, 3, 4), randn(1, 1, 3, 4), randn(1, 3))
    ]
    assert bias_attention(*inputs, backend="torch").dtype == torch.float64
    assert bias_attention(*inputs).dtype == torch.float64
    with pytest.raises(ValueError, match="float64") as caught:
        bias_attention(*inputs, backend="triton")
    assert "'triton'" in str(caught.value)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"is_causal": True}, {"is_causal": 1}),
        ({"signed": False}, {"signed": 0}),
        ({"scale": 1.0}, {"scale": True}),
        ({"window": (1, 1)}, {"window": (True, 1)}),
        ({"window": None}, {"window": (None,)}),
        ({"window": (1, None)}, {"window": (1, None, "window")}),
        ({"offset": 1}, {"offset": True}),
        ({"dropout_p": 0}, {"dropout_p": False}),
    ],
    ids=str,
)
def test_what_equals_a_right_argument_is_wrong_after_it_too(right, wrong):
    dense(**right)()
    with pytest.raises(TypeError, match=next(iter(wrong))):
        dense(**wrong)()
    dense(**right)()


def test_a_right_call_does_not_speak_for_other_tensors():
    dense()()
    for change in ({"key": randn(2, 4, 9, 8, dtype=torch.float64)}, {"query": randn(2, 4, 5, 8).to_sparse()}):
        with pytest.raises(TypeError):
            dense(**change)()
    with pytest.raises(ValueError, match="table"):
        dense(table=randn(4, 8))()


def test_a_right_call_is_remembered(monkeypatch):
    """Not too many are. A backend may disappear after a call; a device and a dtype are part of what is remembered."""
    monkeypatch.setattr(checks, "_checked", {})
    monkeypatch.setattr(checks, "MOST_CHECKED", 3)
    for heads in range(1, 6):
        inputs = [randn(1, heads, 2, 4)] * 3, randn(heads, 2)
        bias_attention(*inputs[0], inputs[1])
        assert len(checks._checked) == (heads - 1) % 3 + 1
    full = []
    monkeypatch.setattr(checks, "check_dense", lambda *args: full.append(args) or 4)
    for _ in range(2):
        dense(backend="torch")()
    assert len(full) == 1
    for change in (
        {"table": randn(4, 9).double()},
        {name: randn(2, 4, j, 8).bfloat16() for name, j in (("query", 5), ("key", 9), ("value", 9))},
    ):
        dense(backend="torch", **change)()
        assert len(full) == 2, change
        full.pop()
    meta = [randn(2, 4, n, 8, device="meta") for n in (5, 9, 9)]
    bias_attention(*meta, randn(4, 9, device="meta"), backend="torch")
    assert len(full) == 2
    dense(backend="torch")()
    count = len(full)
    dense(backend="torch")()
    assert len(full) == count
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device_type: "is gone")
    with pytest.raises(ValueError, match="is gone"):
        dense(backend="torch")()
    dense()()


def test_nothing_is_wrong_with_numpys_numbers():
    call = dense(
        offset=np.int64(4), window=(np.int32(3), None), scale=np.float32(0.5), softcap=np.float64(3), dropout_p=0
    )
    assert call().shape == (2, 4, 5, 6)


def test_a_window_may_be_a_list():
    inputs = randn(2, 4, 5, 8), randn(2, 4, 9, 8), randn(2, 4, 9, 6), randn(4, 9)
    for sides in ((3, 1), (None, 2)):
        for _ in range(2):
            assert torch.equal(bias_attention(*inputs, window=[*sides]), bias_attention(*inputs, window=sides))


def test_integers_are_numbers():
    assert torch.equal(dense(scale=1, softcap=2)().isfinite(), torch.ones(2, 4, 5, 6, dtype=torch.bool))
