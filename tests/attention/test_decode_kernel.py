# SPDX-License-Identifier: MIT
"""The decoding kernel, with small blocks and splits: edges, whole blocks, empty splits, several row blocks."""

import importlib
import itertools
import math
from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import FARTHER, Case, check, check_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from quick import slow

from dpb_triton import bias_attention, bias_attention_varlen, dispatch
from dpb_triton.dispatch import why_not

decode = pytest.importorskip("dpb_triton.attention.kernels.decode", reason="Triton is not installed")
blocks = pytest.importorskip("dpb_triton.attention.kernels.blocks")
replay = pytest.importorskip("dpb_triton.launching.replay")

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def attend(monkeypatch, device):
    """`bias_attention` by the decoding kernel with blocks of 16 keys and splits of 32, whatever the number of keys."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    use_small_splits(monkeypatch)
    yield partial(bias_attention, backend="triton")
    replay.forget()


def use_small_splits(patch, block=(16, 16, 4, 2)):
    replay.forget()
    patch.setattr(decode, "LEAST_KEYS", 0)
    patch.setattr(decode, "LEAST_SPLIT", 32)
    patch.setattr(decode, "tile_of", lambda *_: blocks.Tile(*block))
    launched = []
    launch_decode = decode.launch_decode

    def noted(*args, **options):
        launched.append(args)
        return launch_decode(*args, **options)

    patch.setattr("dpb_triton.attention.kernels.forward.launch_decode", noted)
    return launched


CASES = {
    "one": Case(batch=2, i=1, j=75, options={"signed": True, "offset": -2}),
    "one key": Case(batch=2, i=1, j=1),
    "causal": Case(i=5, j=77, options={"is_causal": True}),
    "grouped": Case(batch=2, heads=6, kv_heads=2, i=3, j=65, layout="transposed", options={"is_causal": True}),
    "three row blocks": Case(heads=3, kv_heads=1, i=16, j=64, options={"is_causal": True}),
    "window": Case(
        heads=4, kv_heads=1, i=7, j=150, layout="sliced", options={"window": (50, 10), "signed": True, "offset": 80}
    ),
    "left": Case(i=2, j=90, options={"window": (40, None), "offset": 70}),
    "right": Case(i=3, j=90, options={"window": (None, 3), "offset": -2}),
    "keys behind": Case(i=3, j=40, options={"is_causal": True, "offset": 200}),
    "keys ahead": Case(i=3, j=40, options={"is_causal": True, "offset": -100}),
    "bf16": Case(batch=2, heads=4, kv_heads=2, i=4, j=70, dtype=torch.bfloat16, head_dim=40, value_dim=24),
    "fp16": Case(batch=2, i=1, j=70, dtype=torch.float16, head_dim=8, layout="transposed", options={"softcap": 2.0}),
    "odd dims": Case(i=2, j=50, head_dim=17, value_dim=5, layout="dim first", options={"scale": 0.3}),
    "masked": Case(i=4, j=70, table="masked", options={"is_causal": True}),
    "all masked": Case(i=2, j=40, table="all masked"),
    "huge": Case(i=4, j=70, table="huge"),
    "large": Case(i=4, j=70, table="large", spare=9),
}


@pytest.mark.parametrize("name", CASES)
def test_like_the_definition(name, attend, device):
    """Forward by the kernel; backward from its lse and state."""
    check(attend, CASES[name], device)


MASKED = [
    (pytest.param if pair in (("grouped", "float"), ("grouped", "ends"), ("window", "float"), ("bf16", "all"))
     else slow)(*pair, id="-".join(pair))
    for pair in itertools.product(("one", "grouped", "window", "bf16"), ("bool", "float", "all", "ends"))
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), MASKED)
def test_key_masks(name, kind, attend, device):
    case = CASES[name]
    generator = torch.Generator().manual_seed(3)
    pick = torch.rand(case.batch, case.j, generator=generator)
    place = torch.arange(case.j)
    mask = {
        "bool": pick < 0.4,
        "float": torch.where(pick < 0.3, -INF, 4 * pick),
        "all": torch.ones(case.batch, case.j, dtype=torch.bool) & (torch.arange(case.batch) == 0)[:, None],
        "ends": ((place < 20) | (place >= case.j - 9)).expand(case.batch, -1),
    }[kind]
    check_forward(attend, case.draw(device)[:4], case.dtype, **case.options | {"key_padding_mask": mask})


HIDDEN = {
    "after the keys of a static cache": (Case(i=1, j=70, options={"is_causal": True, "offset": 40}), slice(41, None)),
    "ahead of some queries": (Case(i=5, j=70, options={"is_causal": True}), slice(66, None)),
    "before the window": (Case(i=1, j=70, options={"window": (20, 0)}), slice(0, 49)),
    "before some windows": (Case(i=5, j=70, options={"window": (20, 0)}), slice(0, 49)),
    "before some windows that have no end": (Case(i=5, j=70, options={"window": (20, None)}), slice(0, 49)),
    "by the mask": (
        Case(i=5, j=70, options={"key_padding_mask": (torch.arange(70) % 3 == 0)[None]}), slice(None, None, 3)
    ),
    "by the mask and ahead": (
        Case(i=5, j=70, options={"is_causal": True, "key_padding_mask": (torch.arange(70) > 67)[None]}),
        slice(66, None),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("number", [NAN, INF, -INF])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_numbers(name, number, attend, device):
    """A key that a query does not see contributes nothing; a query that sees the number passes it on."""
    case, keys = HIDDEN[name]
    query, key, value, table, *_ = case.draw(device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    exact, _ = attention_oracle.attention(query, key, value, table, value[:, :, : case.i], options=options)["out"]
    for tensor in (key, value):
        tensor[:, :, keys, 3] = number
    expected, _ = attention_oracle.attention(query, key, value, table, value[:, :, : case.i], options=options)["out"]
    with torch.no_grad(), attention_oracle.poison():
        out = attend(query, key, value, table, **options).double().cpu()
    assert torch.equal(out.isfinite(), expected.isfinite())
    torch.testing.assert_close(out[expected.isfinite()], expected[expected.isfinite()], atol=1e-4, rtol=1e-4)
    is_clean = (expected == exact).all(-1)  # rows that do not see the number
    assert is_clean.any()
    torch.testing.assert_close(out[is_clean], exact[is_clean], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 2), "has_mask": True}], ids=str)
def test_packed_sequences(options, attend, device):
    """Sequences of different lengths, some of them empty, each as if it were alone."""
    q_lengths, k_lengths = [1, 3, 0, 2, 1], [40, 3, 7, 70, 1]
    cu_q, cu_k = (
        torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32) for lengths in (q_lengths, k_lengths)
    )
    torch.manual_seed(0)
    query = torch.randn(sum(q_lengths), 4, 16, device=device)
    key, value = torch.randn(2, sum(k_lengths), 2, 16, device=device)
    table = torch.randn(4, 70, device=device)
    calls = {"enable_gqa": True, "return_lse": True, "max_seqlen_q": 5, "max_seqlen_k": 75} | options
    if calls.pop("has_mask", False):  # every second number of a tensor
        calls["key_padding_mask"] = torch.randn(2 * len(key), device=device)[::2]
    with attention_oracle.poison():
        out, lse = bias_attention_varlen(query, key, value, table, cu_q, cu_k, backend="triton", **calls)
    expected = bias_attention_varlen(query, key, value, table, cu_q, cu_k, backend="torch", **calls)
    torch.testing.assert_close((out, lse), expected, atol=1e-5, rtol=1e-5)


def test_token_by_token(attend, device):
    """Steps and chunks against a growing cache give the rows of the whole causal call."""
    torch.manual_seed(0)
    query, table = torch.randn(1, 4, 40, 16, device=device), torch.randn(4, 40, device=device)
    key, value = torch.randn(2, 1, 2, 40, 16, device=device)
    options = {"is_causal": True, "enable_gqa": True}
    whole = bias_attention(query, key, value, table, backend="torch", **options)
    rows, x = [], 0
    for count in (1, 1, 3, 1, 16, 2, 5, 11):
        y = x + count
        rows.append(attend(query[:, :, x:y], key[:, :, :y], value[:, :, :y], table, **options))
        x = y
    torch.testing.assert_close(torch.cat(rows, 2), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_far_apart(dim, attend, device):
    """Addresses beyond element 2^31: of batch entries, heads, keys; of the table's rows and columns; of the mask's."""
    if device != "cpu":
        pytest.skip("the test needs memory that is reserved but never touched; a GPU has none")
    case = Case(batch=(3, 1, 1)[dim], heads=(1, 3, 1)[dim], i=2, j=(5, 5, 97)[dim], head_dim=8, dtype=torch.bfloat16)
    query, key, value, *_ = case.draw(device)
    table, mask = torch.randn(case.heads, 3, device=device), torch.randn(case.batch, case.j, device=device)

    def forward(*tensors):  # the operator, because bias_attention's key bias is a new tensor
        options = None, None, 2, case.j, case.j - 2, False, 2, 0, 0.3, 0.0, 0.0
        return dispatch.OPERATORS["attention_forward_triton"](*tensors, *options)[0]

    near = forward(query, key, value, table, mask)
    stride, far = (FARTHER, FARTHER, 2**25 - 8)[dim], attention_oracle.far_apart
    query = query if dim == 2 else far(query, dim, stride)
    key, value, table = far(key, dim, stride), far(value, dim, stride), far(table, int(dim != 1), FARTHER)
    mask = far(mask, int(dim != 0), (FARTHER, 2**29 + 8, 2**25)[dim])
    assert torch.equal(near, forward(query, key, value, table, mask))


def test_a_key_bias_with_gaps(attend, device):
    """Of packed sequences: the second one begins inside it. Only a direct call of the operator gets as far."""
    query, key, value, table, *_ = Case(i=3, j=40).draw(device)
    seqlens = torch.tensor([[0, 1, 0, 15, 14], [1, 2, 15, 25, 23]], dtype=torch.int32, device=device)
    options = seqlens, None, 2, 25, 0, False, None, None, 0.3, 0.0, 0.0
    operator, key_bias = dispatch.OPERATORS["attention_forward_triton"], torch.randn(1, 80, device=device)[:, ::2]
    results = [operator(query, key, value, table, bias, *options)[0] for bias in (key_bias, key_bias.contiguous())]
    assert torch.equal(*results)


def merged(partial, seqlens, sizes, splits, value_dim, device):
    """Results (out, lse, state) of `merge.py` as numbers on the CPU, for rows of sizes (batch, heads, i)."""
    merge = importlib.import_module("dpb_triton.attention.kernels.merge")
    launch = importlib.import_module("dpb_triton.attention.kernels.launch")
    batch, heads, i = sizes
    rows = sizes if seqlens is None else (1, heads, int(seqlens[:, 1].sum()))
    with attention_oracle.poison():
        results = launch.empty_results(torch.empty(*rows, 4, device=device), value_dim)
    merge.launch_merge(merge.Partial(*partial), seqlens, results, (batch, heads, i, splits))
    return [result.double().cpu() for result in results]


@pytest.mark.parametrize("dim", [0, 1])
def test_merging_far_apart(dim, device):
    """Batch entries or heads of the result, the last one beyond element 2^31."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    if device != "cpu":
        pytest.skip("the test needs memory that is reserved but never touched; a GPU has none")
    merge = importlib.import_module("dpb_triton.attention.kernels.merge")
    sizes = (3, 1, 2) if dim == 0 else (1, 3, 2)
    partial = merge.Partial(torch.randn(*sizes, 4, 5), torch.randn(*sizes, 4), torch.rand(*sizes, 4) + 0.1)
    near, lse, state = (torch.empty(size) for size in ((*sizes, 5), sizes, (2, *sizes)))
    far = attention_oracle.empty_far_apart(near.shape, dim, FARTHER, near)
    for out in (near, far):
        merge.launch_merge(partial, None, (out, lse, state), (*sizes, 4))
    assert torch.equal(far, near)


