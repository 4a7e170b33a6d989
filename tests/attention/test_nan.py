# SPDX-License-Identifier: MIT
"""NaN and Inf: a masked pair has no effect, whatever its numbers are; a seen pair passes them on.

out, lse and all gradients must agree with the loops of the definition, which never read a masked pair.
"""

import importlib
import itertools
from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import CUT, CUT_HIDDEN, Case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from quick import slow

from dpb_triton import bias_attention, bias_attention_varlen
from dpb_triton.attention import torch_products as attention_cpu_products
from dpb_triton.dispatch import why_not

BACKENDS = ("torch", "cpp", "triton")
ON_CPU = ("torch", "cpp")  # not interpreted, so a test may try more
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def attend(attention_backend, device, request):
    if attention_backend == "triton" and device == "cpu":
        request.getfixturevalue("small_tiles")
    return attention_of(attention_backend, device)


@pytest.fixture
def small_tiles(set_tiles):
    """Partly masked tiles are computed pair by pair. If tiles are small, that takes the interpreter less time."""
    set_tiles(dict.fromkeys(("forward", "dkdv", "dq", "dtable"), (16, 16, 4, 1)))


def attention_of(backend, device):
    if why_not(backend, device):
        pytest.skip(f"backend {backend}: {why_not(backend, device)}")
    return partial(bias_attention, backend=backend)


def mask(*rows):
    """One string per batch element: . is a seen key, # is a hidden one."""
    return torch.tensor([[letter == "#" for letter in row] for row in rows])


def set_numbers(tensors, numbers):
    """Write each (name, index, number) into query, key, … and keep their layouts."""
    for name, index, number in numbers:
        tensors[name][index] = number


