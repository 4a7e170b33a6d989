# SPDX-License-Identifier: MIT
"""A table of distances expanded to a position bias, and the transpose, reduce. A call goes down this list:

    api               expand_bias, its checks
    autograd          expand and reduce are each other's derivative
    ops               the operators, called by `dispatch.call`
    torch_path        plain torch
    triton_kernels    by Triton; ../launching starts a kernel

csrc/ does the same in C++ and CUDA.
"""
