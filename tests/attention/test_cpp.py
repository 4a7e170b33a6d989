# SPDX-License-Identifier: MIT
"""What only the compiled CPU kernels promise: the same bits with any number of threads, torch's path only where it is
needed, no memory of size i * j, no read outside a tensor."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import attention_oracle
import pytest
import torch
from attention_oracle import Case, far_apart
from quick import slow_but

from dpb_triton import bias_attention, bias_attention_varlen, dispatch
from dpb_triton.attention import cpp_path, torch_path
from dpb_triton.dispatch import why_not

pytestmark = [
    pytest.mark.skipif(why_not("cpp", "cpu") is not None, reason=f"backend cpp: {why_not('cpp', 'cpu')}"),
    pytest.mark.skipif(not cpp_path.IS_BUILT, reason="this compiler has no vectors, so there are no kernels"),
]
NAN, INF = float("nan"), float("inf")
attend = partial(bias_attention, backend="cpp")


@pytest.fixture
def taken(monkeypatch):
    """Which functions of torch's path the kernels hand over to, in order."""
    names = []
    for name in ("forward", "backward"):
        function = getattr(torch_path, name)

        def recorded(*arguments, name=name, function=function):
            names.append(name)
            return function(*arguments)

        monkeypatch.setattr(torch_path, name, recorded)
    return names


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The same bits


def packed(lengths, query, key, value, table, return_lse, **options):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out, lse = bias_attention_varlen(*qkv, table, cu, cu, return_lse=return_lse, backend="cpp", **options)
    return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]


FLOATS = {"key_padding_mask": torch.linspace(-2, 2, 1200).masked_fill(torch.arange(1200) % 5 == 2, -INF).view(2, 600)}
BITS = {
    "1 head": Case(heads=1, i=700, j=3000),
    "1 head, causal": Case(heads=1, i=3000, j=3000, options={"is_causal": True}),
    "8 heads": Case(heads=8, i=600, j=600, options={"signed": True}),
    "8 heads, causal": Case(heads=8, i=600, j=600, options={"is_causal": True}),
    "softcap and dropout": Case(heads=3, i=450, j=1100, options={"softcap": 2.0, "dropout_p": 0.2}),
    "key bias": Case(batch=2, i=600, j=600, options=FLOATS),
    "window": Case(heads=2, i=900, j=1500, options={"window": (300, 20)}),
    "groups": Case(heads=6, kv_heads=2, i=500, j=1300),
    "a decoding step": Case(heads=4, kv_heads=1, i=1, j=5000),
    "decoding steps": Case(batch=2, heads=4, kv_heads=1, i=2, j=5000, options={"is_causal": True}),
    "packed": Case(heads=2, i=1800, j=1800, options={"is_causal": True}),
    "packed groups": Case(heads=4, kv_heads=2, i=1800, j=1800),
}
LENGTHS = (1, 700, 0, 299, 800)


