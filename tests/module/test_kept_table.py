# SPDX-License-Identifier: MIT
"""What can make an MLP another function while no parameter changes. A table that is kept then would be stale."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpb_triton import DynamicPositionBias


def make(**options):
    torch.manual_seed(0)
    return DynamicPositionBias(8, 2, norm=True, **options).eval()


class Dial:
    """A number that other code multiplies results by."""

    factor = 1.0

    def of(self, function):
        return lambda *args, **kwargs: function(*args, **kwargs) * self.factor

    def after(self, module, args, out):
        return out * self.factor

    def after_with_kwargs(self, module, args, kwargs, out):
        return out * self.factor

    def before(self, module, args):
        return (args[0] * self.factor,)

    def before_with_kwargs(self, module, args, kwargs):
        return (args[0] * self.factor,), kwargs


class FunctionMode(TorchFunctionMode):
    def __init__(self, dial):
        super().__init__()
        self.dial = dial

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * self.dial.factor if function is F.linear else out


class DispatchMode(TorchDispatchMode):
    def __init__(self, dial):
        super().__init__()
        self.dial = dial

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return out * self.dial.factor if function is torch.ops.aten.addmm.default else out


class Parametrization(nn.Module):
    def __init__(self, dial):
        super().__init__()
        self.dial = dial

    def forward(self, weight):
        return weight * self.dial.factor


class Weight(torch.Tensor):
    """A parameter that has its own class."""

    dial = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) * cls.dial.factor if function is F.linear else out


def subclass_of(cls, dial):
    class Sub(cls):
        def forward(self, x):
            return super().forward(x) * dial.factor

    return Sub


def hook(place, name, hook, **options):
    """Puts a hook on `mlp`, or on one of its layers."""

    def install(module, dial, stack, patch):
        layer = module.mlp if place is None else module.mlp[place]
        stack.callback(getattr(layer, name)(getattr(dial, hook), **options).remove)

    return install


def in_instance(place, name):
    def install(module, dial, stack, patch):
        layer = module.mlp if place is None else module.mlp[place]
        setattr(layer, name, dial.of(getattr(layer, name)))
        stack.callback(delattr, layer, name)

    return install


def in_class(owner, name):
    def install(module, dial, stack, patch):
        patch.setattr(owner, name, dial.of(getattr(owner, name)))

    return install


def method_of_class(owner, name):
    def install(module, dial, stack, patch):
        original = getattr(owner, name)

        def patched(self, *args, **kwargs):
            out = original(self, *args, **kwargs)
            return out * dial.factor if isinstance(out, torch.Tensor) and not isinstance(self, Parametrization) else out

        patch.setattr(owner, name, patched, raising=name in vars(owner))

    return install


def sequence_of_all(module, dial, stack, patch):
    iterate = nn.Sequential.__iter__

    def patched(self):
        for layer in iterate(self):
            yield layer
            if type(layer) is nn.SiLU:
                yield Parametrization(dial)

    patch.setattr(nn.Sequential, "__iter__", patched)


def attributes_of_all(module, dial, stack, patch):
    def patched(self, name):
        if name == "weight":
            return self._parameters[name] * dial.factor
        return object.__getattribute__(self, name)

    patch.setattr(nn.Linear, "__getattribute__", patched)


def everywhere(register, hook):
    def install(module, dial, stack, patch):
        stack.callback(register(getattr(dial, hook)).remove)

    return install


def parametrization(module, dial, stack, patch):
    nn.utils.parametrize.register_parametrization(module.mlp[3], "weight", Parametrization(dial))


def old_weight_norm(module, dial, stack, patch):
    nn.utils.weight_norm(module.mlp[3])
    hook(3, "register_forward_hook", "after")(module, dial, stack, patch)


def weight_is_an_attribute(module, dial, stack, patch):
    """FSDP1 leaves a weight like this."""
    layer, weight = module.mlp[3], module.mlp[3].weight.detach()
    del layer.weight
    stack.enter_context(Setting(dial, lambda: setattr(layer, "weight", weight * dial.factor)))


def attribute_before_the_parameter(module, dial, stack, patch):
    layer, weight = module.mlp[3], module.mlp[3].weight.detach()
    stack.enter_context(Setting(dial, lambda: vars(layer).update(weight=weight * dial.factor)))


def weight_is_a_buffer(module, dial, stack, patch):
    layer, weight = module.mlp[3], module.mlp[3].weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight.clone())
    stack.enter_context(Setting(dial, lambda: layer.weight.copy_(weight * dial.factor)))


def sparse_weight(module, dial, stack, patch):
    """torch compares no sparse numbers."""
    layer, weight = module.mlp[3], module.mlp[3].weight.detach()
    stack.enter_context(
        Setting(dial, lambda: setattr(layer, "weight", nn.Parameter((weight * dial.factor).to_sparse_csr())))
    )


class Setting:
    """Runs a function whenever the dial is turned."""

    def __init__(self, dial, apply):
        self.dial, self.apply = dial, apply

    def __enter__(self):
        self.dial.turned = self.apply

    def __exit__(self, *error):
        pass


def weight_of_a_class(module, dial, stack, patch):
    Weight.dial = dial
    module.mlp[3].weight = nn.Parameter(module.mlp[3].weight.detach().as_subclass(Weight))


def layer_of_a_subclass(module, dial, stack, patch):
    module.mlp[3].__class__ = subclass_of(nn.Linear, dial)


def mlp_of_a_subclass(module, dial, stack, patch):
    module.mlp = subclass_of(nn.Sequential, dial)(*module.mlp)


def foreign_layer(module, dial, stack, patch):
    module.mlp.append(Parametrization(dial))


def nested_layer(module, dial, stack, patch):
    module.mlp[3] = nn.Sequential(module.mlp[3], Parametrization(dial))


def compiled_layer(module, dial, stack, patch):
    module.mlp[3].compile(backend=lambda graph, inputs: lambda *args: tuple(x * dial.factor for x in graph(*args)))


def eps_of_a_norm(module, dial, stack, patch):
    stack.enter_context(Setting(dial, lambda: setattr(module.mlp[1], "eps", dial.factor)))


def own_compute(module, dial, stack, patch):
    module._compute = dial.of(module._compute)


def compute_of_a_subclass(module, dial, stack, patch):
    class Sub(DynamicPositionBias):
        def _compute(self, *args):
            return super()._compute(*args) * dial.factor

    module.__class__ = Sub


def mode(cls):
    return lambda module, dial, stack, patch: stack.enter_context(cls(dial))


INTERVENTIONS = {
    "hook on mlp": hook(None, "register_forward_hook", "after"),
    "pre-hook on mlp": hook(None, "register_forward_pre_hook", "before"),
    "hook on mlp with kwargs": hook(None, "register_forward_hook", "after_with_kwargs", with_kwargs=True),
    "hook on a Linear": hook(3, "register_forward_hook", "after"),
    "hook on a Linear, always called": hook(0, "register_forward_hook", "after", always_call=True),
    "pre-hook on a Linear": hook(3, "register_forward_pre_hook", "before"),
    "pre-hook on a Linear with kwargs": hook(3, "register_forward_pre_hook", "before_with_kwargs", with_kwargs=True),
    "hook on a SiLU": hook(2, "register_forward_hook", "after"),
    "hook on a LayerNorm": hook(4, "register_forward_hook", "after"),
    "hook everywhere": everywhere(torch_module.register_module_forward_hook, "after"),
    "pre-hook everywhere": everywhere(torch_module.register_module_forward_pre_hook, "before"),
    "forward of mlp": in_instance(None, "forward"),
    "forward of a Linear": in_instance(3, "forward"),
    "forward of a SiLU": in_instance(2, "forward"),
    "_call_impl of a Linear": in_instance(3, "_call_impl"),
    "forward of all Linear": method_of_class(nn.Linear, "forward"),
    "forward of all LayerNorm": method_of_class(nn.LayerNorm, "forward"),
    "forward of all SiLU": method_of_class(nn.SiLU, "forward"),
    "forward of all Sequential": method_of_class(nn.Sequential, "forward"),
    "call of all modules": method_of_class(nn.Module, "__call__"),
    "_call_impl of all modules": method_of_class(nn.Module, "_call_impl"),
    **{
        f"{name} of {owner.__name__}": method_of_class(owner, name)
        for owner in (nn.Linear, nn.LayerNorm, nn.SiLU, nn.Sequential)
        for name in ("__call__", "_call_impl")
    },
    "__getattr__ of Linear": method_of_class(nn.Linear, "__getattr__"),
    "__getattr__ of LayerNorm": method_of_class(nn.LayerNorm, "__getattr__"),
    "__getattribute__ of Linear": attributes_of_all,
    "__iter__ of Sequential": sequence_of_all,
    "F.linear": in_class(F, "linear"),
    "F.silu": in_class(F, "silu"),
    "F.layer_norm": in_class(F, "layer_norm"),
    "torch.layer_norm": in_class(torch, "layer_norm"),
    "parametrization": parametrization,
    "old weight_norm": old_weight_norm,
    "weight is an attribute": weight_is_an_attribute,
    "attribute before the parameter": attribute_before_the_parameter,
    "weight is a buffer": weight_is_a_buffer,
    "sparse weight": sparse_weight,
    "weight of a class of its own": weight_of_a_class,
    "layer of a subclass": layer_of_a_subclass,
    "mlp of a subclass": mlp_of_a_subclass,
    "foreign layer": foreign_layer,
    "nested layer": nested_layer,
    "compiled layer": compiled_layer,
    "eps of a LayerNorm": eps_of_a_norm,
    "function mode": mode(FunctionMode),
    "dispatch mode": mode(DispatchMode),
    "_compute": own_compute,
    "_compute of a subclass": compute_of_a_subclass,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Sparse CSR")
@pytest.mark.parametrize("install", INTERVENTIONS.values(), ids=INTERVENTIONS)
def test_another_function_is_seen(install, monkeypatch):
    """After each turn of the dial the module gives the MLP's new result, and its first one once the change is gone."""
    module, dial = make(), Dial()
    tables = []
    with torch.no_grad():
        before = module.table(7)
        with ExitStack() as stack:
            install(module, dial, stack, monkeypatch)
            for dial.factor in (1.0, 3.0, 0.5):
                getattr(dial, "turned", lambda: None)()
                tables.append(module._compute(7))
                torch.testing.assert_close(module.table(7), tables[-1])
                torch.testing.assert_close(module.forward(1, 7), tables[-1].flip(1)[:, None])
        assert not torch.equal(tables[1], tables[2]), "the dial does nothing"
        monkeypatch.undo()
        torch.testing.assert_close(module.table(7), module._compute(7))
        if module.mlp._modules.keys() == make().mlp._modules.keys() and install is not eps_of_a_norm:
            dial.factor = 1.0
            getattr(dial, "turned", lambda: None)()
            torch.testing.assert_close(module.table(7), before)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precision_of_products(precision):
    """The module notices a setting that may round the distances, and does not let it round them."""
    module = make()
    exact = module.double().table(3000).float()
    module.float()
    own = torch.backends.mkldnn.matmul.fp32_precision
    with torch.no_grad():
        module.table(3000)
        try:
            torch.backends.mkldnn.matmul.fp32_precision = precision
            assert torch.equal(module.table(3000), exact)
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = own
        assert torch.equal(module.table(3000), module._compute(3000))


