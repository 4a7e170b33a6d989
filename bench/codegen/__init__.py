# SPDX-License-Identifier: MIT
"""`python -m bench codegen`: compile the kernels for GPUs that are not here and check the machine code."""