QUICK = ("1 head", "8 heads, causal", "key bias", "groups", "a decoding step", "packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", slow_but(QUICK, BITS))
def test_the_same_bits_with_any_number_of_threads(case, dtype, set_threads, taken):
    is_packed = case.i == sum(LENGTHS)
    case = Case(**vars(case) | {"dtype": dtype, "head_dim": 40})
    function = partial(packed, LENGTHS) if is_packed else attend
    results = []
    for threads in (1, 2, 3, 4):
        set_threads(threads)
        torch.manual_seed(0)
        with attention_oracle.poison():
            results.append(attention_oracle.run(function, *case.draw(), enable_gqa=True, **case.options))
    assert len(results[0]) == 6 + ("key_padding_mask" in case.options) and taken == []
    for threads, result in enumerate(results[1:], 2):
        for name, tensor in result.items():
            assert torch.equal(tensor, results[0][name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"is_causal": True}, {"window": (70, 9)}, {"softcap": 2.0},
    {"key_padding_mask": (torch.arange(3 * 710).view(3, 710) * 7 % 11 < 3) | (torch.arange(710) < 45)},
], ids=("plain", "causal", "window", "softcap", "mask"))  # fmt: skip
def test_a_row_does_not_depend_on_the_others(options, dtype, set_threads, taken):
    """Alone, in another chunk, in another strip: the same bits, forward."""
    case = Case(batch=3, heads=4, kv_heads=2, i=450, j=710, head_dim=24, dtype=dtype, options=options)
    query, key, value, table, *_ = case.draw()
    mask = options.get("key_padding_mask")
    call = partial(attend, table=table, return_lse=True, enable_gqa=True)
    set_threads(4)
    whole = call(query, key, value, **options)
    for b in range(3):
        one = {} if mask is None else {"key_padding_mask": mask[b : b + 1]}
        for x, end in ((0, 450), (0, 193), (1, 12), (100, 231), (437, 450)):
            rows = slice(x, end)
            qkv = query[b : b + 1, :, rows], key[b : b + 1], value[b : b + 1]
            for threads in (1, 4):
                set_threads(threads)
                results = call(*qkv, offset=260 + x, **options | one)
                for name, ours, theirs in zip(("out", "lse"), results, whole, strict=True):
                    assert torch.equal(ours[0], theirs[b, :, rows]), f"{name} of rows {x} to {end} of {b}"
    assert taken == []


# Ends of what is seen


