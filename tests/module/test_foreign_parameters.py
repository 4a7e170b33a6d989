# SPDX-License-Identifier: MIT
"""Parameters that other code owns: replicated, quantised, in buffers, gathered or loaded layer by layer, cast."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dpb_triton import DynamicPositionBias, MultiheadAttention

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return DynamicPositionBias(8, 2, dtype=dtype, **options)


def calls(dtype):
    """{name: a call of a module}."""
    x = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {
        "table": lambda module: module.table(9),
        "forward": lambda module: module(5, 9),
        "in bfloat16": lambda module: module(5, 9, dtype=torch.bfloat16),
        "attention": lambda module: module.attention(*x, is_causal=True),
    }


def assert_same(module, expected, dtype=torch.float32, tolerance=0.0):
    """Compare every call, in training or not, with gradients or not. The module must keep no table."""
    for training in (True, False):
        module.train(training)
        for grad in (True, False):
            for name, call in calls(dtype).items():
                with torch.set_grad_enabled(grad):
                    found, wanted = call(module), call(expected)
                torch.testing.assert_close(
                    found, wanted, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
                )
    assert module._cache._kept is None
    assert module.device == expected.device


def replica(module):
    """A replica of a module, as torch.nn.parallel.replicate makes it for one device."""
    again = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        again._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            again._parameters[name] = None
        else:
            setattr(again, name, parameter * 1)
    return again


class TestReplicas:
    @pytest.mark.parametrize("options", [{}, {"norm": True, "signed": True, "depth": 1}], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_same_numbers(self, dtype, options):
        module = make(dtype, **options)
        assert_same(replica(module), module, dtype)

    def test_gradients_reach_the_original(self):
        module, expected = make(), make()
        for each in (replica(module), expected):
            each(5, 9).square().sum().backward()
        for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)

    def test_multihead(self):
        torch.manual_seed(0)
        module, x = MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
        for options in ({"need_weights": False}, {}):
            torch.testing.assert_close(replica(module)(x, x, x, **options), module(x, x, x, **options))


class OfNothing(nn.Module):
    """A layer without tensors: it says nothing of a dtype or a device."""

    def forward(self, x):
        return torch.cat([x, -x], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_without_tensors_torchs_defaults_count(dtype, monkeypatch):
    """For the dtype of a bias; attention takes the device of its query."""
    module = make()
    module.mlp = nn.Sequential(OfNothing())
    monkeypatch.setattr(torch, "get_default_dtype", lambda: dtype)
    bias = module(3, 5)
    assert bias.dtype == dtype and bias[1, 0].tolist() == [-2, -1, 0, -1, -2]
    assert module.table(5).dtype == torch.float32 and module.device == torch.get_default_device()
    query = torch.empty(1, 2, 3, 8, device="meta")
    assert module.attention(query, query, query).is_meta


class InBuffers(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("w", linear.weight.detach())
        self.register_buffer("b", linear.bias.detach())

    def forward(self, x):
        return F.linear(x, self.w, self.b)


class Int8(nn.Module):
    """Weight-only quantisation: int8 numbers, which must reach forward unchanged, and one scale for each row."""

    def __init__(self, linear, is_buffer, dtype=torch.float32):
        super().__init__()
        scale = linear.weight.detach().float().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        if is_buffer:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.to(dtype))
        self.bias = nn.Parameter(linear.bias.detach().to(dtype))
        self.address = weight.data_ptr()

    def forward(self, x):
        assert self.weight.dtype == torch.int8 and self.weight.data_ptr() == self.address
        return F.linear(x, self.weight.to(x.dtype)) * self.scale.T + self.bias


class Dequantised(nn.Module):
    """Like a layer of HQQ: the weight of its product always has 16 bits, whatever the input's dtype."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("packed", linear.weight.detach().bfloat16().view(torch.int16))
        self.bias = linear.bias

    def forward(self, x):
        return torch.matmul(x, self.packed.view(torch.bfloat16).T) + self.bias


