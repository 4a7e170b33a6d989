# SPDX-License-Identifier: MIT
"""A driver and a kernel that only record launches, in place of a GPU's. `launching` then works as on a GPU."""

from types import SimpleNamespace

import triton.language as tl
from triton.runtime.jit import JITFunction

from dpb_triton.launching import launch, replay


def _kernel(x_ptr, pair, number, plain, scale, WIDTH: tl.constexpr, IS_SET: tl.constexpr):
    """A kernel's parameters."""


class Compiled:
    """A binary: it notes its starts."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, started):
        self.started = started

    def run(self, *args):
        self.started.append(args)


class Launches:
    """Triton's driver with a current device and stream; what was launched by Triton, or by a direct start."""

    def __init__(self, monkeypatch):
        self.device, self.stream = 0, 7
        self.by_triton, self.started = [], []  # (grid, arguments, constants), (arguments of the start)
        self.kernel = self.another_kernel()
        self.is_ready = True  # else Triton returns before it has compiled
        for module in (launch, replay):
            monkeypatch.setattr(module, "driver", SimpleNamespace(active=self))
        monkeypatch.setattr(launch, "IS_TRIED", True)
        monkeypatch.setattr(launch, "CompiledKernel", Compiled)

    def another_kernel(self):
        kernel = JITFunction(_kernel, do_not_specialize=["plain"])
        kernel.run = self.run
        return kernel

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return device, self.stream

    def get_current_target(self):
        return SimpleNamespace(backend="cuda", arch=80 + 10 * self.device)

    def run(self, *args, grid, warmup, **constants):
        assert not warmup
        self.by_triton.append((grid, args, constants))
        return Compiled(self.started) if self.is_ready else None