FIRST = torch.arange(64).expand(1, 64)
ENDS = {
    "hidden keys fill a panel": {"key_padding_mask": FIRST < 16},
    "rows see only keys of a small number": {
        "key_padding_mask": (FIRST < 20) * -2e30, "is_causal": True, "offset": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", ENDS.values(), ids=ENDS)
def test_the_first_keys(options, taken):
    attention_oracle.check(attend, Case(i=30, j=64, head_dim=8, options=options))
    assert taken == []


def test_a_table_as_long_as_its_window(taken):
    query, key, value, table, *_ = Case(i=30, j=64).draw()
    results = [attend(query, key, value, x, window=(4, 2)) for x in (table, table[:, :5])]
    assert torch.equal(*results) and taken == []


def test_a_decoding_step_whose_first_keys_have_no_weight(taken):
    """All scores of its first block are -inf."""
    query, key, value, table, *_ = Case(i=1, j=600).draw()
    table[:, 300:] = -INF
    out = attend(query, key, value, table)
    torch.testing.assert_close(out, attend(query, key[:, :, 300:], value[:, :, 300:], table))
    assert taken == []


# Where torch's path takes over


def mask(first, last):
    """Batch element 0 hides keys with holes between them, element 1 those before `first` and from `last` on."""
    keys = torch.arange(64)
    return torch.stack([keys % 5 == 1, (keys < first) | (keys >= last)])


SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "i": 30, "j": 64}
FINITE = {
    "plain": Case(**SHAPE),
    "causal": Case(**SHAPE, options={"is_causal": True}),
    "window": Case(**SHAPE, options={"window": (4, 2)}),
    "holes": Case(**SHAPE, options={"key_padding_mask": mask(3, 50)}),
    "holes in a float mask": Case(
        **SHAPE, options={"key_padding_mask": torch.zeros(2, 64).masked_fill(mask(3, 50), -INF)}
    ),
    "all of one hidden": Case(**SHAPE, options={"key_padding_mask": mask(64, 64), "is_causal": True}),
    "rows that see nothing": Case(**SHAPE, options={"is_causal": True, "offset": -7}),
    "no row sees a key": Case(**SHAPE, options={"is_causal": True, "offset": -60}),
    "window beyond": Case(**SHAPE, options={"window": (4, 4), "offset": 50}),
    "table of -inf": Case(**SHAPE, table="masked"),
    "table of -inf only": Case(**SHAPE, table="all masked"),
    "huge table": Case(**SHAPE, table="huge"),
    "large table": Case(**SHAPE, table="large", options={"softcap": 1.0}),
    "dropout": Case(**SHAPE, options={"dropout_p": 0.9}),
    "decoding": Case(**SHAPE | {"i": 1}, options={"key_padding_mask": mask(3, 50)}),
    "NaN between the rows": Case(**SHAPE, layout="sliced"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FINITE.values(), ids=FINITE)
def test_finite_numbers_stay_with_the_kernels(case, dtype, taken):
    case = Case(**vars(case) | {"dtype": dtype})
    attention_oracle.run(attend, *case.draw(), enable_gqa=True, **case.options)
    assert taken == []


ALL, ONE = Case(**SHAPE), Case(**SHAPE | {"i": 1})
UNSEEN = {  # the case, and the keys that no query sees
    "causal tail": (ALL, {"is_causal": True, "offset": 7}, (slice(None), slice(None), slice(37, None))),
    "before a window": (ALL, {"window": (5, None), "offset": 36}, (slice(None), slice(None), slice(0, 31))),
    "one key of a panel before a window": (
        ALL,
        {"window": (3, None), "offset": 36},
        (slice(None), slice(None), slice(33)),
    ),
    "after a window": (ALL, {"window": (None, 3), "offset": 5}, (slice(None), slice(None), slice(38, None))),
    "hidden ends": (ALL, {"key_padding_mask": mask(32, 45)}, (1, slice(None), [*range(32), 45, 63])),
    "any hidden ends": (ALL, {"key_padding_mask": mask(19, 45)}, (1, slice(None), [*range(19), 45, 63])),
    "no row sees a key": (ALL, {"is_causal": True, "offset": -60}, ...),
    "a decoding step's tail": (ONE, {"is_causal": True, "offset": 20}, (slice(None), slice(None), slice(21, None))),
    "a decoding step's ends": (ONE, {"key_padding_mask": mask(19, 45)}, (1, slice(None), [*range(19), 45, 63])),
}


@pytest.mark.parametrize("number", [NAN, INF], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "options", "keys"), [
    pytest.param(*values, id=name) for name, values in UNSEEN.items()
])  # fmt: skip
def test_keys_that_no_query_sees_may_hold_nan(case, options, keys, dtype, number, taken):
    """Forward's kernels do not read them."""
    case = Case(**vars(case) | {"dtype": dtype, "head_dim": 32, "options": options})
    query, key, value, table, *_ = case.draw()
    key[keys] = value[keys] = number
    out = attend(query, key, value, table, enable_gqa=True, **case.options)
    assert out.isfinite().all() and taken == []


@pytest.mark.parametrize("name", ["query", "key", "value", "dout"])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"window": (9, 2)}, {"key_padding_mask": mask(3, 50)}], ids=str
)
def test_nan_beside_seen_numbers_takes_torch(name, options, taken):
    """A NaN at a pair that is masked inside a tile spoils the kernel's results, so torch computes them again."""
    case = Case(**SHAPE, options=options)
    at = 0, 1, 46 if name in ("key", "value") else 11, 2  # key 46: seen by some queries, or hidden
    tensors = case.draw()
    tensors[("query", "key", "value", "table", "dout").index(name)][at] = NAN
    exact = attention_oracle.attention(*tensors, options=options)
    with attention_oracle.poison():
        results = attention_oracle.run(attend, *tensors, enable_gqa=True, **options)
    assert taken == (["backward"] if name == "dout" else ["forward", "backward"])
    for result, (expected, _) in exact.items():
        assert torch.equal(results[result].isnan(), expected.isnan().to(results[result].device)), result


