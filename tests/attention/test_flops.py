# SPDX-License-Identifier: MIT
"""torch's FlopCounterMode counts the attention operators as it counts torch's own flash attention."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quick import slow_but
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dpb_triton import DynamicPositionBias, MultiheadAttention, bias_attention, bias_attention_varlen, expand_bias


def counted(function):
    """{operator: FLOPs} of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    counts = counter.get_flop_counts().get("Global", {})
    names = {operator: str(operator).split(".")[-1] for operator in counts}
    return {names[operator].removesuffix("_triton").removesuffix("_torch"): n for operator, n in counts.items()}


def torchs(batch, heads, i, j, head_dim, value_dim):
    """torch's counts for flash attention of these sizes, (forward, backward)."""
    query, key, value = (batch, heads, i, head_dim), (batch, heads, j, head_dim), (batch, heads, j, value_dim)
    return sdpa_flop_count(query, key, value), sdpa_backward_flop_count((*query[:3], value_dim), query, key, value)


def draw(batch=2, heads=4, kv_heads=4, i=5, j=9, head_dim=8, value_dim=6):
    shapes = (batch, heads, i, head_dim), (batch, kv_heads, j, head_dim), (batch, kv_heads, j, value_dim), (heads, j)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


OPTIONS = [{}, {"is_causal": True}, {"window": (2, 1)}, {"softcap": 3.0, "dropout_p": 0.2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_backward(options, attention_backend):
    """Masked pairs count too, as in torch, which says "we aren't accounting for causal attention here"."""
    forward, backward = torchs(2, 4, 5, 9, 8, 6)
    assert (forward, backward) == (2 * 2 * 4 * 45 * 14, 2 * 2 * 4 * 45 * 36)
    tensors = draw()
    out = []

    def call():
        out.append(bias_attention(*tensors, backend=attention_backend, **options))

    assert counted(call) == {"attention_forward": forward}
    assert counted(lambda: out[0].sum().backward()) == {"attention_backward": backward}
    with torch.no_grad():
        assert counted(call) == {"attention_forward": forward}


def test_grouped_heads_count_as_query_heads():
    tensors = draw(kv_heads=2)
    counts = counted(lambda: bias_attention(*tensors, enable_gqa=True).sum().backward())
    assert tuple(counts.values()) == torchs(2, 4, 5, 9, 8, 6)


def test_as_torchs_flash_attention():
    query, key, value, table = (x.detach().to("meta", torch.bfloat16) for x in draw(value_dim=8))
    theirs = counted(lambda: torch.ops.aten._scaled_dot_product_flash_attention(query, key, value))
    assert list(counted(lambda: bias_attention(query, key, value, table)).values()) == list(theirs.values()) != []


def packed(device="cpu"):
    query, key, value = (torch.randn(n, 4, d, device=device, requires_grad=True) for n, d in ((7, 8), (12, 8), (12, 6)))
    table = torch.randn(4, 7, device=device, requires_grad=True)
    cu = [torch.tensor(cu, dtype=torch.int32, device=device) for cu in ((0, 3, 3, 7), (0, 4, 5, 12))]
    return query, key, value, table, *cu


def test_packed_sequences_count_their_own_pairs(attention_backend):
    inputs = packed()
    counts = counted(lambda: bias_attention_varlen(*inputs, backend=attention_backend).sum().backward())
    sizes = [(3, 4), (0, 1), (4, 7)]
    assert tuple(counts.values()) == tuple(map(sum, zip(*(torchs(1, 4, *size, 8, 6) for size in sizes), strict=True)))


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_packed_sequences_without_numbers_count_as_the_longest(kind):
    operator, (query, key, value, table, *_) = torch.ops.dpb_triton.attention_forward, packed()
    inputs = [*(x.detach().transpose(0, 1)[None] for x in (query, key, value)), table.detach()]
    inputs.append(torch.zeros(3, 5, dtype=torch.int32))
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext() as mode:
        tensors = [x.to("meta") if mode is None else mode.from_tensor(x) for x in inputs]
        names = [argument.name for argument in operator.default._schema.arguments]
        numbers = {"longest_query": 4, "longest_key": 7, "offset": 0, "signed": False, "scale": 1.0}
        numbers |= {"softcap": 0.0, "dropout_p": 0.0}
        given = dict(zip(("query", "key", "value", "table", "seqlens"), tensors, strict=True)) | numbers
        counts = counted(lambda: operator(*(given.get(name) for name in names)))
    assert list(counts.values()) == [3 * torchs(1, 4, 4, 7, 8, 6)[0]]


def test_meta_tensors():
    tensors = [x.detach().to("meta").requires_grad_() for x in draw()]
    counts = counted(lambda: bias_attention(*tensors).sum().backward())
    assert tuple(counts.values()) == torchs(2, 4, 5, 9, 8, 6)


def test_expanding_multiplies_nothing(backend):
    table = torch.randn(2, 9, requires_grad=True)
    assert counted(lambda: expand_bias(table, 5, 9, backend=backend).sum().backward()) == {}


def test_the_modules():
    """The counter counts the modules' MLP and attention, and lists MultiheadAttention's under its name."""
    module = DynamicPositionBias(8, 4)
    query, key, value, _ = draw(value_dim=8)
    attention = torchs(2, 4, 5, 9, 8, 8)
    counts = counted(lambda: module.attention(query, key, value).sum().backward())
    assert (counts["attention_forward"], counts["attention_backward"]) == attention
    assert counts["addmm"] == 2 * 9 * (8 + 64 + 32)  # forward; 9 distances

    layer = MultiheadAttention(32, 4, pos_bias=module, batch_first=True)
    x = torch.randn(2, 9, 32)
    with FlopCounterMode(display=False) as counter:
        layer(x, x, x, need_weights=False)[0].sum().backward()
    counts = {str(name): n for name, n in counter.get_flop_counts()["MultiheadAttention"].items()}
    forward, backward = torchs(2, 4, 9, 9, 8, 8)
    assert counts["dpb_triton.attention_forward"] == forward
    assert counts["dpb_triton.attention_backward"] == backward


def test_around_a_compiled_function():
    tensors = draw()
    function = torch.compile(lambda *inputs: bias_attention(*inputs).sum(), backend="aot_eager")
    function(*tensors).backward()
    assert tuple(counted(lambda: function(*tensors).backward()).values()) == torchs(2, 4, 5, 9, 8, 6)


USE = """
import sys, torch
{first}
with FlopCounterMode(display=False) as counter:
    dpb_triton.bias_attention(*[torch.ones(1, 1, 2, 4)] * 3, torch.ones(1, 2))
assert counter.get_total_flops() == 2 * 4 * 8, counter.get_total_flops()
assert not any(type(finder).__module__.startswith('dpb_triton') for finder in sys.meta_path)
"""
COUNTER = "from torch.utils.flop_counter import FlopCounterMode"
ORDERS = {
    "the counter first": f"{COUNTER}\nimport dpb_triton",
    "the counter last": f"import dpb_triton\nassert 'torch.utils.flop_counter' not in sys.modules\n{COUNTER}",
    "asked for before": (
        "import dpb_triton, importlib.util\nassert importlib.util.find_spec('torch.utils.flop_counter')\n" + COUNTER
    ),
}


@pytest.mark.parametrize("first", slow_but(["the counter last"], ORDERS))
def test_any_order_of_imports(first):
    command = [sys.executable, "-c", USE.format(first=first)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
