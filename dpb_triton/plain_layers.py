# SPDX-License-Identifier: MIT
"""Which MLPs are known to be functions of their parameters alone.

A hook, a patched method, a parametrization, a LoRA or quantised layer may change its result while no parameter changes.
So this file lists what is known to be safe, not what is known to be unsafe: torch's own layers, as torch makes and runs
them.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

_EVERY = vars(nn.Module()).keys() | {"_is_hf_initialized"}  # transformers marks layers that it has initialised
# {type: the allowed attributes of an instance}: any other may hide the class's `forward` or a parameter
_ATTRIBUTES = {
    nn.Sequential: _EVERY,
    nn.SiLU: _EVERY | {"inplace"},
    nn.Linear: _EVERY | {"in_features", "out_features"},
    nn.LayerNorm: _EVERY | {"normalized_shape", "eps", "elementwise_affine"},
}
_LEAVES = (nn.SiLU, nn.Linear, nn.LayerNorm)


def _methods():
    """The Python methods that a call of the layers runs; people patch them."""
    return (
        nn.Linear.forward, nn.LayerNorm.forward, nn.SiLU.forward, nn.Sequential.forward, nn.Sequential.__iter__,
        nn.Linear.__call__, nn.LayerNorm.__call__, nn.SiLU.__call__, nn.Sequential.__call__,
        nn.Linear._call_impl, nn.LayerNorm._call_impl, nn.SiLU._call_impl, nn.Sequential._call_impl,
        nn.Linear.__getattr__, nn.LayerNorm.__getattr__, nn.SiLU.__getattr__, nn.Sequential.__getattr__,
        F.layer_norm, F.silu,
    )  # fmt: skip


def _functions():
    """The C functions that those methods call."""
    return F.linear, torch.layer_norm, nn.Linear.__getattribute__


_METHODS, _FUNCTIONS = (
    _methods(),
    (torch._C._nn.linear, torch._C._VariableFunctions.layer_norm, object.__getattribute__),
)
# All must be defined in torch's files: somebody may have patched one before this file was imported.
_ARE_TORCHS = all(getattr(method, "__globals__", {}).get("__name__", "").startswith("torch.nn.") for method in _METHODS)


def plain_parameters(mlp):
    """The (parameters, other numbers) that alone decide what `mlp` computes; None if anything else may decide too."""
    if type(mlp) is not nn.Sequential or not _is_plain(mlp) or not _is_torch_plain():
        return None
    parameters, numbers = [], []
    for layer in mlp._modules.values():
        if type(layer) not in _LEAVES or not _is_plain(layer):
            return None
        own = layer._parameters
        if type(layer) is not nn.SiLU and own.keys() != {"weight", "bias"}:
            return None
        for parameter in own.values():
            if parameter is not None:
                if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
                    return None
                parameters.append(parameter)
        if type(layer) is nn.LayerNorm:
            numbers.append((layer.normalized_shape, layer.eps))
    return parameters, numbers


def _is_plain(layer):
    attributes = vars(layer)
    return (
        attributes.keys() <= _ATTRIBUTES[type(layer)]
        and not attributes["_forward_hooks"]
        and not attributes["_forward_pre_hooks"]
    )


def _is_torch_plain():
    return (
        _ARE_TORCHS
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and _methods() == _METHODS
        and _functions() == _FUNCTIONS
    )