@pytest.mark.parametrize(("name", "j"), [
    ("query", 64), ("query", 1030), ("key", 64), ("value", 64), ("table", 64), ("mask", 64),
])  # fmt: skip
def test_nan_in_the_only_gradient_takes_torch(name, j, taken):
    """The kernels look at each result, so a single wanted one suffices. 1030 keys are two parts, whose dq are added."""
    case = Case(**SHAPE | {"j": j}, options={"is_causal": True, "key_padding_mask": torch.zeros(2, j)})
    query, key, value, table, dout, _ = tensors = case.draw()
    dout[0, 1, 11, 2] = NAN
    expected = attention_oracle.attention(*tensors[:5], options=case.options)
    mask = case.options["key_padding_mask"]
    wanted = {"query": query, "key": key, "value": value, "table": table, "mask": mask}[name].requires_grad_()
    attend(query, key, value, table, enable_gqa=True, **case.options).backward(dout)
    assert taken == ["backward"]
    short = {"query": "dq", "key": "dk", "value": "dv"}.get(name, f"d{name}")
    assert torch.equal(wanted.grad.isnan(), expected[short][0].isnan())


def test_nan_in_a_split_of_a_decoding_step_takes_torch(taken):
    holes = (torch.arange(2100) % 5 == 1).expand(1, 2100)
    query, key, value, table, *_ = Case(i=1, j=2100).draw()
    key[0, 1, 1501, 2] = NAN
    out = attend(query, key, value, table, key_padding_mask=holes)
    assert out.isfinite().all() and taken == ["forward"]


def test_nan_at_a_dropped_pair_takes_torch(taken):
    """All other scores are -inf, and what is kept is 0, so only the sum of the row shows it."""
    query, key, value, table, *_ = Case(i=2, j=70, table="all masked").draw()
    key[:, :, 0] = NAN
    torch.manual_seed(0)
    out = attend(query, key, value, table, dropout_p=0.99)
    assert out.isnan().all() and taken == ["forward"]


# Precision


def test_a_long_sum_keeps_its_small_terms(taken):
    """Each row adds its gradient to distance 0. Float32 would round every sum of 1 and a strip's terms to 1."""
    query, key, value, table, dout, _ = Case(heads=1, i=600, j=600).draw()
    dlse = torch.full((1, 1, 600), 4e-9)
    dlse[0, 0, 0] = 1
    results = attention_oracle.run(attend, query, key, value, table, 0 * dout, dlse, window=(0, 0))
    assert results["dtable"][0, 0].item() == pytest.approx(1 + 599 * 4e-9, rel=2e-7) and taken == []


def test_float64_and_empty_calls_take_torch(taken):
    for case in (Case(dtype=torch.float64), Case(i=0), Case(j=0, options={"offset": 1})):
        attention_oracle.run(attend, *case.draw(), **case.options)
    assert taken == ["forward", "backward"] * 3


# Memory


@pytest.mark.parametrize("numbers", [
    (0, 5, 0, 8), (0, 4, 0, 9), (3, 2, 0, 8), (0, 4, 2, 7), (-1, 4, 0, 8), (0, 4, -1, 8), (0, -1, 0, 8), (0, 4, 0, -1),
    (2**31 - 1, 1, 0, 8), (1, 2**31 - 1, 0, 8), (0, 4, 2**31 - 1, 2**31 - 1),
], ids=str)  # fmt: skip
def test_a_sequence_beyond_its_tensors_is_refused(numbers):
    """bias_attention_varlen checks that too, but a direct call of the operator does not go through it."""
    query, key, table = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 8, 8), torch.randn(2, 20)
    seqlens = torch.tensor([[0, 4, 0, 8, 4], [*numbers, 4]], dtype=torch.int32)
    options = seqlens, None, 4, 8, 0, False, None, None, 0.3, 0.0, 0.0
    with pytest.raises(RuntimeError, match="sequence 1 has no room in 4 queries and 8 keys"):
        dispatch.OPERATORS["attention_forward"](query, key, key, table, None, *options)
    state = torch.zeros(2, 1, 2, 4)
    with pytest.raises(RuntimeError, match="sequence 1 has no room in 4 queries and 8 keys"):
        dispatch.OPERATORS["attention_backward"](
            query, None, query, key, key, table, None, query, state, *options, False, True, True, True, False
        )