def assert_same(actual, exact, tolerance, only_nan=True):
    """Results are close where the definition is finite, else not finite; `only_nan` asks for NaN in the same places."""
    for name, (expected, _) in exact.items():
        ours, theirs = actual[name].double().cpu(), expected
        if name == "lse":
            assert torch.equal(ours.isneginf(), theirs.isneginf()), "lse: the rows that see nothing differ"
            ours, theirs = (x.masked_fill(expected.isneginf(), 0) for x in (ours, theirs))
        wrong = ours.isfinite() != theirs.isfinite()
        assert not wrong.any(), f"{name}: {wrong.nonzero()[:5].tolist()} {ours[wrong][:5]} for {theirs[wrong][:5]}"
        if only_nan:
            assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: Inf"
        finite = theirs.isfinite()
        torch.testing.assert_close(
            ours[finite], theirs[finite], atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def check(function, case, numbers, device, keep=None):
    tensors = dict(zip(("query", "key", "value", "table", "dout", "dlse"), case.draw(device), strict=True))
    options = case.options | ({"enable_gqa": True} if case.kv_heads not in (None, case.heads) else {})
    if options.get("key_padding_mask") is not None:
        options["key_padding_mask"] = tensors["mask"] = options["key_padding_mask"].to(device, copy=True)
    set_numbers(tensors, numbers)
    tensors.pop("mask", None)
    exact = attention_oracle.attention(*tensors.values(), options=options, keep=keep)
    with attention_oracle.poison():
        actual = attention_oracle.run(function, *tensors.values(), **options)
    tolerance = 1e-4 if case.dtype == torch.float32 else 6e-2
    assert_same(actual, exact, tolerance, only_nan=all(number != number for *_, number in numbers))


# Each case has masked and seen pairs. In all but two cases some keys and queries have both.
HOLES = mask("#..#....#.........##", "...##..........#....")
ENDS = mask("." * 9 + "#" * 11, "#" * 9 + "." * 11)
CASES = {
    "dense": Case(i=13, j=20),
    "causal": Case(i=20, j=20, options={"is_causal": True}),
    "beyond the last seen key": Case(i=3, j=20, options={"is_causal": True, "offset": 11}),
    "window": Case(i=13, j=20, options={"window": (4, 2)}),
    "left": Case(i=13, j=20, options={"window": (4, None), "signed": True}),
    "rows that see nothing": Case(i=20, j=20, options={"is_causal": True, "offset": -7}),
    "mask": Case(batch=2, i=13, j=20, options={"key_padding_mask": HOLES}),
    "mask and causality": Case(batch=2, i=20, j=20, options={"key_padding_mask": HOLES, "is_causal": True}),
    "mask at the ends": Case(batch=2, i=13, j=20, options={"key_padding_mask": ENDS}),
    "all of one hidden": Case(batch=2, i=13, j=20, options={"key_padding_mask": mask("#" * 20, "." * 20)}),
    "float mask": Case(batch=2, i=13, j=20, options={"key_padding_mask": torch.linspace(-2, 2, 40).view(2, 20)}),
    "float mask with -inf": Case(
        batch=2, i=13, j=20, options={"key_padding_mask": torch.zeros(2, 20).masked_fill(HOLES, -INF), "window": (6, 1)}
    ),
    "grouped heads": Case(heads=4, kv_heads=2, i=20, j=20, options={"is_causal": True}),
    "grouped heads and mask": Case(batch=2, heads=4, kv_heads=2, i=13, j=20, options={"key_padding_mask": HOLES}),
    "softcap": Case(batch=2, i=20, j=20, options={"is_causal": True, "softcap": 2.0, "key_padding_mask": HOLES}),
    "value_dim": Case(i=20, j=20, head_dim=8, value_dim=3, options={"is_causal": True}),
    "bfloat16": Case(i=20, j=20, dtype=torch.bfloat16, options={"is_causal": True}),
    "table of -inf": Case(i=20, j=20, table="masked", options={"is_causal": True}),
}  # fmt: skip
# Each of these takes the interpreter half a second. `make test` runs QUICK, where causality hides pairs, or a window
# and a mask. Rows whose scores are all -inf are not here, because the kernels still use their dout and query.
ON_TRITON = (
    "causal", "window", "rows that see nothing", "mask and causality", "float mask with -inf", "grouped heads and mask",
    "softcap", "value_dim", "bfloat16",
)  # fmt: skip
QUICK = ("rows that see nothing", "float mask with -inf")


def on_backends(first=None):
    """All CASES on torch and C++, and the first `first` of ON_TRITON on Triton."""
    pairs = [(name, backend) for name in CASES for backend in ON_CPU]
    pairs += [(name, "triton") for name in ON_TRITON[:first]]
    params = []
    for name, backend in pairs:
        param = slow if backend == "triton" and name not in QUICK else pytest.param
        params.append(param(CASES[name], backend, id=f"{name}-{backend}"))
    return pytest.mark.parametrize(("case", "attention_backend"), params)


PLACES = {  # for each tensor: one in the middle, one at an end
    "query": [(0, 1, 7, 3), (-1, 0, 0, 0)],
    "key": [(0, 1, 8, 3), (-1, 0, 0, 0)],
    "value": [(0, 1, 8, 2), (-1, 0, -1, 0)],
    "table": [(1, 3), (0, 0)],
    "dout": [(0, 1, 7, 2), (-1, 0, 0, 0)],
    "dlse": [(0, 1, 7), (-1, 0, 0)],
    "mask": [(0, 4), (-1, 0)],
}


def places(case, name):
    """The PLACES of a tensor that exist in this case."""
    if name == "mask":
        keys = case.options.get("key_padding_mask")
        return PLACES[name] if keys is not None and keys.is_floating_point() else []
    last = case.i - 1
    return [
        (*index[:2], min(index[2], last), *index[3:]) if name in ("query", "dout", "dlse") else index
        for index in PLACES[name]
    ]


@pytest.mark.parametrize("name", PLACES)
@on_backends()
def test_one_nan(case, name, attention_backend, attend, device):
    numbers = [(name, index, NAN) for index in places(case, name)]
    # the interpreter is slow, so it gets all numbers in one call
    for part in [[number] for number in numbers] if attention_backend in ON_CPU else [numbers]:
        check(attend, case, part, device)


@on_backends()
def test_whole_keys_hold_nothing_else(case, attention_backend, attend, device):
    """Whole rows of key and value in every head, masked for some queries or for all."""
    for number in (NAN, INF, -INF)[: 3 if attention_backend in ON_CPU else 1]:
        rows = [(name, (slice(None), slice(None), y), number) for name in ("key", "value") for y in (0, 3, 8, 19)]
        check(attend, case, rows, device)


@pytest.mark.parametrize("names", [("query",), ("key",), ("value", "dout")], ids="-".join)
@on_backends(4)
def test_one_inf(case, names, attend, device):
    check(attend, case, [(name, places(case, name)[0], INF) for name in names], device)


@on_backends()
def test_everything_is_nan(case, attend, device):
    """As in a model that diverged."""
    check(attend, case, [(name, ..., NAN) for name in ("query", "key", "value", "dout")], device)


def test_infinite_values_give_infinity_not_nan(device):
    """Rows that see an infinite value get +Inf or -Inf, and NaN where both meet, as in a matrix product."""
    attend = attention_of("torch", device)
    query, key, value, table, *_ = Case(i=6, j=6).draw(device)
    value[0, 0, 2, 0], value[0, 0, 4, 0], value[0, 0, 3, 1] = INF, -INF, -INF
    out = attend(query, key, value, table, is_causal=True)[0, 0]
    assert out[:, 0].tolist()[2:4] == [INF, INF] and out[4:, 0].isnan().all() and out[:2].isfinite().all()
    assert (out[3:, 1] == -INF).all() and out[:3, 1].isfinite().all() and out[:, 2:].isfinite().all()


@pytest.mark.parametrize("attention_backend", BACKENDS)
@pytest.mark.parametrize("options", [slow({}), {"is_causal": True, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value", "dout"])
def test_dropout(name, options, attend, device):
    case = Case(batch=2, i=20, j=20, options=options | {"dropout_p": 0.4, "key_padding_mask": HOLES})
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device).item()
    keep = attention_oracle.dropout_keep(seed, 2, 2, 20, 20, 0.4)
    torch.manual_seed(11)
    check(attend, case, [(name, (0, 1, 8, 2), NAN), (name, (1, 0, 3, 1), NAN)], device, keep=keep)


@pytest.mark.parametrize("attention_backend", BACKENDS)
def test_the_gradient_of_an_lse_that_is_negative_infinity(attend, device):
    """No pair is masked, but all scores are -inf. A loss of such an lse often has NaN as its gradient."""
    check(attend, Case(heads=1, i=5, j=7, head_dim=4, table="all masked"), [("dlse", ..., NAN)], device)


@pytest.mark.parametrize("attention_backend", BACKENDS)
def test_a_tile_of_one_query(attend, device):
    """No other row of its tile shows the NaN, which it does not see."""
    case = Case(heads=1, i=17, j=17, head_dim=4, options={"window": (5, None)})
    check(attend, case, [(name, (0, 0, 3), NAN) for name in ("key", "value")], device)


# 44 programs, 11 for each head. In a second launch one program reads their flags as 32 and 12, or four programs read
# 11 each. A query sees one key, so each NaN meets one program only.
MANY = Case(heads=4, i=176, j=176, head_dim=4, options={"window": (0, 0)})


@pytest.mark.parametrize("attention_backend", ["triton"])
@pytest.mark.parametrize(("program", "repairers"), [(0, 4), (31, 1), (32, 1), (43, 1), (43, 4)])
def test_one_program_of_many(program, repairers, attend, small_tiles, monkeypatch, device):
    """A program of the second launch reads many flags and finds each: the first, a group's last, the next, the last."""
    launch = pytest.importorskip("dpb_triton.attention.kernels.launch")
    monkeypatch.setattr(launch, "REPAIR_WARPS", 4 * repairers)
    names, redone = {"forward", "dq", "dkdv"} if device == "cpu" else set(), set()  # a GPU runs no Python
    for name in names:
        watch(name, redone, monkeypatch)
    head, block = divmod(program, 11)
    y, x = 16 * (10 - block) + 5, 16 * block + 5  # program 0 takes the last block of queries, but the first of keys
    numbers = [(name, (0, head, y), NAN) for name in ("key", "value")]
    numbers += [(name, (0, head, x), NAN) for name in ("query", "dout")]
    check(attend, MANY, numbers, device)
    assert redone == names


def watch(name, redone, monkeypatch):
    """Add `name` to `redone` when the second launch of this kernel redoes a program. It may redo none twice."""
    kernel, seen = importlib.import_module(f"dpb_triton.attention.kernels.{name}"), set()
    program = kernel._program

    def watched(pid, *more):
        if more[-1].IS_REPAIR:
            assert int(pid) not in seen, f"{name} redoes program {int(pid)} twice"
            seen.add(int(pid))
            redone.add(name)
        else:
            seen.clear()  # another call begins
        return program(pid, *more)

    monkeypatch.setattr(kernel, "_program", watched)


@pytest.mark.parametrize("attention_backend", BACKENDS)
@pytest.mark.parametrize("tensor", [slow("query"), "key", "value", slow("dout")])
def test_packed_sequences(tensor, attention_backend, device):
    """A NaN stays in its own sequence, and acts there as in a call with that sequence alone."""
    attention_of(attention_backend, device)
    lengths, offsets = [(5, 9), (7, 7), (0, 3), (6, 4)], (4, 0, 1, -2)
    starts = [(sum(i for i, _ in lengths[:n]), sum(j for _, j in lengths[:n])) for n in range(5)]
    case = Case(heads=4, kv_heads=2, i=18, j=23, options={"is_causal": True, "enable_gqa": True})
    tensors = dict(zip(("query", "key", "value", "table", "dout", "dlse"), case.draw(device), strict=True))
    tensors[tensor][0, 1, 8] = NAN
    cu = [torch.tensor(column, dtype=torch.int32, device=device) for column in zip(*starts, strict=True)]

    def packed(query, key, value, table, return_lse, **options):
        out, lse = bias_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)), table, *cu, return_lse=return_lse,
            offsets=torch.tensor(offsets, dtype=torch.int32, device=device), backend=attention_backend, **options,
        )  # fmt: skip
        return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]

    actual = attention_oracle.run(packed, *tensors.values(), **case.options)
    rows, keys = ("query", "dout", "dlse"), ("key", "value")
    total = torch.zeros(tensors["table"].shape, dtype=torch.float64)
    for (i, j), (x, y), offset in zip(lengths, starts[:-1], offsets, strict=True):
        part = {name: t[:, :, x : x + i] if name in rows else t for name, t in tensors.items()}
        part = {name: t[:, :, y : y + j] if name in keys else t for name, t in part.items()}
        exact = attention_oracle.attention(*part.values(), options=case.options | {"offset": offset})
        total += exact.pop("dtable")[0]
        ours = {
            name: actual[name][:, :, y : y + j] if name in ("dk", "dv") else actual[name][:, :, x : x + i]
            for name in exact
        }
        assert_same(ours, exact, 1e-4)
    assert_same(actual, {"dtable": (total, None)}, 1e-4)


