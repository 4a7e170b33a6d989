# SPDX-License-Identifier: MIT
"""The operators `dpb_triton::expand` and `dpb_triton::reduce`: schemas, fake kernels, implementations per backend.

`dispatch.py` lists the operator of each backend; csrc/ implements `expand` and `reduce` on the CPU, and `…_cuda`. The
derivatives are in `autograd.py`.
"""

from .. import dispatch
from . import torch_path

_triton_expand = dispatch.on_its_device(f"{__package__}.triton_kernels", "expand")
_triton_reduce = dispatch.on_its_device(f"{__package__}.triton_kernels", "reduce")


def _fake_expand(table, i, j, offset, signed, dtype):
    return table.new_empty((table.shape[0], i, j), dtype=dtype)


def _fake_reduce(dbias, n, offset, signed, dtype):
    # 2 n - 1 columns, or none if n = 0; a symbolic n is never 0 (torch specialises 0 and 1)
    width = 2 * n - 1 if signed and not (isinstance(n, int) and n == 0) else n
    return dbias.new_empty((dbias.shape[0], width), dtype=dtype)


dispatch.define(
    "expand", "(Tensor table, SymInt i, SymInt j, SymInt offset, bool signed, ScalarType dtype) -> Tensor",
    fake=_fake_expand, by_torch=torch_path.expand, by_triton=_triton_expand,
)  # fmt: skip
dispatch.define(
    "reduce", "(Tensor dbias, SymInt n, SymInt offset, bool signed, ScalarType dtype) -> Tensor",
    fake=_fake_reduce, by_torch=torch_path.reduce, by_triton=_triton_reduce,
)  # fmt: skip
