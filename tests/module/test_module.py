# SPDX-License-Identifier: MIT
"""DynamicPositionBias against recorded results of the originals, in every dtype, and in the usage in zeta's docs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpb_triton import DynamicPositionBias, reference

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


def load(path, device):
    record = np.load(path)
    arrays = {key: torch.from_numpy(record[key]).to(device) for key in record.files if key != "meta"}
    state = {key.removeprefix("param:"): value for key, value in arrays.items() if key.startswith("param:")}
    return arrays, state, json.loads(str(record["meta"]))


def module_of(state, meta, device):
    if meta["source"] == "zeta":
        module = DynamicPositionBias(meta["dim"], meta["heads"]).to(device)
        module.load_state_dict(state)
        return module
    options = {key: meta[key] for key in ("heads", "dim", "depth", "log_distance", "norm")}
    return DynamicPositionBias.from_x_transformers(state, **options)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path, backend, device):
    arrays, state, meta = load(path, device)
    module = module_of(state, meta, device)
    bias = module(meta["i"], meta["j"], backend=backend)
    torch.testing.assert_close(bias, arrays["out"], atol=2e-6, rtol=1e-5)
    bias.backward(arrays["grad_out"])
    gradients = [value for key, value in arrays.items() if key.startswith("grad:")]
    parameters = list(module.parameters())
    assert len(parameters) == len(gradients)
    for parameter, expected in zip(parameters, gradients, strict=True):
        scale = expected.abs().max().item() + 1e-6
        torch.testing.assert_close(parameter.grad, expected.view_as(parameter), atol=1e-5 * scale, rtol=1e-4)


def test_state_dict_has_zetas_keys():
    keys = ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias"]
    assert list(DynamicPositionBias(16, 4).state_dict()) == keys
    torch.manual_seed(3)
    ours = DynamicPositionBias(16, 4)
    torch.manual_seed(3)
    eager = reference.EagerDynamicPositionBias(16, 4)
    for key, value in eager.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), "a seed must give zeta's initial weights"


def test_documented_usage(device):
    module = DynamicPositionBias(dim=64, heads=8).to(device)
    assert module.device.type == device
    empty = module(0, 5)
    assert empty.shape == (8, 0, 5)
    empty.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())
    assert module(5, 5).shape == (8, 5, 5)
    assert module(0, 0).shape == (8, 0, 0)

    query, key, value = torch.randn(3, 2, 8, 5, 16, device=device)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=module(5, 5))
    scores = query @ key.mT / 4 + module(5, 5)
    torch.testing.assert_close(out, scores.softmax(-1) @ value)


@pytest.mark.parametrize(
    "options", [{}, {"depth": 1, "norm": True}, {"depth": 3, "signed": True, "log_distance": True}]
)
def test_table_and_options(options, device):
    module = DynamicPositionBias(12, 3, **options).to(device)
    table = module.table(9)
    assert table.shape == ((3, 17) if module.signed else (3, 9))
    assert table.is_contiguous()
    assert module.table(0).shape == (3, 0)
    for distance in range(-8 if module.signed else 0, 9):
        x = torch.tensor([float(distance)], device=device)
        if module.log_distance:
            x = x.sign() * (x.abs() + 1).log()
        torch.testing.assert_close(table[:, distance + 8 if module.signed else distance], module.mlp(x))
    torch.testing.assert_close(module(4, 9), reference.expand(table, 4, 9, signed=module.signed))


def test_offsets_are_slices_of_the_whole(device):
    module = DynamicPositionBias(8, 2, signed=True).to(device)
    whole = module(12, 12)
    torch.testing.assert_close(module(3, 12, offset=4), whole[:, 4:7])
    torch.testing.assert_close(module(4, 5, offset=-2), module(12, 12)[:, 4:8, 6:11])
    assert module(0, 7, offset=3).shape == (2, 0, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_low_and_high_precision_modules(dtype, backend, device):
    """Apart from its rounded parameters, a low-precision module equals the float32 one rounded once."""
    module = DynamicPositionBias(32, 4).to(device, dtype)
    bias = module(40, 60, backend=backend)
    assert bias.dtype == dtype
    wide = copy.deepcopy(module).to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(bias, wide(40, 60, backend=backend).to(dtype))
    bias.float().mean().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, device):
    module = DynamicPositionBias(32, 4).to(device)
    expected = module(30, 50).to(dtype)
    with torch.autocast(device, dtype):
        bias = module(30, 50)
        table = module.table(50)
        kept = module(30, 50, dtype=torch.float32)
    assert bias.dtype == dtype and torch.equal(bias, expected)
    assert table.dtype == torch.float32
    assert kept.dtype == torch.float32
    with torch.autocast(device, dtype, enabled=False):
        assert module(3, 3).dtype == torch.float32


def test_autocast_leaves_float64_alone(device):
    module = DynamicPositionBias(16, 2, dtype=torch.float64, device=device)
    query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64, device=device).unbind()
    expected = module(5, 9), module.table(9), module.attention(query, key, value, is_causal=True)
    with torch.autocast(device, torch.bfloat16):
        found = module(5, 9), module.table(9), module.attention(query, key, value, is_causal=True)
        assert module(5, 9, dtype=torch.float32).dtype == torch.float32
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64 and torch.equal(ours, exact)


def test_autocast_keeps_8192_positions_apart(device):
    """Under bf16 autocast, eager rounds the distances to bf16 first, so most positions share their bias with others."""
    torch.manual_seed(0)
    eager = reference.EagerDynamicPositionBias(64, 8).to(device)
    ours = DynamicPositionBias(64, 8).to(device)
    ours.load_state_dict(eager.state_dict())
    with torch.autocast(device, torch.bfloat16):
        eager_table = eager.table(8192)
        our_table = ours.table(8192)
        row = ours(1, 8192, dtype=torch.float32)[:, 0].mT
    assert len(our_table.mT.unique(dim=0)) == 8192
    assert len(row.unique(dim=0)) == 8192
    assert len(eager_table.unique(dim=0)) < 1000

    exact = copy.deepcopy(ours).double().table(8192)
    error = (our_table.bfloat16() - exact).abs().max() / exact.abs().max()
    assert error < 2**-8, "more than one rounding to bf16"


def test_tf32_does_not_reach_the_table(monkeypatch):
    """If TF32 is allowed, the MLP runs in float64: the table is the exact one, rounded once."""
    from dpb_triton import module as module_file

    module = DynamicPositionBias(32, 4)
    exact = copy.deepcopy(module).double().table(5000)
    monkeypatch.setattr(module_file, "_is_rounding", lambda device_type: True)
    assert torch.equal(module.table(5000), exact.float())
    compiled = torch.compile(module, fullgraph=True)
    assert torch.equal(compiled(3, 7), module(3, 7))


def test_x_transformers_checkpoints_inside_a_model(device):
    _, state, _ = load(next(path for path in GOLDEN if path.stem.startswith("xt_d16")), device)
    nested = {f"attn_layers.rel_pos.{key}": value for key, value in state.items()} | {"other.weight": torch.ones(1)}
    module = DynamicPositionBias.from_x_transformers(nested, prefix="attn_layers.rel_pos.")
    assert (module.heads, module.dim, module.depth, module.norm, module.signed) == (4, 16, 2, False, True)
    with pytest.raises(ValueError, match="attn_layers.rel_pos.mlp.0.0.weight"):
        DynamicPositionBias.from_x_transformers({"other.weight": torch.ones(1)}, prefix="attn_layers.rel_pos.")
    with pytest.raises(ValueError, match="heads must be 4"):
        DynamicPositionBias.from_x_transformers(state, heads=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_checkpoint_keeps_its_dtype(dtype):
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in (
        ("mlp.0.0.weight", (6, 1)), ("mlp.0.0.bias", (6,)), ("mlp.1.weight", (2, 6)), ("mlp.1.bias", (2,)),
    )}  # fmt: skip
    module = DynamicPositionBias.from_x_transformers(weights, depth=1, heads=2, dim=6, norm=False, log_distance=True)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype} and module.log_distance
    for ours, theirs in zip(module.parameters(), weights.values(), strict=True):
        assert torch.equal(ours, theirs)


def test_older_x_transformers_have_a_bias_in_the_first_norm():
    old = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(1, 6), torch.nn.LayerNorm(6), torch.nn.SiLU()), torch.nn.Linear(6, 2)
    ).double()
    torch.nn.init.normal_(old[0][1].bias)
    state = {f"mlp.{key}": value for key, value in old.state_dict().items()}
    module = DynamicPositionBias.from_x_transformers(state)
    torch.testing.assert_close(module.table(4).mT, old(torch.arange(-3.0, 4.0)[:, None].double()))
    assert module.mlp[1].bias.dtype == torch.float64
    with torch.device("meta"):  # the weights' device counts
        module = DynamicPositionBias.from_x_transformers(state)
    torch.testing.assert_close(module.table(4).mT, old(torch.arange(-3.0, 4.0)[:, None].double()))


def test_a_prefix_is_that_of_one_module_among_others():
    """Of ten layers: their number has a 0 too."""

    class Ours(DynamicPositionBias):
        pass

    layers = [torch.nn.Sequential(torch.nn.Linear(6 if k else 1, 6), torch.nn.SiLU()) for k in range(10)]
    theirs = [torch.nn.Sequential(*copy.deepcopy(layers), torch.nn.Linear(6, heads)) for heads in (2, 3)]
    state = {f"{n}.mlp.{key}": x for n, mlp in enumerate(theirs) for key, x in mlp.state_dict().items()}
    for n, mlp in enumerate(theirs):
        ours = Ours.from_x_transformers(state, prefix=f"{n}.")
        assert type(ours) is Ours and ours.depth == 10
        torch.testing.assert_close(ours.table(4).mT, mlp(torch.arange(-3.0, 4.0)[:, None]))


def test_all_norms_but_the_first_have_a_bias():
    """As in x-transformers."""
    norms = [
        layer for layer in DynamicPositionBias(8, 2, depth=4, norm=True).mlp if isinstance(layer, torch.nn.LayerNorm)
    ]
    assert [norm.bias is not None for norm in norms] == [False, True, True, True]


def test_copies_pickles_and_meta(tmp_path):
    module = DynamicPositionBias(8, 2, norm=True, signed=True)
    again = copy.deepcopy(module)
    assert torch.equal(again(4, 6), module(4, 6))
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(4, 6), module(4, 6))
    meta = DynamicPositionBias(8, 2, device="meta")
    assert meta(4, 6).device.type == "meta" and meta(4, 6).shape == (2, 4, 6)
    for shown, options in (
        ("norm=True, log_distance=False, signed=False", {"norm": True}),
        ("norm=False, log_distance=True, signed=False", {"log_distance": True}),
        ("norm=False, log_distance=False, signed=True", {"signed": True}),
    ):
        module = DynamicPositionBias(8, 2, depth=3, **options)
        assert module.extra_repr() == f"dim=8, heads=2, depth=3, {shown}"
        assert repr(module).splitlines()[1].strip() == module.extra_repr()


def test_layers_may_be_replaced(device):
    """LoRA and similar methods put other modules into `mlp`."""

    class Adapted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, torch.nn.Linear(base.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    module = DynamicPositionBias(8, 2).to(torch.bfloat16)
    module.mlp[2] = Adapted(module.mlp[2]).to(torch.bfloat16)
    module = module.to(device)
    module(3, 4).sum().backward()
    assert module.mlp[2].up.weight.grad is not None and module(3, 4).dtype == torch.bfloat16