@pytest.mark.parametrize("attention_backend", ["triton"])
def test_nobody_asks_for_a_repair_without_a_nan(attention_backend, small_tiles, monkeypatch, device):
    """Programs beyond the end of their sequence clear their flags too, else a second launch would act on old memory."""
    attention_of(attention_backend, device)
    launch = pytest.importorskip("dpb_triton.attention.kernels.launch")
    flags, empty = [], launch.empty

    def filled(size, dtype, *more):
        made = empty(size, dtype, *more)
        if dtype == torch.int32:
            flags.append(made.fill_(7))
        return made

    monkeypatch.setattr(launch, "empty", filled)
    query, key, value = (torch.randn(50, 2, 4, device=device, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 3, 40, 50], dtype=torch.int32, device=device)
    table = torch.randn(2, 40, device=device)
    out = bias_attention_varlen(query, key, value, table, cu, cu, is_causal=True, backend="triton")
    torch.autograd.grad(out.sum(), (query, key, value))
    assert [len(found) for found in flags] == [18, 18, 18]  # 3 blocks for each of 3 sequences and 2 heads
    assert not torch.cat(flags).any()


IN_TILES = {
    "causal": {"is_causal": True, "offset": -2},
    "window, holes": {"window": (4, 2), "key_padding_mask": CUT_HIDDEN},
    "softcap, float mask": {
        "softcap": 2.0, "window": (None, 3),
        "key_padding_mask": torch.linspace(-2, 2, 39).view(3, 13).masked_fill(CUT_HIDDEN, -INF),
    },
}  # fmt: skip


