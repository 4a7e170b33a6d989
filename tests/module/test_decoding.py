# SPDX-License-Identifier: MIT
"""Decoding: eval mode keeps the table and drops it in time; decoding by tokens and by chunks equals one whole call."""

import copy
import pickle

import pytest
import torch
from torch import nn

from dpb_triton import DynamicPositionBias, expand_bias, table_cache
from dpb_triton import module as module_file


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    """The number of distances of each run of an MLP."""
    lengths, run = [], module_file.run
    monkeypatch.setattr(module_file, "run", lambda mlp, x: lengths.append(len(x)) or run(mlp, x))
    return lengths


def make(device="cpu", **options):
    torch.manual_seed(0)
    return DynamicPositionBias(16, 4, device=device, **options).eval()


OPTIONS = ({}, {"signed": True}, {"log_distance": True, "norm": True, "depth": 3}, {"dtype": torch.float64})


class TestWhatIsKept:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_equal_to_the_computed_one(self, options, device):
        module = make(device, **options)
        with torch.no_grad():
            for n in (1, 7, 300, 0, 256, 700, 5):
                torch.testing.assert_close(module.table(n), module._compute(n))
                assert module.table(n).is_contiguous()
                if n:
                    i = min(n, 9)
                    bias = expand_bias(module._compute(n), i, n, signed=module.signed)
                    torch.testing.assert_close(module(i, n), bias)

    def test_one_run_for_256_steps(self, device, runs):
        module = make(device)
        with torch.no_grad():
            for j in range(1, 257):
                module(1, j)
            assert runs == [256]
            for j in range(257, 1025):
                module(1, j)
        assert runs == [256, 512, 1024]

    def test_a_long_first_call_computes_no_more_than_it_needs(self, device, runs):
        module = make(device)
        with torch.no_grad():
            module.table(5000), module.table(5001), module.table(9000)
        assert runs == [5000, 10000]

    def test_a_table_may_be_written_to(self, device):
        module = make(device)
        with torch.no_grad():
            before = module.table(9).clone()
            module.table(9).zero_()
            assert torch.equal(module.table(9), before)


def add_in_place(module):
    with torch.no_grad():
        module.mlp[2].bias.add_(1)


def add_in_inference_mode(module):
    with torch.inference_mode():
        module.mlp[2].bias.add_(1)


def replace_layer(module):
    module.mlp[2] = nn.Linear(16, 16, device=module.device)


def replace_parameter(module):
    module.mlp[2].bias = nn.Parameter(module.mlp[2].bias + 1)


def replace_data(module):
    module.mlp[2].bias.data = module.mlp[2].bias.data + 1


def write_through_data(module):
    module.mlp[2].bias.data.add_(1)
    module.eval()  # a GPU needs this to notice the write


def step(optimizer):
    def change(module):
        module(4, 5).sum().backward()
        optimizer(module.parameters()).step()

    return change


CHANGES = {
    "in place": add_in_place,
    "inference mode": add_in_inference_mode,
    "load_state_dict": lambda module: module.load_state_dict(DynamicPositionBias(16, 4).state_dict()),
    "assign": lambda module: module.load_state_dict(
        DynamicPositionBias(16, 4, device=module.device).state_dict(), assign=True
    ),
    "layer": replace_layer,
    "parameter": replace_parameter,
    "data": replace_data,
    "through data": write_through_data,
    "double": lambda module: module.double(),
    "bfloat16": lambda module: module.bfloat16(),
    "sgd": step(lambda parameters: torch.optim.SGD(parameters, 0.1)),
    "fused adamw": step(lambda parameters: torch.optim.AdamW(parameters, 0.1, fused=True)),
    "init": lambda module: nn.init.normal_(module.mlp[-1].weight),
    "log_distance": lambda module: setattr(module, "log_distance", True),
    "vector_to_parameters": lambda module: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in module.parameters()), device=module.device), module.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change, device):
    module = make(device)
    with torch.no_grad():
        before = module.table(40)
    change(module)
    with torch.no_grad():
        after = module.table(40)
    assert torch.equal(after, module._compute(256)[:, :40].to(after.dtype))
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_a_table_of_both_sides_is_another_one():
    module = make()
    with torch.no_grad():
        module.table(40)
        module.signed = True
        assert torch.equal(module.table(40), module._compute(256)[:, 216:295])


