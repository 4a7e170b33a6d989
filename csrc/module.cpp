// SPDX-License-Identifier: MIT
// dpb_triton._C: loading it registers the CPU kernels under the operators that dpb_triton/expand/ops.py defines. Only
// torch's stable ABI and Python's limited API are used, so that one binary serves every Python >= 3.10, torch >= 2.10.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu.h"

STABLE_TORCH_LIBRARY_IMPL(dpb_triton, CPU, library) {
  library.impl("expand", TORCH_BOX(&dpb_triton::expand_cpu));
  library.impl("reduce", TORCH_BOX(&dpb_triton::reduce_cpu));
}

// A module without contents: importing it is what loads the library.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