@pytest.mark.parametrize("options", IN_TILES.values(), ids=IN_TILES)
def test_cut_into_tiles(options, small_cuts, device):
    """Plain torch works in several blocks of heads, elements and rows; one of them holds the NaN."""
    case = Case(**CUT, options=options)
    for name, number in (*((name, NAN) for name in ("query", "key", "value", "dout", "mask")), ("value", INF)):
        check(attention_of("torch", device), case, [(name, at, number) for at in places(case, name)[:1]], device)


@pytest.mark.parametrize("is_at_hand", [False, True])
def test_a_product_is_the_sum_over_the_seen_pairs(is_at_hand, monkeypatch):
    """For weights of both signs and 0, and every mix of NaN, Inf and -Inf among the seen keys."""
    monkeypatch.setattr(attention_cpu_products, "is_at_hand", lambda tensor: is_at_hand)
    generator = torch.Generator().manual_seed(0)
    for numbers in ((1.0, INF), (1.0, -INF), (1.0, 2.0, 3.0, INF, -INF), (1.0, 2.0, 3.0, 4.0, INF, NAN)):
        mask = torch.rand(3, 40, 4, generator=generator) < 0.5
        a = torch.randint(-1, 3, mask.shape, generator=generator).double().masked_fill(mask, 0)
        b = torch.tensor(numbers, dtype=torch.float64)[torch.randint(len(numbers), (3, 4, 5), generator=generator)]
        terms = a[..., None] * b[:, None]
        expected = torch.where(mask[..., None], 0, terms).sum(2)
        assert expected.isnan().any() and (expected.isfinite().any() or len(numbers) == 2)
        assert torch.equal(attention_cpu_products.product(a, b, mask).nan_to_num(7e99, 8e99, 9e99),
                           expected.nan_to_num(7e99, 8e99, 9e99))  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_where_the_numbers_would_have_to_be_waited_for(case, monkeypatch, device):
    """On other devices plain torch does not ask whether there is a NaN: it would wait for the answer."""
    monkeypatch.setattr(attention_cpu_products, "is_at_hand", lambda tensor: False)
    monkeypatch.setattr(attention_cpu_products, "has_nan", None)
    for name, number in (("query", NAN), ("key", INF), ("value", NAN), ("value", INF), ("dout", NAN), ("mask", NAN)):
        check(attention_of("torch", device), case, [(name, at, number) for at in places(case, name)], device)