def test_a_write_through_data_is_seen_on_a_cpu():
    module = make()
    with torch.no_grad():
        before = module.table(40)
        module.mlp[2].bias.data.add_(1)
        assert not torch.equal(module.table(40), before)


def test_train_and_eval_drop_it():
    """A write through `.data` does not show on a GPU, so both make the next call compute."""
    module = make()
    for change in (module.eval, module.train, lambda: module.train(False)):
        module.eval()
        with torch.no_grad():
            module.table(5)
        assert module._cache._kept is not None
        change()
        assert module._cache._kept is None


def test_a_call_with_gradients_drops_it():
    module = make()
    with torch.no_grad():
        module.table(5)
    module.table(5)
    assert module._cache._kept is None


def test_no_more_distances_than_the_grid_has(runs):
    module = make().train()
    query = torch.randn(1, 4, 3, 8)
    module(3, 9), module(3, 9, offset=4), module(3, 9, offset=-2), module(3, 4, offset=20), module.table(5)
    module(0, 9, offset=10**12), module(3, 0, offset=-(10**12))  # no pair, and no distance
    module.attention(query, query, query), module.attention(query, query, query, offset=-4)
    assert runs == [9, 7, 11, 23, 5, 0, 0, 3, 7]


def is_computed_each_time(module, runs, context=torch.no_grad):
    before = len(runs)
    with context():
        module.table(5), module.table(5)
    return len(runs) == before + 2


class OnAGpu:
    """What `TableCache` asks a parameter on a GPU. Its numbers are never read."""

    device, requires_grad = torch.device("cuda", 0), False

    def __init__(self):
        self.address, self._version, self.shape, self.strides, self.dtype = 64, 0, (4, 2), (2, 1), torch.float32

    def data_ptr(self):
        return self.address

    def stride(self):
        return self.strides

    def is_inference(self):
        return False

    def detach(self):
        return self


GPU_CHANGES = {
    "address": 128, "_version": 1, "shape": (2, 4), "strides": (1, 4), "dtype": torch.bfloat16,
    "device": torch.device("cuda", 1), "is_inference": lambda: True,
}  # fmt: skip


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", [*GPU_CHANGES, "numbers", "options", "capture", None])
def test_a_change_is_seen_on_a_gpu(name, place, monkeypatch):
    """By the storage and the count of writes, on a recorder in place of a GPU. Nothing is kept in a capture."""
    parameters, numbers, options, lengths, is_capturing = [OnAGpu(), OnAGpu()], [1], [2], [], []
    monkeypatch.setattr(table_cache, "plain_parameters", lambda mlp: (parameters, numbers))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(is_capturing))
    cache, module = table_cache.TableCache(), make()
    with torch.no_grad():

        def get(n):
            return cache.get(module, n, lambda length: lengths.append(length) or len(lengths), options)

        assert [get(5), get(256), get(1)] == [1, 1, 1] and lengths == [256]
        assert cache._kept[1] == parameters  # alive, so that no other parameter gets an old address
        if name in GPU_CHANGES:
            setattr(parameters[place], name, GPU_CHANGES[name])
        elif name is not None:
            {"numbers": numbers, "options": options, "capture": is_capturing}[name].append(3)
        # the parameters of two devices, or of none
        expected = None if name in ("device", "is_inference", "capture") else 1 if name is None else 2
        assert get(5) == expected


def test_a_kept_table_serves_its_whole_length(runs):
    module = make()
    with torch.no_grad():
        module.table(256), module.table(256)
        assert runs == [256]
        module.table(300), module.table(512), module.table(513)
    assert runs == [256, 512, 1024]


