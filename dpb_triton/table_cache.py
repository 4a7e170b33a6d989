# SPDX-License-Identifier: MIT
"""The table of a module in eval mode, kept from call to call for as long as its MLP is the same.

decoding step       1  …  256  257  …  512  513  …
distances needed    1     256  257     512  513
MLP computed for  256          512         1024        a kept table serves all shorter ones
"""

import torch
from torch import nn

_SMALLEST = 256
# Functions of their parameters alone. Any other layer (LoRA, a parametrization, a quantised one) may change its mind
# without a parameter changing, so its table is computed each time.
_PLAIN = (nn.Linear, nn.LayerNorm, nn.SiLU)


class TableCache:
    """One table, and what it was computed from. Copies of a module start without."""

    def __init__(self):
        self._kept = None

    def __reduce__(self):
        return TableCache, ()

    def clear(self):
        """Forget the table."""
        self._kept = None

    def get(self, module, n, compute):
        """A table of n distances or more: the kept one, or `compute(length)`, which is then kept.

        None where nothing may be kept: in training, in a trace or a capture, of layers that are not plain. A call that
        needs gradients also forgets what there is, because an optimizer's step follows.
        """
        if module.training or not _is_plain(module.mlp):
            return None
        parameters = list(module.mlp.parameters())
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            self.clear()
            return None

        # On a CPU the numbers are compared, which takes microseconds. A GPU would have to be waited for: there a change
        # shows in torch's count of in-place operations or in the storage. Neither shows a write through `.data`.
        is_read = parameters[0].device.type == "cpu"
        key = [(x.data_ptr(), x._version, x.dtype, x.device) for x in parameters]
        key.append((module.signed, module.log_distance, torch.is_inference_mode_enabled()))
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
        # where they are not copied they keep their storages, so that no address is seen twice
        values = [x.detach().clone() if is_read else x.detach() for x in parameters]
        self._kept = key, values, table, length
        return table


def is_traced(device_type):
    """Whether this call is being recorded, for other numbers than those it sees, or has none."""
    return (
        torch.compiler.is_compiling()
        or device_type not in ("cpu", "cuda")
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        # a graph would go on reading a table that a longer one has replaced
        or (device_type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _is_plain(mlp):
    return type(mlp) is nn.Sequential and all(
        type(layer) in _PLAIN
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and all(type(x) is nn.Parameter and not x.is_inference() for x in layer.parameters())
        for layer in mlp
    )
