# SPDX-License-Identifier: MIT
"""Decoding, a few queries against many keys, agrees with the loops of the definition: every option, dtype and layout,
caches with an unwritten tail, NaN, and the same bits from run to run."""

from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import Case, check_forward
from hypothesis import given, settings
from hypothesis import strategies as st

from dpb_triton import bias_attention
from dpb_triton.attention import torch_path

NAN, INF = float("nan"), float("inf")
J = 45
KEYS = torch.arange(J).expand(2, J)  # masks compare it with each element's first or last seen key
RIGHT, LEFT, BOTH = torch.tensor([[37], [12]]) <= KEYS, torch.tensor([[3], [30]]) > KEYS, KEYS >= 20
HOLES = KEYS * torch.tensor([[5], [7]]) % 11 < 4

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal within the cache": {"is_causal": True, "offset": 19},
    "causal, the first queries see nothing": {"is_causal": True, "offset": -2},
    "causal, nothing is seen": {"is_causal": True, "offset": -30},
    "window": {"window": (9, 4)},
    "window to the left": {"window": (11, None), "offset": 17},
    "window to the right": {"window": (None, 3), "offset": 9},
    "window of one": {"window": (0, 0)},
    "window before the keys": {"window": (3, 3), "offset": -40},
    "window after the keys": {"window": (3, 3), "offset": 80},
    "window, some queries see nothing": {"window": (4, 0), "offset": J + 2},
    "offset beyond": {"offset": 70},
    "offset before": {"offset": -9},
    "offset within": {"offset": 20},
    "signed": {"signed": True},
    "signed, offset before": {"signed": True, "offset": -9},
    "signed, causal window": {"signed": True, "is_causal": True, "window": (8, 0), "offset": 21},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.3},
    "softcap": {"softcap": 1.5, "is_causal": True},
    "mask right": {"key_padding_mask": RIGHT},
    "mask left": {"key_padding_mask": LEFT, "is_causal": True},
    "mask of both the same": {"key_padding_mask": BOTH},
    "mask with holes": {"key_padding_mask": HOLES, "softcap": 2.0},
    "mask of one element": {"key_padding_mask": torch.tensor([[J], [0]]) > KEYS},
    "mask of everything": {"key_padding_mask": KEYS >= 0},
    "mask of nothing": {"key_padding_mask": KEYS < 0},
    "float mask": {"key_padding_mask": torch.linspace(-3, 3, 2 * J).view(2, J), "window": (30, 0)},
    "float mask with -inf": {"key_padding_mask": torch.linspace(-3, 3, 2 * J).view(2, J).masked_fill(RIGHT, -INF)},
}

pytestmark = pytest.mark.parametrize("attention_backend", ["torch", "cpp"])  # test_decode_kernel.py has Triton's


def attend(backend):
    return partial(bias_attention, backend=backend)


def check(function, case, device):
    check_forward(function, case.draw(device)[:4], case.dtype, **case.options)


@pytest.fixture(params=(1, 2, 5, 16))
def i(request, attention_backend, device):
    return request.param


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, attention_backend, device):
    for i in (1, 2, 5, 16):
        check(attend(attention_backend), Case(batch=2, heads=3, kv_heads=1, i=i, j=J, options=options), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_dtypes_and_groups(group, dtype, i, attention_backend, device):
    for batch, options in ((1, {}), (2, {"is_causal": True, "softcap": 3.0})):
        case = Case(batch=batch, heads=2 * group, kv_heads=2, i=i, j=67, dtype=dtype, options=options)
        check(attend(attention_backend), case, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(16, 40), (40, 8), (1, 1), (64, 64), (256, 1)])