class TestWhatIsNotKept:
    def test_training(self, device, runs):
        assert is_computed_each_time(make(device).train(), runs)

    def test_with_gradients(self, device, runs):
        module = make(device)
        assert is_computed_each_time(module, runs, torch.enable_grad)
        module(3, 4).sum().backward()
        assert module.mlp[0].weight.grad is not None
        assert not is_computed_each_time(make(device).requires_grad_(False), runs, torch.enable_grad)

    def test_frozen_in_inference_mode_then_with_gradients(self, device):
        module = make(device).requires_grad_(False)
        query, key, value = torch.randn(3, 1, 4, 6, 8, device=device).unbind()
        with torch.inference_mode():
            out = module.attention(query, key, value)
        query.requires_grad_()
        again = module.attention(query, key, value)
        torch.testing.assert_close(again, out)
        again.sum().backward()

    def test_functional_call_sees_its_parameters(self, device):
        module = make(device)
        with torch.no_grad():
            module.table(9)
            other = {name: parameter + 1 for name, parameter in module.named_parameters()}
            bias = torch.func.functional_call(module, other, (4, 9))
            again = copy.deepcopy(module)
            again.load_state_dict(other)
            torch.testing.assert_close(bias, again(4, 9))
            torch.testing.assert_close(module(4, 9), expand_bias(module._compute(9), 4, 9))

    def test_fake_and_compiled(self, device):
        module = make(device)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            module.table(9)
        with torch.no_grad():
            assert type(module.table(9)) is torch.Tensor
            torch._dynamo.reset()
            compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
            torch.testing.assert_close(compiled(1, 300), module(1, 300))
            add_in_place(module)
            torch.testing.assert_close(compiled(1, 300), module(1, 300))

    def test_copies_start_empty(self, device):
        module = make(device)
        with torch.no_grad():
            module.table(9)
            for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert again._cache is not module._cache and again._cache._kept is None
                torch.testing.assert_close(again.table(9), module.table(9))
        assert not any("cache" in key for key in module.state_dict())


class Layer(nn.Module):
    """Self-attention with a growing cache of keys and values."""

    def __init__(self, **options):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.pos_bias = DynamicPositionBias(16, 4, **options)

    def forward(self, x, past=None):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        out = self.pos_bias.attention(query, key, value, is_causal=True)
        return x + out.transpose(1, 2).flatten(2), (key, value)


class Model(nn.Module):
    """Two of these layers."""

    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList([Layer(**options), Layer(**options)])

    def forward(self, x, past=(None, None)):
        present = []
        for layer, of_layer in zip(self.layers, past, strict=True):
            x, kept = layer(x, of_layer)
            present.append(kept)
        return x, present


class TestDecoding:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_token_by_token(self, options, device):
        torch.manual_seed(0)
        model = Model(**options).to(device, options.get("dtype", torch.float32)).eval()
        x = torch.randn(2, 40, 32, device=device, dtype=next(model.parameters()).dtype)
        whole, _ = model(x)
        with torch.no_grad():
            steps, past = [], (None, None)
            for t in range(40):
                step, past = model(x[:, t : t + 1], past)
                steps.append(step)
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("chunks", [(40,), (13, 27), (1, 30, 9), (8, 8, 8, 8, 8), (39, 1)], ids=str)
    def test_chunked_prefill(self, chunks, device):
        torch.manual_seed(0)
        model = Model(signed=True).to(device).eval()
        x = torch.randn(2, 40, 32, device=device)
        whole, _ = model(x)
        with torch.no_grad():
            parts, past = [], (None, None)
            for chunk in x.split(chunks, 1):
                part, past = model(chunk, past)
                parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)

    def test_a_static_cache_is_longer_than_what_is_in_it(self, device):
        """Keys that nobody has written yet come after the queries: causality hides them, whatever they hold."""
        module = make(device)
        query, key, value = torch.randn(3, 2, 4, 40, 8, device=device).unbind()
        with torch.no_grad():
            whole = module.attention(query, key, value, is_causal=True)
            for start, end in ((0, 17), (17, 18), (18, 40)):
                static_key, static_value = torch.full_like(key, 1e3), torch.full_like(value, 1e3)
                static_key[:, :, :end], static_value[:, :, :end] = key[:, :, :end], value[:, :, :end]
                part = module.attention(query[:, :, start:end], static_key, static_value, offset=start, is_causal=True)
                torch.testing.assert_close(part, whole[:, :, start:end], atol=1e-5, rtol=1e-5)

    def test_a_materialised_step(self, device):
        """For another library's attention, a step needs one row of the whole bias."""
        module = make(device)
        with torch.no_grad():
            whole = module(40, 40)
            for t in range(40):
                torch.testing.assert_close(module(1, t + 1), whole[:, t : t + 1, : t + 1])
                torch.testing.assert_close(module(1, 40, offset=t), whole[:, t : t + 1])
