# SPDX-License-Identifier: MIT
"""Runs an MLP whose parameters other code may shard, gather, quantise, offload, cast or own.

Nothing here touches a parameter. The layers are called as modules, so that their own hooks fill them, and a layer may
do anything with its weights. There is one requirement for a layer and for torch's functions below it: products must
come out in the MLP's dtype, because the distances need it.
"""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .checks import FLOATING
from .plain_layers import plain_parameters

# torch's arithmetic promotes operands of different dtypes; these functions refuse them
_PRODUCTS = {
    F.linear, F.bilinear, F.conv1d, F.layer_norm, F.rms_norm, F.group_norm, torch.layer_norm, torch.rms_norm,
    torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum, torch.Tensor.matmul,
    torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.mv,
    torch.Tensor.addmm, torch.Tensor.baddbmm,
}  # fmt: skip


def dtype_and_device(module, query=None):
    """The floating dtype (or None) and the device of the module's tensors; else `query`'s device or torch's default.

    Parameters count first, then buffers, then tensors in plain attributes, which nn.DataParallel's replicas and FSDP1
    have instead of parameters.
    """
    dtype = device = meta = None
    for tensor in _tensors(module):
        if dtype is None and tensor.dtype in FLOATING:
            dtype = tensor.dtype
        if tensor.is_meta:
            meta = tensor.device
        elif device is None:
            device = tensor.device
        if dtype is not None and device is not None:
            return dtype, device
    if device is None:
        device = _execution_device(module)
    if device is None and meta is not None and plain_parameters(module.mlp) is not None:
        device = meta  # no hook will fill plain layers
    if device is None:
        device = torch.get_default_device() if query is None else query.device
    return dtype, device


def run(mlp, x):
    """mlp(x) in x's dtype, whatever the dtypes of its layers."""
    if _is_in(mlp, x.dtype):
        return mlp(x)
    with _PromotedProducts(x.dtype):
        return mlp(x).to(x.dtype)


def _is_in(mlp, dtype):
    """Whether the layers are known to compute in `dtype` by themselves."""
    if torch.compiler.is_compiling():  # it traces the layers themselves, and would guard each question below
        parameters = list(mlp.parameters())
        # len: torch 2.11 cannot trace bool() of a list
        return len(parameters) > 0 and all(parameter.dtype == dtype for parameter in parameters)
    plain = plain_parameters(mlp)
    return plain is not None and all(parameter.dtype == dtype for parameter in plain[0])


def _tensors(module):
    for kind in ("_parameters", "_buffers"):
        for layer in module.modules():
            for tensor in getattr(layer, kind).values():
                if tensor is not None:
                    yield tensor
    for layer in module.modules():
        for tensor in vars(layer).values():
            if isinstance(tensor, torch.Tensor):
                yield tensor


def _execution_device(module):
    """The device to which accelerate's hooks bring the weights of a called layer, or None."""
    for layer in module.modules():
        hook = getattr(layer, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


class _PromotedProducts(TorchFunctionMode):
    """Products and normalisations of floating tensors run in `dtype`, on the device of the last tensor, the weight.

    So fp32 distances meet bfloat16 weights without rounding. A quantised weight (a tensor subclass whose dtype is the
    one it stands for) stays as it is: the other tensors are cast to its dtype, and the result is cast back.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if function not in _PRODUCTS or not tensors:
            return function(*args, **kwargs)
        device = tensors[-1].device
        quantised = [x for x in tensors if _is_quantised(x)]
        dtype = quantised[0].dtype if quantised else self.dtype

        def cast(x):
            is_cast = isinstance(x, torch.Tensor) and x.dtype in FLOATING and not _is_quantised(x)
            return x.to(device, dtype) if is_cast else x

        out = function(*map(cast, args), **{name: cast(x) for name, x in kwargs.items()})
        return out.to(self.dtype) if quantised else out


def _is_quantised(tensor):
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    # a DTensor is a wrapper too, but its numbers can be cast like any others
    return is_traceable_wrapper_subclass(tensor) and not hasattr(tensor, "device_mesh")