@pytest.mark.parametrize("case", [
    Case(batch=34, heads=1, i=9, j=20), Case(heads=34, i=9, j=20, dtype=torch.bfloat16),
    Case(heads=1, i=34, j=34, head_dim=9), Case(batch=34, heads=1, i=1, j=20), Case(heads=34, i=1, j=20),
    Case(heads=1, i=1, j=34, dtype=torch.bfloat16), Case(batch=2, heads=1, i=34, j=1100),
], ids=lambda case: f"{case.batch} {case.heads} {case.i} {case.j}")  # fmt: skip
def test_addresses_beyond_2_to_31(case, monkeypatch, taken):
    """Rows, heads or batch elements of every tensor, and of every result, lie 2^26 elements apart."""
    tensors = case.draw()
    near = attention_oracle.run(attend, *tensors)
    dim = [case.batch, case.heads, max(case.i, 34)].index(34)
    like = torch_path.like

    def apart(tensor):
        return far_apart(tensor, dim) if tensor.shape[dim] == 34 else tensor

    monkeypatch.setattr(torch_path, "like", lambda *arguments: apart(like(*arguments)))
    query, key, value, table, dout, dlse = tensors
    query, key, value, dout = map(apart, (query, key, value, dout))
    far = attention_oracle.run(attend, query, key, value, table, dout, dlse)
    assert taken == []
    for name, expected in near.items():
        assert torch.equal(far[name], expected), name


