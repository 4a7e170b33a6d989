# SPDX-License-Identifier: MIT
"""`python -m bench codegen`: compile the kernels for GPUs that are not here, read the machine code, keep promises."""
