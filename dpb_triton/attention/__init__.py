# SPDX-License-Identifier: MIT
"""Attention whose bias is never materialised. A call goes down this list, and its results come back once:

    api             the public functions
    checks          what they ask of their arguments; `key_bias` turns a mask into numbers
    autograd        the derivative, where one is asked for
    ops             the operators, called by `dispatch.call`
    torch_path      on the CPU, in tiles (`torch_grid`) of plain products (`torch_products`)
    kernels/        by Triton: forward, backward (dkdv, dq, dtable); `launch` turns arguments into a kernel's
    ../launching    starts a kernel

csrc/ has no attention.
"""