TRAINING = """
import sys, torch
from dpb_triton import bias_attention

def resident(name):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(name)).split()[1]) / 1024

def step(n):
    tensors = [torch.randn(1, 8, n, 64, requires_grad=True) for _ in range(3)]
    table = torch.randn(8, n, requires_grad=True)
    out = bias_attention(*tensors, table, is_causal=True, backend="cpp")
    out.backward(torch.ones(()).expand(out.shape))

torch.set_num_threads(2)
step(64)
before = resident("VmRSS")
step(4096)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_takes_no_memory_of_the_size_of_the_scores():
    """Query, key, value, out and their gradients take 8 MiB each. The scores of one head would take 64 MiB."""
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 130  # 82 on two threads


@pytest.mark.parametrize("change", [
    {"key": torch.zeros(1, 2, 8, 4)}, {"value": torch.zeros(1, 2, 7, 8)}, {"value": torch.zeros(2, 2, 8, 8)},
    {"key": torch.zeros(1, 2, 8, 8).bfloat16()}, {"value": torch.zeros(1, 2, 8, 8).bfloat16()},
    {"key": torch.zeros(1, 1, 8, 8)}, {"value": torch.zeros(1, 1, 8, 8)},
    {"table": torch.zeros(3, 20)}, {"table": torch.zeros(2, 20).double()},
    {"table": torch.zeros(2, 7)}, {"key_bias": torch.zeros(1, 7)}, {"key_bias": torch.zeros(1, 8).double()},
    {"offset": 40}, {"query": torch.zeros(1, 3, 4, 8), "table": torch.zeros(3, 20)},
], ids=lambda change: ", ".join(f"{name} {getattr(x, 'shape', x)}" for name, x in change.items()))  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(change):
    """As above: only a direct call of the operator gets as far."""
    arguments = {
        "query": torch.zeros(1, 2, 4, 8), "key": torch.zeros(1, 2, 8, 8), "value": torch.zeros(1, 2, 8, 8),
        "table": torch.zeros(2, 20), "key_bias": None, "offset": 0,
    } | change  # fmt: skip
    offset = arguments.pop("offset")
    options = None, None, 4, 8, offset, False, None, None, 0.3, 0.0, 0.0
    with pytest.raises((ValueError, RuntimeError), match="do not fit|the table holds"):
        dispatch.OPERATORS["attention_forward"](*arguments.values(), *options)


@pytest.mark.parametrize("place", range(4), ids=("query", "key", "value", "table"))
def test_a_freed_storage_is_refused(place):
    """FSDP frees storages but keeps the tensors."""
    tensors = [tensor.clone() for tensor in Case().draw()[:4]]
    tensors[place].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no storage: has it been freed"):
        attend(*tensors)


@pytest.mark.parametrize(("name", "count"), [("attention_forward", 46), ("attention_backward", 65)])
def test_another_number_of_arguments_is_refused(name, count):
    """The kernels read as many as they need, so one less would be read from memory that is no argument."""
    for other in (0, count - 1, count + 1):
        with pytest.raises(TypeError, match=f"expected {count} arguments, got {other}"):
            getattr(cpp_path._C, name)(*range(other))


def test_a_key_bias_of_any_strides():
    """A direct call may have a view as its key bias; the public functions make a tensor of their own."""
    query, key, value, table, *_ = Case(batch=2, heads=2, kv_heads=2, i=9, j=40).draw()
    options = None, None, 9, 40, 31, False, None, None, 0.3, 0.0, 0.0
    wide = torch.randn(2, 80)
    for key_bias in (wide[:, ::2], wide[:, :1].expand(2, 40), wide[:1, :40].expand(2, 40)):
        call = dispatch.OPERATORS["attention_forward"]
        results = [call(query, key, value, table, bias, *options) for bias in (key_bias, key_bias.contiguous())]
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_a_state_and_a_gradient_of_lse_of_any_strides():
    """Backward reads both as contiguous numbers. autograd makes a gradient of lse with strides of 0."""
    query, key, value, table, dout, dlse = Case(heads=2, i=4, j=8, options={"offset": 4}).draw()
    options = None, None, 4, 8, 4, False, None, None, 0.3, 0.0, 0.0
    out, _, state = dispatch.OPERATORS["attention_forward"](query, key, value, table, None, *options)
    strided = state.mT.contiguous().mT
    for given in (dlse.mT.contiguous().mT, dlse[..., :1].expand(dlse.shape)):
        results = [
            dispatch.OPERATORS["attention_backward"](
                dout, x, query, key, value, table, None, out, z, *options, False, True, True, True, False
            )
            for x, z in ((given, strided), (given.contiguous(), state))
        ]
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_a_bound_far_below_zero_hides_all_keys():
    """As above: the public functions refuse a negative one."""
    query, key, value, table, *_ = Case(heads=2, i=4, j=8).draw()
    for bounds in ((-(2**63), None), (None, -(2**63))):
        options = None, None, 4, 8, 4, False, *bounds, 0.3, 0.0, 0.0
        out, lse, _ = dispatch.OPERATORS["attention_forward"](query, key, value, table, None, *options)
        assert (out == 0).all() and lse.isneginf().all()


def test_the_kernels_may_use_torchs_threads(monkeypatch):
    calls, forward = [], cpp_path._C.attention_forward
    monkeypatch.setattr(torch, "get_num_threads", lambda: 61)
    monkeypatch.setattr(
        cpp_path, "_C", SimpleNamespace(attention_forward=lambda *numbers: calls.append(numbers) or forward(*numbers))
    )
    attend(*Case().draw()[:4])
    assert calls[0].count(61) == 1


@pytest.mark.parametrize("change", [
    {"dout": torch.zeros(1, 2, 3, 8)}, {"dout": torch.zeros(1, 2, 4, 8).bfloat16()}, {"out": torch.zeros(1, 2, 4, 7)},
    {"state": torch.zeros(2, 1, 2, 3)}, {"state": torch.zeros(2, 1, 2, 4).double()}, {"dlse": torch.zeros(1, 2, 3)},
    {"dlse": torch.zeros(1, 2, 4).double()},
], ids=lambda change: ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in change.items()))  # fmt: skip
def test_gradients_that_do_not_fit_are_refused(change):
    query, key, table = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 8, 8), torch.zeros(2, 20)
    given = {"dout": query, "dlse": None, "out": query, "state": torch.zeros(2, 1, 2, 4)} | change
    options = None, None, 4, 8, 0, False, None, None, 0.3, 0.0, 0.0, False, True, True, True, False
    with pytest.raises(ValueError, match="do not fit a result"):
        dispatch.OPERATORS["attention_backward"](
            given["dout"], given["dlse"], query, key, key, table, None, given["out"], given["state"], *options
        )
