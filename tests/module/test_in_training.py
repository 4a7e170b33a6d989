# SPDX-License-Identifier: MIT
"""Common uses of a model that has the bias: mixed precision, compilers, exporters, checkpointing, copies."""

import copy
import pickle

import pytest
import torch
from quick import slow
from torch import nn

from bench.train.language_model import Config, LanguageModel, loss_of
from dpb_triton import DynamicPositionBias, MultiheadAttention

SMALL = {"dim": 32, "layers": 2, "heads": 4}


def model_of(position="fused", device="cpu", **options):
    torch.manual_seed(0)
    return LanguageModel(Config(position=position, **SMALL | options)).to(device)


def batch_of(n, device="cpu", batch=2):
    tokens = torch.randint(256, (batch, n + 1), generator=torch.Generator().manual_seed(n)).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def gradients_of(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def assert_same(ours, theirs, tolerance):
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def train(model, steps, device="cpu", forward=loss_of, step=None):
    """The losses of a few steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    step = optimizer.step if step is None else step(optimizer)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = forward(model, *batch_of(24, device))
        loss.backward()
        step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_fused_is_eager(device):
    """The two models of `bench train` have the same weights, losses and gradients."""
    fused, eager = model_of("fused", device), model_of("eager", device)
    assert fused.state_dict().keys() == eager.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), eager.parameters(), strict=True))
    losses = [loss_of(model, *batch_of(37, device)) for model in (fused, eager)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert_same(gradients_of(fused, losses[0]), gradients_of(eager, losses[1]), 2e-5)


class TestMixedPrecision:
    def test_autocast(self, device):
        model = model_of(device=device)
        exact = loss_of(model, *batch_of(24, device))
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(model, *batch_of(24, device))
        torch.testing.assert_close(loss, exact, atol=0.02, rtol=0.02)
        ours, theirs = gradients_of(model, loss), gradients_of(model, exact)
        for name, gradient in theirs.items():
            assert ours[name].dtype == torch.float32
            # biases before a softmax have a gradient of 0, so only rounding errors are left
            if gradient.norm() > 1e-4:
                assert (ours[name] - gradient).norm() < 0.05 * gradient.norm(), name

    def test_gradscaler(self, device):
        """float16 with a scale that overflows at first: the scaler backs off, and training goes on."""
        model = model_of(device=device)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=1000)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16):
                loss = loss_of(model, *batch_of(24, device))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert 1.0 < scaler.get_scale() < 2.0**40
        assert losses[0] == losses[1] and losses[-1] < losses[0] - 0.05
        assert all(parameter.isfinite().all() for parameter in model.parameters())


class TestCompilers:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_the_whole_step(self, device):
        """Forward, backward and optimizer compiled by inductor give the same losses."""
        expected = train(model_of(device=device, layers=1), 4, device)
        losses = train(
            model_of(device=device, layers=1), 4, device,
            forward=torch.compile(loss_of, fullgraph=True),
            step=lambda optimizer: torch.compile(optimizer.step),
        )  # fmt: skip
        torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
        assert expected[-1] < expected[0]

    def test_autocast_inside(self, device):
        def loss(model, *batch):
            with torch.autocast(device, torch.bfloat16):
                return loss_of(model, *batch)

        expected = train(model_of(device=device), 3, device, forward=loss)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            train(model_of(device=device), 3, device, forward=compiled), expected, atol=1e-3, rtol=1e-3
        )

    @pytest.mark.slow
    def test_aot_inductor(self, device, tmp_path):
        """torch.export with free batch and length makes a package of compiled code, which then runs other lengths."""
        model = model_of(device=device).eval()
        dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("n", min=2, max=4096)}
        with torch.no_grad():
            program = torch.export.export(model, (batch_of(24, device)[0],), dynamic_shapes={"tokens": dims})
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
            package = torch._inductor.aoti_load_package(path)
            for n in (24, 7, 131):
                tokens = batch_of(n, device, batch=3)[0]
                torch.testing.assert_close(package(tokens), model(tokens), atol=1e-5, rtol=1e-5)

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
    @pytest.mark.parametrize("name", ["module", slow("signed"), slow("attention"), slow("model")])
    def test_onnx(self, name, tmp_path):
        pytest.importorskip("onnxscript", reason="the ONNX exporter needs it (extra: test)")
        runtime = pytest.importorskip("onnxruntime", reason="(extra: test)")

        class Bias(nn.Module):
            """The bias for the lengths of two tensors, queries and keys."""

            def __init__(self, **options):
                super().__init__()
                self.bias = DynamicPositionBias(16, 4, **options)

            def forward(self, query, key):
                return self.bias(query.shape[1], key.shape[1])

        class Attention(nn.Module):
            """Self-attention with padding."""

            def __init__(self):
                super().__init__()
                self.attention = MultiheadAttention(16, 4, batch_first=True)

            def forward(self, x, padding):
                return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]

        def padding(batch, n):
            return torch.arange(n) >= torch.tensor([n, max(1, n // 2), n])[:batch, None]

        length, keys = (torch.export.Dim(name, min=2, max=4096) for name in ("n", "j"))
        rows = torch.export.Dim("batch", min=1, max=64)
        cases = {
            "module": (Bias(), lambda n: (torch.randn(1, n, 1), torch.randn(1, n + 5, 1)), ({1: length}, {1: keys})),
            "signed": (Bias(signed=True, norm=True, log_distance=True),
                       lambda n: (torch.randn(1, n, 1), torch.randn(1, n + 5, 1)), ({1: length}, {1: keys})),
            "attention": (Attention(), lambda n: (torch.randn(3, n, 16), padding(3, n)), ({1: length}, {1: length})),
            "model": (model_of(), lambda n: (batch_of(n)[0],), ({0: rows, 1: length},)),
        }  # fmt: skip
        module, inputs, shapes = cases[name]
        module.eval()
        program = torch.onnx.export(module, inputs(9), dynamo=True, dynamic_shapes=shapes, verbose=False)
        path = tmp_path / f"{name}.onnx"
        program.save(path)
        session = runtime.InferenceSession(path)
        for n in (9, 2, 40):
            tensors = inputs(n)
            names = [node.name for node in session.get_inputs()]
            (out,) = session.run(None, {k: x.numpy() for k, x in zip(names, tensors, strict=True)})
            torch.testing.assert_close(torch.from_numpy(out), module(*tensors), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant, device):
    model = model_of(device=device)
    inputs, targets = batch_of(24, device)

    def checkpointed(inputs):
        x, bias = model.embedding(inputs), model._bias(inputs.shape[1])
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, bias, use_reentrant=use_reentrant)
        return model.head(model.norm(x))

    plain = loss_of(model, inputs, targets)
    loss = nn.functional.cross_entropy(checkpointed(inputs).flatten(0, 1), targets.flatten())
    assert torch.equal(loss, plain)
    for parameter in model.parameters():
        parameter.grad = None
    plain.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss.backward()
    assert_same({name: parameter.grad for name, parameter in model.named_parameters()}, expected, 1e-6)


class TestCopies:
    @pytest.mark.parametrize("kind", ["deepcopy", "pickle", "state_dict", "file", "assign", "to_empty"])
    def test_the_copy_is_the_same_and_its_own(self, kind, tmp_path, device):
        model = model_of(device=device)
        loss_of(model, *batch_of(9, device))
        if kind == "deepcopy":
            again = copy.deepcopy(model)
        elif kind == "pickle":
            again = pickle.loads(pickle.dumps(model))
        else:
            state = model.state_dict()
            if kind == "file":
                torch.save(state, tmp_path / "state.pt")
                state = torch.load(tmp_path / "state.pt", weights_only=True)
            if kind in ("assign", "to_empty"):
                with torch.device("meta"):
                    again = LanguageModel(model.config)
                if kind == "to_empty":
                    again.to_empty(device=device)
                    again.head.weight = again.embedding.weight
                again.load_state_dict({k: v.clone() for k, v in state.items()}, assign=kind == "assign")
            else:
                again = LanguageModel(model.config).to(device)
                again.load_state_dict(state)
        batch = batch_of(33, device)
        assert torch.equal(loss_of(again, *batch), loss_of(model, *batch))
        with torch.no_grad():
            again.pos_bias.mlp[0].weight.add_(1)
        assert not torch.equal(loss_of(again, *batch), loss_of(model, *batch))


class Adapted(nn.Module):
    """A frozen Linear with a low-rank update, as in LoRA."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, device=base.weight.device, dtype=base.weight.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class TestForeignLayers:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lora(self, dtype, device):
        module = DynamicPositionBias(16, 4, device=device, dtype=dtype)
        before = module.table(50).detach()
        for place in (2, 4):
            module.mlp[place] = Adapted(module.mlp[place])
        torch.testing.assert_close(module.table(50), before)
        query = torch.randn(1, 4, 20, 8, device=device)
        module.attention(query, query, query).square().sum().backward()
        trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
        assert {name for name in trained if "mlp.2." in name or "mlp.4." in name} == {
            f"mlp.{place}.{part}.weight" for place in (2, 4) for part in ("down", "up")
        }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_parametrizations(self, dtype, device):
        module = DynamicPositionBias(16, 4, device=device, dtype=dtype)
        before = module.table(50).detach()
        for place in (0, 2, 4):
            nn.utils.parametrizations.weight_norm(module.mlp[place])
        tolerance = 1e-4 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(module.table(50), before, atol=tolerance, rtol=tolerance)
        module(9, 9).square().mean().backward()
        assert module.mlp[2].parametrizations.weight.original0.grad.abs().sum() > 0
        nn.utils.parametrize.remove_parametrizations(module.mlp[2], "weight")
        torch.testing.assert_close(module.table(50), before, atol=tolerance, rtol=tolerance)

    def test_quantised_layers(self):
        module = DynamicPositionBias(16, 4).eval()
        exact = module.table(50)
        module.mlp[2] = nn.Sequential(module.mlp[2].bfloat16(), nn.Identity())  # a layer with its own dtype
        torch.testing.assert_close(module.table(50), exact, atol=0.5, rtol=0.1)