def whole(acc, largest, total):
    """The same, by the definition: (out, lse, state)."""
    acc, largest, total = acc.double().nan_to_num(0.0), largest.double(), total.double()
    m = largest.max(-1, keepdim=True).values
    weight = torch.exp2(largest - m.masked_fill(m == -INF, 0))
    l = (weight * total).sum(-1)  # noqa: E741
    out = (weight[..., None] * acc).sum(-2) / l.masked_fill(l == 0, 1)[..., None]
    return out, (m[..., 0] + l.log2()) * math.log(2), torch.stack((m[..., 0], l))


@pytest.mark.parametrize("splits", [1, 8, 11])
def test_merging(splits, device):
    """Parts without a key have stored no acc; a row may have such parts only, at either end, or between others."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    sizes = 2, 3, 4
    torch.manual_seed(0)
    acc, largest = torch.randn(*sizes, splits, 5, device=device), 20 * torch.randn(*sizes, splits, device=device)
    total, is_empty = torch.rand(*sizes, splits, device=device) + 0.1, torch.rand(*sizes, splits, device=device) < 0.4
    is_empty[0, 0], is_empty[:, 1, 0], is_empty[:, 1, 1] = True, False, torch.arange(splits, device=device) % 2 == 0
    largest[is_empty], total[is_empty], acc[is_empty] = -INF, 0.0, NAN
    results = merged((acc, largest, total), None, sizes, splits, 5, device)
    for found, expected in zip(results, whole(*(x.cpu() for x in (acc, largest, total))), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    seqlens = torch.tensor([[3, 2, 0, 9, 0], [0, 3, 9, 9, 0]], dtype=torch.int32, device=device)  # in any order
    parts = [torch.cat((x[1, :, :3], x[0, :, :2]), 1)[None] for x in (acc, largest, total)]
    results = merged((acc, largest, total), seqlens, sizes, splits, 5, device)
    for found, expected in zip(results, whole(*(x.cpu() for x in parts)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    total[1, 2, 3, -1] = NAN  # as of scores with a NaN
    out, lse, (m, l) = merged((acc, largest, total), None, sizes, splits, 5, device)  # noqa: E741
    for numbers in (out, lse, m, l):
        is_nan = numbers.isnan().reshape(*sizes, -1).any(-1)
        assert is_nan.nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("big", [2**31 - 1, 2**33, 2**62])
def test_bounds_beyond_int32(big, attend, device):
    query, key, value, table, *_ = Case(i=3, j=90, spare=9).draw(device)
    whole = attend(query, key, value, table)
    torch.testing.assert_close(attend(query, key, value, table, window=(big, big)), whole)
    causal = attend(query, key, value, table, is_causal=True)
    torch.testing.assert_close(attend(query, key, value, table, window=(big, 0)), causal)
    assert not attend(query, key, value, table, window=(3, 3), offset=big).any()
    assert not attend(query, key, value, table, window=(3, 3), offset=-big).any()


LONG = {
    "one": Case(batch=2, heads=4, i=1, j=700, dtype=torch.bfloat16, layout="transposed"),
    "grouped": Case(heads=8, kv_heads=1, i=2, j=515, head_dim=40, dtype=torch.bfloat16, options={"is_causal": True}),
    "two row blocks": Case(heads=3, kv_heads=1, i=16, j=300, options={"window": (200, 4)}),
    "wide": Case(i=4, j=300, head_dim=136, value_dim=65, options={"is_causal": True}),
    "signed": Case(heads=4, kv_heads=2, i=5, j=517, head_dim=64, options={"is_causal": True, "signed": True}),
}


@pytest.mark.parametrize("name", LONG)
def test_its_own_constants(name, device):
    """The launch constants and splits of a user's call."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    case = LONG[name]
    check_forward(partial(bias_attention, backend="triton"), case.draw(device)[:4], case.dtype, **case.options)


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 90), st.integers(1, 2), st.sampled_from([1, 2, 6]))
BOUND = st.none() | st.integers(0, 60)


