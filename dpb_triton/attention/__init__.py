# SPDX-License-Identifier: MIT
"""Attention that never materialises its bias. A call goes down this list:

    api, paged      the public functions
    checks          checks of their arguments; `key_bias` turns a mask into numbers
    autograd        the derivative, if the caller needs one
    ops             the operators, called by `dispatch.call`
    torch_path      for the CPU, in tiles (`torch_grid`) of plain products (`torch_products`)
    kernels/        in Triton: forward, decode, backward (dkdv, dq, dtable); `launch` prepares a kernel's arguments
    ../launching    starts a kernel

csrc/ contains no attention.
"""
