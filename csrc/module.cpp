// SPDX-License-Identifier: MIT
// dpb_triton._C: loading it registers the CPU kernels for the operators that dpb_triton/expand/ops.py defines. It uses
// only torch's stable ABI and Python's limited API, so one binary serves every Python >= 3.10 and torch >= 2.10.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cpu.h"

STABLE_TORCH_LIBRARY_IMPL(dpb_triton, CPU, library) {
  library.impl("expand", TORCH_BOX(&dpb_triton::expand_cpu));
  library.impl("reduce", TORCH_BOX(&dpb_triton::reduce_cpu));
}

// An empty module: its import loads the library.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