def test_dims(head_dim, value_dim, dtype, i, attention_backend, device):
    case = Case(heads=4, kv_heads=2, i=i, j=51, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    check(attend(attention_backend), case, device)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("layout", attention_oracle.LAYOUTS)
def test_layouts(layout, group, i, attention_backend, device):
    """No layout needs a copy, and nothing reads the memory between the rows (NaN here)."""
    case = Case(batch=2, heads=4, kv_heads=4 // group, i=i, j=33, layout=layout)
    check(attend(attention_backend), case, device)


@pytest.mark.parametrize("table", attention_oracle.TABLES[1:])
def test_extreme_tables(table, i, attention_backend, device):
    check(attend(attention_backend), Case(heads=4, kv_heads=2, i=i, j=43, table=table, spare=3), device)


@pytest.mark.parametrize("offset", [None, -4, 12], ids=str)
def test_layouts_of_the_table(offset, i, attention_backend, device):
    query, key, value, table = Case(heads=4, i=i, j=39, spare=2, options={"offset": offset}).draw(device)[:4]
    for laid_out in (table.mT.contiguous().mT, table.repeat_interleave(2, 1)[:, ::2], table[:1].expand(table.shape)):
        check_forward(attend(attention_backend), (query, key, value, laid_out), torch.float32, offset=offset)


def test_one_key_for_all(i, attention_backend, device):
    """Keys and values of stride 0."""
    query, key, value, table = Case(heads=4, i=i, j=39, options={"offset": 21}).draw(device)[:4]
    key, value = (tensor[:, :1, :1].expand(tensor.shape) for tensor in (key, value))
    check_forward(attend(attention_backend), (query, key, value, table), torch.float32, offset=21)


@pytest.mark.parametrize("lengths", [(1, 0), (0, 7), (0, 0)], ids=str)
def test_empty(lengths, attention_backend, device):
    i, j = lengths
    check(attend(attention_backend), Case(batch=2, i=i, j=j, options={"offset": 3}), device)


# The keys are many: splits, chunks, products


LONG = {
    "one head": Case(heads=1, j=4099),
    "group of 8": Case(heads=8, kv_heads=1, j=4099),
    "groups of 4": Case(heads=8, kv_heads=2, j=2051),
    "8 heads": Case(heads=8, j=2304),
    "batch, one key head": Case(batch=3, heads=8, kv_heads=1, j=2051),
    "batch and heads": Case(batch=5, heads=4, j=1031),
    "masked table": Case(heads=4, kv_heads=1, j=4099, table="masked"),
    "mask": Case(batch=2, heads=2, kv_heads=1, j=2051, options={"key_padding_mask": torch.rand(2, 2051) < 0.3}),
    "one split is hidden": Case(batch=2, heads=2, kv_heads=1, j=2048, options={
        "key_padding_mask": torch.arange(2048) >= torch.tensor([[2048], [700]])}),
    "window": Case(heads=4, kv_heads=1, j=4099, options={"window": (2500, 0), "offset": 3000}),
    "softcap": Case(heads=8, kv_heads=2, j=2051, options={"softcap": 4.0}),
    "value_dim": Case(heads=8, kv_heads=2, j=2051, value_dim=24),
}  # fmt: skip


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 1), (torch.float32, 2), (torch.float32, 7), (torch.bfloat16, 3)],
    ids=str,
    indirect=["threads"],
)
@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
def test_many_keys(case, dtype, threads, attention_backend, device):
    """Threads take rows or parts of the keys."""
    for i in (1, 4):
        check(attend(attention_backend), Case(**vars(case) | {"i": i, "dtype": dtype}), device)


def test_a_batch(attention_backend, device):
    for options in ({}, {"key_padding_mask": torch.rand(5, 61) < 0.3}, {"softcap": 2.0}):
        check(attend(attention_backend), Case(batch=5, heads=4, kv_heads=2, i=2, j=61, options=options), device)


@st.composite
def cases(draw):
    i, j = draw(st.integers(1, 17)), draw(st.integers(1, 70))
    options = {"offset": draw(st.integers(-i - 5, j + 5))}
    options |= {name: True for name in ("is_causal", "signed") if draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = tuple(draw(st.none() | st.integers(0, 80)) for _ in range(2))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.3, 30.0]))
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.rand(batch, j, generator=torch.Generator().manual_seed(seed)) < 0.4
    return Case(
        batch=batch, heads=kv_heads * group, kv_heads=kv_heads, i=i, j=j, head_dim=draw(st.integers(1, 20)),
        value_dim=draw(st.none() | st.integers(1, 20)), layout=draw(st.sampled_from(attention_oracle.LAYOUTS)),
        table=draw(st.sampled_from(attention_oracle.TABLES)), spare=draw(st.integers(0, 4)), options=options, seed=seed,
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))),
    )  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_random_combinations(case, attention_backend, device):
    check(attend(attention_backend), case, device)


@pytest.mark.parametrize("options", [{}, {"window": (9, 0)}, {"softcap": 2.0, "signed": True}], ids=str)
def test_gradients(options, i, attention_backend, device):
    """Backward reads the state that forward saved."""
    case = Case(batch=2, heads=4, kv_heads=2, i=i, j=27, options=options | {"is_causal": True})
    attention_oracle.check(attend(attention_backend), case, device)