class Quantised(torch.Tensor):
    """Like a weight of torchao: int8 numbers that stand for another dtype, in a tensor that has its own class."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["codes"], tensors["scale"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.linear:
            return super().__torch_function__(function, types, args, kwargs or {})
        x, weight, bias = args
        assert type(weight) is cls and x.dtype == weight.dtype
        return (x @ weight.codes.to(x.dtype).T) * weight.scale.T + bias

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"{function} of a quantised weight")


class Product(nn.Module):
    """A Linear whose product is another function of x (rows, width) and the weight (width, out features)."""

    def __init__(self, linear, product):
        super().__init__()
        self.linear, self.product = linear, product

    def forward(self, x):
        return self.product(x, self.linear.weight.T) + self.linear.bias


def rows_of(product):
    return lambda x, w: torch.stack([product(w.T, row) for row in x])


PRODUCTS = {
    "linear by name": lambda x, w: F.linear(input=x, weight=w.T),
    "bilinear": lambda x, w: F.bilinear(torch.ones_like(x[:, :1]), x, w.T[:, None]),
    "conv1d": lambda x, w: F.conv1d(x[:, :, None], w.T[:, :, None])[:, :, 0],
    "@": lambda x, w: x @ w,
    "reflected @": lambda x, w: w.__rmatmul__(x),
    "matmul": torch.matmul,
    "Tensor.matmul": lambda x, w: x.matmul(w),
    "mm": torch.mm,
    "Tensor.mm": lambda x, w: x.mm(w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "Tensor.bmm": lambda x, w: x[None].bmm(w[None])[0],
    "mv": rows_of(torch.mv),
    "Tensor.mv": rows_of(torch.Tensor.mv),
    "addmm": lambda x, w: torch.addmm(w[0] * 0, x, w),
    "Tensor.addmm": lambda x, w: (w[0] * 0).addmm(x, w),
    "baddbmm": lambda x, w: torch.baddbmm(w[None, :1] * 0, x[None], w[None])[0],
    "Tensor.baddbmm": lambda x, w: (w[None, :1] * 0).baddbmm(x[None], w[None])[0],
    "einsum": lambda x, w: torch.einsum("nd,de->ne", x, w),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_of_any_name_has_the_distances(product):
    """They meet a layer's bfloat16 weights unrounded."""
    module, rounded = make(), make()
    for each in (module, rounded):
        each.mlp[0].bfloat16()
        each.mlp[2].bfloat16()
    rounded.float()
    for place in (0, 2):
        module.mlp[place] = Product(module.mlp[place], product)
    torch.testing.assert_close(module.table(3000), rounded.table(3000), atol=1e-5, rtol=1e-5)


NORMS = {
    "F.layer_norm": lambda x, weight, bias: F.layer_norm(x, (8,), weight, bias),
    "torch.layer_norm": lambda x, weight, bias: torch.layer_norm(x, (8,), weight, bias),
    "F.rms_norm": lambda x, weight, bias: F.rms_norm(x, (8,), weight),
    "torch.rms_norm": lambda x, weight, bias: torch.rms_norm(x, (8,), weight),
    "F.group_norm": lambda x, weight, bias: F.group_norm(x, 2, weight, bias),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_norm_of_any_name_keeps_the_dtype(norm):
    class Norm(nn.LayerNorm):
        def forward(self, x):
            return norm(x, self.weight, self.bias)

    module, rounded = make(), make()
    layer = Norm(8)
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    for each, dtype in ((module, torch.bfloat16), (rounded, torch.float32)):
        each.mlp.insert(1, copy.deepcopy(layer).bfloat16().to(dtype))
    torch.testing.assert_close(module.table(3000), rounded.table(3000), atol=1e-5, rtol=1e-5)


def test_a_product_of_integers_stays_one():
    """A layer may count with them: float32 would round the largest."""

    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("codes", torch.full((8, 1), 2**24 + 1))
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x):
            return (torch.ones(len(x), 8, dtype=torch.int64) @ self.codes) % 2 * self.scale

    module = make()
    module.mlp = nn.Sequential(Codes())
    assert (module.table(3) == 0).all()
    module.mlp[0].codes[0] += 1
    assert (module.table(3) == 1).all()


def test_a_product_is_where_its_weight_is():
    """As for layers on several GPUs: x comes to the weight. A module's device is that of its first parameter."""
    module = make()
    module.mlp[-1].to("meta", torch.bfloat16)
    assert module.device.type == "cpu" and module.table(9).is_meta


def test_parameters_say_the_dtype_before_buffers():
    module = make(torch.bfloat16)
    module.mlp[0].register_buffer("calls", torch.zeros(1, dtype=torch.float64))
    assert module(3, 5).dtype == torch.bfloat16 and module.table(5).dtype == torch.float32