def marked(module):
    """Mark the layers as transformers does after it has initialised them."""
    for layer in module.modules():
        layer._is_hf_initialized = True


HARMLESS = {
    "nothing": lambda module: None,
    "a mark": marked,
    "a subclass": lambda module: setattr(module, "__class__", type("Sub", (DynamicPositionBias,), {"more": 1})),
    "a hook on the module": lambda module: module.register_forward_hook(lambda *_: None),
    "a backward hook": lambda module: module.mlp[3].register_full_backward_hook(lambda *_: None),
}


def is_kept(module):
    with torch.no_grad():
        module.table(7)
        kept = module._cache._kept
        module(3, 7), module.table(5)
        return kept is not None and module._cache._kept is kept


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_nothing_costs_nothing(change):
    module = make()
    change(module)
    assert is_kept(module)


def test_modes_that_change_nothing_cost_nothing():
    for mode in (torch.device("cpu"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
        module = make()
        with mode:
            assert is_kept(module)


def test_patched_before_this_library_was_imported():
    code = """
import torch
from torch import nn
factor, forward = [1.0], nn.Linear.forward
nn.Linear.forward = lambda self, x: forward(self, x) * factor[0]
from dpb_triton import DynamicPositionBias
module = DynamicPositionBias(8, 2).eval()
with torch.no_grad():
    for factor[0] in (1.0, 3.0):
        assert torch.equal(module.table(7), module._compute(7))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
