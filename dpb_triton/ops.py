# SPDX-License-Identifier: MIT
"""The operators: their schemas, their fake kernels, and who implements which.

    op                            keys
    dpb_triton::expand, reduce    CUDA: Triton, else csrc/'s kernels    CPU: csrc/'s, if built    otherwise: torch
    …_torch                       every device: torch                                             backend="torch"
    …_triton                      every device: Triton (on the CPU its interpreter)               backend="triton"
    …_cuda                        CUDA: csrc/'s kernels                                           backend="cuda"

All are opaque to torch.compile: one node for all lengths, nothing of the body traced. Only torch is imported here,
Triton on first use. Their derivatives are in `autograd.py`.
"""

import functools
import importlib
import importlib.util
from pathlib import Path

import torch

from . import cpu

SCHEMAS = {
    "expand": "(Tensor table, SymInt i, SymInt j, SymInt offset, bool signed, ScalarType dtype) -> Tensor",
    "reduce": "(Tensor dbias, SymInt n, SymInt offset, bool signed, ScalarType dtype) -> Tensor",
}
# A backend's operators; "" is the dispatcher's choice, which on the CPU is "cpp" whenever that is available.
SUFFIXES = {"torch": "_torch", "triton": "_triton", "cuda": "_cuda", "cpp": ""}

LIBRARY = torch.library.Library("dpb_triton", "DEF")


def has_triton() -> bool:
    """Whether Triton can be imported; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Whether the kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1 when they were first imported)."""
    from .kernels import expand as kernels

    return kernels.IS_INTERPRETED


def reason_left() -> str:
    """What `setup.py` left beside the package for what it did not build, behind a colon; or nothing."""
    path = Path(__file__).with_name("_C.txt")
    return f": {path.read_text().strip()}" if path.exists() else ""


def load_csrc() -> str | None:
    """Load the compiled half (csrc/). None, or why it is not there: the reason that `setup.py` left, if it did."""
    try:
        importlib.import_module("dpb_triton._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and reason_left():
            return "the compiled extension was not built" + reason_left()
        return f"the compiled extension is not loaded: {error}"
    return None


@functools.cache
def why_no_csrc(backend: str) -> str | None:
    """None if the compiled half holds `backend` ("cpp" or "cuda"), else the reason."""
    key = {"cpp": "CPU", "cuda": "CUDA"}[backend]
    if CSRC_ERROR or torch._C._dispatch_has_kernel_for_dispatch_key(f"dpb_triton::expand{SUFFIXES[backend]}", key):
        return CSRC_ERROR
    return f"the compiled extension was built without {key} kernels{reason_left()}"


def call(name: str, suffix: str, *args):
    """An operator of a backend, below autograd, which the caller has seen to.

    Not through autograd's key, whose kernel is in Python: that detour costs as much as a small operator. And where
    nobody but us would see the operator, not through the dispatcher either, which takes 7 to 15 microseconds to turn 15
    to 30 arguments into its own values and back.
    """
    if torch.compiler.is_compiling():
        return OPERATORS[name + suffix](*args)
    function = DIRECT.get((name + suffix, args[0].device.type))
    with torch._C._AutoDispatchBelowAutograd():
        if function is None or _is_seen(args):
            function = OPERATORS[name + suffix]
        return function(*args)


def _is_seen(args):
    """Whether a mode, a transform, a trace, a profiler or a tensor's class wants to know of operators.

    Or a tensor's memory holds its negative, as that of `z.conj().imag` does: the dispatcher negates it.
    """
    if (
        not _PLAIN.issuperset(map(type, args))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    for arg in args:  # noqa: SIM110 (`any` takes three times as long)
        if type(arg) in _TENSORS and arg.is_neg():
            return True
    return False


def _triton_expand(table, i, j, offset, signed, dtype):
    from .kernels import expand as kernels

    with torch.cuda.device_of(table):
        return kernels.expand(table, i, j, offset, signed, dtype)


def _triton_reduce(dbias, n, offset, signed, dtype):
    from .kernels import expand as kernels

    with torch.cuda.device_of(dbias):
        return kernels.reduce(dbias, n, offset, signed, dtype)


def _fake_expand(table, i, j, offset, signed, dtype):
    return table.new_empty((table.shape[0], i, j), dtype=dtype)


def _fake_reduce(dbias, n, offset, signed, dtype):
    # 2 n - 1 columns, none for n = 0; a symbolic n is never 0 (torch specialises 0 and 1)
    width = 2 * n - 1 if signed and not (isinstance(n, int) and n == 0) else n
    return dbias.new_empty((dbias.shape[0], width), dtype=dtype)


TORCH = {"expand": cpu.expand, "reduce": cpu.reduce}
TRITON = {"expand": _triton_expand, "reduce": _triton_reduce}
FAKE = {"expand": _fake_expand, "reduce": _fake_reduce}

OPERATORS = {}
# {(operator, device type): the function in Python that the dispatcher would come to}
DIRECT = {}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_PLAIN = _TENSORS | {int, float, bool, torch.dtype, type(None)}

for _name, _schema in SCHEMAS.items():
    for _suffix in SUFFIXES.values():
        LIBRARY.define(_name + _suffix + _schema)
        torch.library.register_fake(f"dpb_triton::{_name}{_suffix}", FAKE[_name], lib=LIBRARY)
        OPERATORS[_name + _suffix] = getattr(torch.ops.dpb_triton, _name + _suffix).default
    LIBRARY.impl(_name, TORCH[_name], "CompositeExplicitAutograd")
    LIBRARY.impl(_name + "_torch", TORCH[_name], "CompositeExplicitAutograd")
    LIBRARY.impl(_name + "_triton", TRITON[_name], "CompositeExplicitAutograd")
    DIRECT |= {(_name + "_triton", _device): TRITON[_name] for _device in ("cpu", "cuda")}

# The compiled kernels claim the CPU key of `expand` and `reduce` and the CUDA key of `…_cuda` when they are loaded.
CSRC_ERROR = load_csrc()

for _name in SCHEMAS:
    if has_triton():
        LIBRARY.impl(_name, TRITON[_name], "CUDA")
        DIRECT[_name, "cuda"] = TRITON[_name]
    elif why_no_csrc("cuda") is None:
        LIBRARY.impl(_name, OPERATORS[_name + "_cuda"], "CUDA")