def linears(module):
    return [place for place, layer in enumerate(module.mlp) if isinstance(layer, nn.Linear)]


class TestLayersOfOthers:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_weights_in_buffers(self, dtype, monkeypatch):
        module, expected = make(dtype, norm=True), make(dtype, norm=True)
        for place in linears(module):
            module.mlp[place] = InBuffers(module.mlp[place])
        assert_same(module, expected, dtype)
        module = make(dtype)
        for place in linears(module):
            module.mlp[place] = InBuffers(module.mlp[place])
        assert not list(module.parameters())
        assert_same(module, make(dtype), dtype)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(module.table(9), make(dtype).table(9))

    @pytest.mark.filterwarnings("ignore")
    def test_quantize_dynamic(self):
        quantization = pytest.importorskip("torch.ao.quantization", reason="this torch no longer has it")
        module = quantization.quantize_dynamic(make().eval(), {nn.Linear}, dtype=torch.qint8)
        expected = copy.deepcopy(module)
        x = torch.arange(9.0)[:, None]
        torch.testing.assert_close(module.table(9), expected.mlp(x).T, atol=0, rtol=0)
        torch.testing.assert_close(module(5, 9), make()(5, 9), atol=0.05, rtol=0.05)
        torch.backends.mkldnn.matmul.fp32_precision, before = "tf32", torch.backends.mkldnn.matmul.fp32_precision
        torch.testing.assert_close(module.table(9), expected.mlp(x).T, atol=0, rtol=0)
        torch.backends.mkldnn.matmul.fp32_precision = before
        query = torch.randn(1, 2, 5, 8)
        assert module.attention(query, query, query).dtype == torch.float32

    @pytest.mark.parametrize("is_buffer", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_int8(self, dtype, is_buffer):
        module = make(dtype)
        for place in linears(module):
            module.mlp[place] = Int8(module.mlp[place], is_buffer, dtype)
        assert module(5, 9).dtype == dtype
        torch.testing.assert_close(module.table(9), make(dtype).table(9), atol=0.05, rtol=0.05)
        module(5, 9).sum().backward()
        assert module.mlp[0].bias.grad.dtype == dtype
        assert_same(module, module, dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_products_with_sixteen_bits(self, dtype):
        module, rounded = make(dtype), make(dtype)
        for place in linears(module):
            layer = rounded.mlp[place]
            layer.weight.data = layer.weight.data.bfloat16().to(dtype)
            module.mlp[place] = Dequantised(module.mlp[place])
        assert_same(module, rounded, dtype, tolerance=1e-5)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16], ids=str)
    def test_weights_of_a_class_of_their_own(self, dtype, scale):
        module = make(dtype)
        for place in linears(module):
            int8 = Int8(module.mlp[place], False, scale)
            module.mlp[place].weight = nn.Parameter(Quantised(int8.weight.data, int8.scale), requires_grad=False)
        assert module.mlp[0].weight.dtype == scale
        dtypes = set()  # nothing but the products is in the weights' dtype
        for layer in module.mlp:
            layer.register_forward_hook(lambda layer, args, out: dtypes.add(out.dtype))
        table = module.table(9)
        assert dtypes == {table.dtype}
        torch.testing.assert_close(module(5, 9).float(), make(dtype)(5, 9).float(), atol=0.05, rtol=0.05)
        table.sum().backward()

    def test_a_layer_of_another_dtype(self):
        """The layer's weights are rounded, but the distances are not."""
        module, rounded = make(), make()
        module.mlp[0].bfloat16()
        rounded.mlp[0].bfloat16().float()
        module.mlp[0], module.mlp[2] = nn.Sequential(module.mlp[0], nn.Identity()), module.mlp[2]
        assert torch.equal(module.table(3000), rounded.table(3000))

    @pytest.mark.parametrize("number", [2, -1])
    def test_a_later_layer_of_another_dtype(self, number):
        """torch's own layers too: that the first one is in the table's dtype says nothing about the others."""
        module, rounded = make(), make()
        module.mlp[number].bfloat16()
        rounded.mlp[number].bfloat16().float()
        assert torch.equal(module.table(3000), rounded.table(3000))