@pytest.mark.parametrize("length", [300, 1500])
def test_long_rows_of_every_kernel(length):
    """torch's own CPU kernels pass a NaN on from any place in their vectors and blocks."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, length, 8)
    table = torch.randn(1, length)
    clean = bias_attention(query, key, value, table, is_causal=True, backend="torch")
    for y in (0, 15, 16, 255, length - 1):
        for tensors in (
            (query, poisoned(key, y), value),
            (query, key, poisoned(value, y)),
            (poisoned(query, y), key, value),
        ):
            out = bias_attention(*tensors, table, is_causal=True, backend="torch")[0, 0]
            rows = torch.arange(length) >= y if tensors[0] is query else torch.arange(length) == y
            assert torch.equal(out.isnan().any(1), rows)
            torch.testing.assert_close(out[~rows], clean[0, 0, ~rows], atol=1e-5, rtol=1e-5)


def poisoned(tensor, y):
    tensor = tensor.clone()
    tensor[0, 0, y, 5] = NAN
    return tensor


# Random calls

SIDES = st.none() | st.integers(0, 12) | st.sampled_from([2**31 - 1, 2**31, 2**62, 2**63 - 1])
FAR = st.sampled_from([2**31 - 1, -(2**31), 2**32 + 5, 2**60, -(2**60)])


@st.composite
def calls(draw, kinds=(NAN, INF, -INF), tables=("normal", "masked")):
    """(case, numbers, a far offset or None): odd layouts, extreme integers, NaN and Inf anywhere, masked or seen."""
    i, j = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    heads, kv_heads = draw(st.sampled_from([(1, None), (2, None), (4, 2), (3, 1)]))
    options = {name: True for name in ("is_causal", "signed") if draw(st.booleans())}
    options["window"] = (draw(SIDES), draw(SIDES))
    options["offset"] = draw(st.integers(-12, 20))
    if draw(st.booleans()):
        options["softcap"] = 1.5
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        keys = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=j, max_size=j), min_size=2, max_size=2)))
        floats = torch.linspace(-2, 2, 2 * j).view(2, j).masked_fill(keys, -INF)
        options["key_padding_mask"] = keys if kind == "bool" else floats
    case = Case(
        batch=2, heads=heads, kv_heads=kv_heads, i=i, j=j, head_dim=draw(st.integers(1, 9)),
        value_dim=draw(st.none() | st.integers(1, 9)), layout=draw(st.sampled_from(attention_oracle.LAYOUTS)),
        table=draw(st.sampled_from(tables)), options=options,
    )  # fmt: skip
    numbers = []
    for name in draw(st.lists(st.sampled_from(("query", "key", "value", "table", "dout", "dlse")), max_size=3)):
        index = tuple(draw(st.integers(0, 15)) for _ in range({"table": 2, "dlse": 3}.get(name, 4)))
        numbers.append((name, index, draw(st.sampled_from(kinds))))
    return case, numbers, draw(st.none() | FAR)


def check_call(call, backend, device):
    case, numbers, far = call
    attend = attention_of(backend, device)
    shapes = {
        name: x.shape for name, x in zip(("query", "key", "value", "table", "dout", "dlse"), case.draw(), strict=True)
    }
    numbers = [
        (name, tuple(k % size for k, size in zip(index, shapes[name], strict=True)), number)
        for name, index, number in numbers
    ]
    check(attend, case, numbers, device)
    left, right = case.options["window"]
    right = 0 if case.options.get("is_causal") else right
    side = None if far is None else left if far > 0 else right
    if side is None or side > 12:
        return
    # an offset so far that no pair is seen
    *tensors, dout, dlse = case.draw(device)
    options = case.options | {"offset": far, "enable_gqa": True}
    results = attention_oracle.run(attend, *tensors, dout, dlse, **options)
    assert (results.pop("lse") == -INF).all()
    assert all((tensor == 0).all() for tensor in results.values())


@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.parametrize("attention_backend", ON_CPU)
@given(call=calls())
def test_random_calls(call, attention_backend, device):
    check_call(call, attention_backend, device)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(call=calls((NAN,), ("normal",)))
def test_random_calls_triton(call, device):
    check_call(call, "triton", device)


@st.composite
def packed_calls(draw):
    """(lengths, options, numbers): sequences side by side, NaN and Inf anywhere."""
    lengths = draw(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(-9, 9)), min_size=1, max_size=4)
    )
    options = {"is_causal": draw(st.booleans()), "window": (draw(SIDES), draw(SIDES))}
    places = st.tuples(
        st.sampled_from(("query", "key", "value")), st.integers(0, 40), st.sampled_from([NAN, INF, -INF])
    )
    return lengths, options, draw(st.lists(places, max_size=3))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(call=packed_calls())
def test_random_packed_sequences(call, device):
    """Each sequence gives the same as alone, whatever its neighbours hold, forward and backward."""
    lengths, options, numbers = call
    total = [sum(length[side] for length in lengths) for side in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(rows, 2, 4, generator=generator)
        for name, rows in (("query", total[0]), ("key", total[1]), ("value", total[1]))
    }
    for name, row, number in numbers:
        if len(tensors[name]):
            tensors[name][row % len(tensors[name]), 1, 2] = number
    query, key, value = (x.to(device).requires_grad_() for x in tensors.values())
    table = torch.randn(2, 19, generator=generator).to(device)
    cu = [
        torch.tensor([0, *itertools.accumulate(length[side] for length in lengths)], dtype=torch.int32, device=device)
        for side in (0, 1)
    ]
    offsets = torch.tensor([length[2] for length in lengths], dtype=torch.int32, device=device)
    out, lse = bias_attention_varlen(query, key, value, table, *cu, offsets=offsets, return_lse=True, **options)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    for n, (i, j, offset) in enumerate(lengths):
        x, y = slice(cu[0][n], cu[0][n] + i), slice(cu[1][n], cu[1][n] + j)
        parts = [t[rows].detach().requires_grad_() for t, rows in ((query, x), (key, y), (value, y))]
        alone, its_lse = bias_attention(
            *(part.transpose(0, 1)[None] for part in parts), table, offset=offset, return_lse=True, **options
        )
        expected = torch.autograd.grad(alone.sum(), parts)
        close = partial(torch.testing.assert_close, equal_nan=True, atol=1e-5, rtol=1e-4)
        close(out[x], alone[0].transpose(0, 1))
        close(lse[x], its_lse[0].transpose(0, 1))
        for grad, part, rows in zip(grads, expected, (x, y, y), strict=True):
            close(grad[rows], part)
