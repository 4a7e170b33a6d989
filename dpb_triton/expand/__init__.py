# SPDX-License-Identifier: MIT
"""Expand a table of distances to a position bias; the transpose is reduce. A call goes down this list:

    api               expand_bias and its checks
    autograd          expand and reduce are each other's derivative
    ops               the operators, called by `dispatch.call`
    torch_path        plain torch
    triton_kernels    in Triton; ../launching starts a kernel

csrc/ does the same in C++ and CUDA.
"""