# A cache


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("options", [{}, {"window": (7, 0)}, {"signed": True, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_token_by_token_equals_the_whole(group, options, chunk, attention_backend, device):
    """The static cache holds NaN where nothing has been written yet."""
    length = 20
    options = options | {"is_causal": True, "enable_gqa": group > 1}
    case = Case(batch=2, heads=4, kv_heads=4 // group, i=length, j=length, options=options)
    query, key, value, table = case.draw(device)[:4]
    attend_to = attend(attention_backend)
    with torch.no_grad():
        whole, whole_lse = attend_to(query, key, value, table, return_lse=True, **options)
        cache = torch.full((2, 2, length + 11, key.shape[1], key.shape[3]), NAN, device=device).transpose(2, 3)
        for x in range(0, length, chunk):
            rows = slice(x, x + chunk)
            cache[0, :, :, rows], cache[1, :, :, rows] = key[:, :, rows], value[:, :, rows]
            written = cache[:, :, :, : x + chunk]
            expected = whole[:, :, rows], whole_lse[:, :, rows]
            for keys, offset in ((written, None), (cache, x)):  # a slice of the cache, or all of it
                results = attend_to(query[:, :, rows], *keys, table, offset=offset, return_lse=True, **options)
                for ours, theirs in zip(results, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_an_unwritten_tail_takes_the_fast_way(i, monkeypatch, attention_backend, device):
    """Causality or a mask cuts off the tail before anything reads it."""
    query, key, value, table = Case(batch=2, heads=4, kv_heads=2, i=i, j=40, options={"offset": 9}).draw(device)[:4]
    key[:, :, 9 + i :] = value[:, :, 9 + i :] = NAN
    # the compiled kernels need no second attempt by torch, and torch none with selects
    monkeypatch.setattr(torch_path, "forward" if attention_backend == "cpp" else "_forward_tiles", None)
    mask = (torch.arange(40, device=device) >= 9 + i).expand(2, 40)
    for options in ({"is_causal": True}, {"key_padding_mask": mask}):
        out = bias_attention(query, key, value, table, offset=9, enable_gqa=True, backend=attention_backend, **options)
        assert out.isfinite().all()


@pytest.mark.parametrize("number", [NAN, INF], ids=str)
@pytest.mark.parametrize("options", [
    {"is_causal": True, "offset": 4}, {"window": (4, 2), "offset": 6}, {"key_padding_mask": KEYS[:, :23] % 3 == 1},
    {"window": (4, None), "offset": 6},
], ids=("causal", "window", "mask", "left"))  # fmt: skip
def test_nan(options, number, i, attention_backend, device):
    """Nothing from an unseen pair; a seen NaN reaches exactly the rows that see it."""
    case = Case(batch=2, heads=4, kv_heads=2, i=i, j=23, options=options)
    for name, at in ((0, (0, 1, i - 1, 2)), (1, (0, 1, 7, 3)), (2, (1, 0, 7, 3)), (2, (0, 0, 20, 3)), (3, (1, 2))):
        tensors = list(case.draw(device)[:4])
        tensors[name][at] = number
        moved = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
        dout = torch.zeros_like(tensors[0])
        exact = attention_oracle.attention(*tensors, dout, options=moved)
        with torch.no_grad(), attention_oracle.poison():
            out, lse = attend(attention_backend)(*tensors, enable_gqa=True, return_lse=True, **moved)
        for ours, theirs in ((out, exact["out"][0]), (lse, exact["lse"][0])):
            ours = ours.double().cpu()
            assert torch.equal(ours.isfinite(), theirs.isfinite())
            assert torch.equal(ours.isneginf(), theirs.isneginf()) or number == INF
            torch.testing.assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()], atol=1e-4, rtol=1e-4)


def test_the_same_bits(attention_backend, device):
    for case in (Case(heads=8, kv_heads=1, i=2, j=5000), Case(heads=8, i=1, j=5000, dtype=torch.bfloat16)):
        tensors = case.draw(device)[:4]
        call = partial(attend(attention_backend), *tensors, enable_gqa=True, return_lse=True)
        first = call()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


def test_results_may_be_written_to(i, attention_backend, device):
    """Also beside a tensor that requires a gradient: the result is no view."""
    query, key, value, table = Case(heads=4, kv_heads=2, i=i, j=30).draw(device)[:4]
    factor = torch.ones(16, device=device, requires_grad=True)
    out, lse = attend(attention_backend)(query, key, value, table, enable_gqa=True, return_lse=True)
    assert not out._is_view() and not lse._is_view()
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    (out.mul_(factor).sum() + lse.mul_(factor[0]).sum()).backward()
    assert factor.grad.isfinite().all()


def test_autocast(i, attention_backend, device):
    query, key, value, table = Case(heads=4, kv_heads=2, i=i, j=30).draw(device)[:4]
    with torch.autocast(device, torch.bfloat16):
        out = attend(attention_backend)(query, key, value, table, enable_gqa=True)
    rounded = (tensor.bfloat16() for tensor in (query, key, value))
    assert torch.equal(out, attend(attention_backend)(*rounded, table, enable_gqa=True))