@slow
@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES, window=st.tuples(BOUND, BOUND), offset=st.none() | st.integers(-20, 100), signed=st.booleans(),
    block=st.sampled_from([(16, 16, 4, 2), (32, 32, 4, 2), (16, 64, 4, 2)]), least=st.sampled_from([1, 33, 500]),
)  # fmt: skip
def test_any_shape(sizes, window, offset, signed, block, least, device):
    if reason := why_not("triton", device):
        pytest.skip(reason)
    i, j, kv_heads, group = sizes
    j = j if offset is not None else max(i, j)
    options = {"window": window, "offset": offset, "signed": signed}
    case = Case(heads=kv_heads * group, kv_heads=kv_heads, i=i, j=j, head_dim=8, options=options)
    with pytest.MonkeyPatch.context() as patch:
        launched = use_small_splits(patch, block)
        patch.setattr(decode, "LEAST_SPLIT", least)
        check(partial(bias_attention, backend="triton"), case, device)
        assert len(launched) <= 1
    replay.forget()


class TestWhichCalls:
    @pytest.mark.parametrize(
        ("i", "j", "options", "expected"),
        [
            (1, 128, {}, 1),
            (16, 200, {"is_causal": True}, 1),
            (17, 200, {}, 0),
            (1, 127, {}, 0),
            (1, 128, {"dropout_p": 0.5}, 0),
            (1, 128, {"window": (5, 5), "offset": -900}, 0),  # sees nothing
        ],
    )  # fmt: skip
    def test_few_queries_against_many_keys(self, i, j, options, expected, monkeypatch, device):
        if reason := why_not("triton", device):
            pytest.skip(reason)
        launched = []
        monkeypatch.setattr(
            "dpb_triton.attention.kernels.forward.launch_decode",
            lambda *args, **kwargs: launched.append(args) or decode.launch_decode(*args, **kwargs),
        )
        query, key, value, table, *_ = Case(i=i, j=j, options=options, spare=900).draw(device)
        bias_attention(query, key, value, table, backend="triton", **options)
        assert len(launched) == expected

    def test_splits_cover_the_keys_once(self):
        for programs in (1, 7, 300, 5000):
            for visible in (1, 255, 256, 257, 4096, 65_537, 10**6):
                for block in (16, 64, 128):
                    splits, keys = decode.splits_of(programs, visible, block)
                    assert keys % block == 0
                    assert keys >= decode.LEAST_SPLIT
                    assert (splits - 1) * keys < visible <= splits * keys
                    assert splits == 1 or splits * programs <= 2 * decode.PROGRAMS

    def test_amds_tiles(self, monkeypatch):
        """64 KiB of memory hold one block of keys and values."""
        monkeypatch.setattr(decode, "generation", lambda: "cdna")
        query = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16)
        assert decode.tile_of(1, query, query) == decode.tile_of(40, query, query) == blocks.Tile(16, 64, 4, 2)
        assert decode.BLOCK_BYTES["amd"] == 64 * 2 * 64 * 2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_a_tile_fits_a_stage(self, dtype):
        for head_dim in (1, 16, 40, 64, 128, 192, 256):
            for value_dim in (1, 64, 256):
                query, value = (torch.empty(1, 1, 1, dim, dtype=dtype) for dim in (head_dim, value_dim))
                for rows in (1, 16, 17, 1000):
                    tile = decode.tile_of(rows, query, value)
                    assert (tile.block_m, tile.num_warps) == ((16, 4) if rows <= 16 else (32, 8))
                    assert tile.registers == (248 if rows <= 16 and dtype == torch.bfloat16 else 0)  # else it spills
                    bytes_of_key = (blocks.padded(head_dim) + blocks.padded(value_dim)) * query.element_size()
                    assert tile.block_n == 16 or tile.block_n * bytes_of_key <= decode.BLOCK_BYTES["nvidia"]