@pytest.mark.parametrize("options", [{}, {"norm": True, "signed": True, "log_distance": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_the_float32_module_bit_for_bit(dtype, options):
    """Forward and gradients equal those of the same MLP with parameters cast to float32 and gradients cast back."""
    module = make(dtype, **options)
    table = module.table(40)
    wide = copy.deepcopy(module).float()
    assert torch.equal(table, wide.table(40))
    table.square().mean().backward()
    wide.table(40).square().mean().backward()
    for ours, theirs in zip(module.parameters(), wide.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad.to(dtype))


class Gathered:
    """Parameters that exist only while their layer runs: its hooks load and release them, as ZeRO-3 does."""

    def __init__(self, module):
        self.seen = 0
        for layer in module.modules():
            own = dict(layer.named_parameters(recurse=False))
            if own:
                whole = {name: parameter.data for name, parameter in own.items()}
                layer.register_forward_pre_hook(lambda layer, args, whole=whole: self.gather(layer, whole))
                layer.register_forward_hook(lambda layer, args, out, whole=whole: self.release(layer, whole))
                self.release(layer, whole)

    def gather(self, layer, whole):
        self.seen += 1
        for name, data in whole.items():
            getattr(layer, name).data = data

    def release(self, layer, whole):
        for name, data in whole.items():
            getattr(layer, name).data = data.new_empty(0)


class Offloaded:
    """Parameters on the meta device until a layer runs."""

    def __init__(self, module, patches, device=None):
        for layer in module.modules():
            own = dict(layer.named_parameters(recurse=False))
            if own:
                self.offload(layer, own)
                self.patch(layer, own, device) if patches else self.hook(layer, own)

    def hook(self, layer, own):
        layer.register_forward_pre_hook(lambda layer, args: self.bring(layer, own))
        layer.register_forward_hook(lambda layer, args, out: self.offload(layer, own))

    def patch(self, layer, own, device):
        """Patch `forward` as accelerate does."""
        forward = layer.forward

        def patched(x):
            assert not x.is_meta
            self.bring(layer, own)
            out = forward(x)
            self.offload(layer, own)
            return out

        layer.forward = patched
        layer._hf_hook = type("Hook", (), {"execution_device": device})()

    def bring(self, layer, own):
        layer._parameters.update(own)

    def offload(self, layer, own):
        layer._parameters.update({name: nn.Parameter(x.to("meta"), x.requires_grad) for name, x in own.items()})


class TestParametersThatComeAndGo:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_gathered_layer_by_layer(self, dtype):
        module = make(dtype, norm=True)
        gathered = Gathered(module)
        assert all(parameter.numel() == 0 for parameter in module.parameters())
        assert_same(module, make(dtype, norm=True), dtype)
        assert gathered.seen > 0

    @pytest.mark.parametrize("patches", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_offloaded(self, dtype, patches):
        module = make(dtype, norm=True)
        Offloaded(module, patches, device="cpu")
        assert all(parameter.is_meta for parameter in module.parameters())
        assert_same(module, make(dtype, norm=True), dtype)

    def test_where_the_hooks_say(self):
        module = make()
        Offloaded(module, True, device=torch.device("cuda", 0))
        assert module.device == torch.device("cuda", 0)
        nested = make()
        for layer in nested.mlp:
            layer._hf_hook = type(
                "Sequence", (), {"hooks": [object(), type("Hook", (), {"execution_device": "cuda:0"})()]}
            )()
        assert nested.device.type == "cpu", "parameters on a real device must count first"
        nested.to("meta")
        assert nested.device == torch.device("cuda", 0)

    def test_a_meta_module_stays_one(self):
        """This also holds with hooks that fill nothing, such as those of a shape counter."""
        module = make(device="meta")
        assert module(4, 6).is_meta and module.device.type == "meta"
        shapes = []
        for layer in module.mlp:
            layer.register_forward_hook(lambda layer, args, out: shapes.append(out.shape))
        assert module.table(9).is_meta
        assert shapes[-1] == (9, 2)


def test_a_hook_of_the_mlp_that_keeps_a_part(device):
    """DTensor works like this: other code may also change the input and the output of the whole MLP."""
    module = make(torch.bfloat16, device=device)
    expected = module.table(9)[:1]
    module.mlp.register_forward_pre_hook(lambda mlp, args: (args[0].clone(),))
    module.mlp.register_forward_hook(lambda mlp, args, out: out[:, :1])
    assert torch.equal(module.table(9), expected)
