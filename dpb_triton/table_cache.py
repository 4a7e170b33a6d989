# SPDX-License-Identifier: MIT
"""In eval mode a module keeps its table from call to call, as long as its MLP does not change.

decoding step       1  …  256  257  …  512  513  …
distances needed    1     256  257     512  513
MLP computed for  256          512         1024        a kept table serves all shorter lengths
"""

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .plain_layers import plain_parameters
from .tracing import is_capturing, is_recorded

_SMALLEST = 256


class TableCache:
    """One table, and what it was computed from. A copy of a module starts without a table."""

    def __init__(self):
        self._kept = None

    def __reduce__(self):
        return TableCache, ()

    def clear(self):
        """Forget the table."""
        self._kept = None

    def get(self, module, n, compute, options):
        """A table of n distances or more: the kept one, or `compute(length)`, which is then kept.

        `options`: what `compute` depends on besides the MLP. The result is None if no table may be kept: in training,
        in a trace or a capture, or if the MLP may not be a function of its parameters alone. A call that needs
        gradients also drops the kept table, because an optimizer's step follows.
        """
        if module.training or _is_seen():
            return None
        plain = plain_parameters(module.mlp)
        if plain is None or not plain[0]:
            return None
        parameters, numbers = plain
        device = parameters[0].device
        if device.type not in ("cpu", "cuda") or any(x.device != device or x.is_inference() for x in parameters):
            return None
        # a CUDA graph would go on reading a table after a longer one has replaced it
        if is_capturing(device):
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in parameters):
            self.clear()
            return None

        # On a CPU the numbers are compared, which takes microseconds. On a GPU reading them would wait for the device,
        # so a change is seen in torch's count of in-place operations or in the storage. Neither shows a write through
        # `.data`.
        is_read = device.type == "cpu"
        key = [torch.is_inference_mode_enabled(), device, *options, *numbers, *(x.dtype for x in parameters)]
        if not is_read:
            key += [(x.data_ptr(), x._version, x.shape, x.stride()) for x in parameters]
        length = _SMALLEST
        kept = self._kept
        if kept is not None:
            kept_key, values, table, kept_n = kept
            if kept_key == key and not (is_read and not all(map(torch.equal, values, parameters))):
                if n <= kept_n:
                    return table
                length = 2 * kept_n
        length = max(length, n)
        table = compute(length)
        # values that are not copied keep their storages alive, so that no new parameter can have an old address
        values = [x.detach().clone() if is_read else x.detach() for x in parameters]
        self._kept = key, values, table, length
        return table


def _is_seen():
    """Whether this call is recorded, to run on other numbers later, or a mode may change what it computes."""
    if is_recorded():
        return True
    # torch.set_default_device is a mode too, but it changes no layer's forward
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )
