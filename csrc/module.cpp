// SPDX-License-Identifier: MIT
// dpb_triton._C: loading it registers the CPU kernels for the operators that dpb_triton/expand/ops.py defines. It uses
// only torch's stable ABI and Python's limited API, so one binary serves every Python >= 3.10 and torch >= 2.10.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <string>

#include "attention_cpu.h"
#include "cpu.h"

STABLE_TORCH_LIBRARY_IMPL(dpb_triton, CPU, library) {
  library.impl("expand", TORCH_BOX(&dpb_triton::expand_cpu));
  library.impl("reduce", TORCH_BOX(&dpb_triton::reduce_cpu));
}

namespace {

// Reads the arguments of a call from Python one by one: numbers, and addresses as numbers.
struct Arguments {
  PyObject* const* next;

  void read(int64_t& to) {
    to = PyLong_AsLongLong(*next++);
  }
  void read(float& to) {
    to = static_cast<float>(PyFloat_AsDouble(*next++));
  }
  template <class T>
  void read(T*& to) {
    to = static_cast<T*>(PyLong_AsVoidPtr(*next++));
  }
  void read(dpb_triton::Rows& to) {
    read_all(to.data, to.batch, to.head, to.row);
  }
  void read(dpb_triton::Attention& to) {
    read_all(to.query, to.key, to.value, to.out, to.lse, to.largest, to.table, to.table_width, to.table_head,
             to.table_column, to.table_zero, to.key_bias, to.key_bias_batch, to.seqlens, to.sequences, to.batch,
             to.heads, to.kv_heads, to.i, to.j, to.dim, to.value_dim, to.dtype, to.offset, to.is_signed, to.left,
             to.right, to.threads, to.scale, to.softcap, to.keep_factor, to.seed, to.threshold, to.number_stride);
  }
  void read(dpb_triton::BackwardCall& to) {
    dpb_triton::Gradients& g = to.gradients;
    read_all(to.attention, g.dout, g.dquery, g.dkey, g.dvalue, g.dlse, g.dtable, g.dkey_bias);
  }
  template <class... T>
  void read_all(T&... to) {
    (read(to), ...);
  }
};

constexpr Py_ssize_t FORWARD_ARGUMENTS = 46, BACKWARD_ARGUMENTS = FORWARD_ARGUMENTS + 19;

// dpb_triton/attention/cpp_path.py makes these calls. It has checked dtypes and shapes, and `completed` in
// attention_cpu.cpp checks what these alone do not make safe.
template <class Call, Py_ssize_t COUNT, bool (*compute)(const Call&)>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != COUNT) {
    return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", COUNT, count);
  }
  Call values{};
  Arguments{arguments}.read(values);
  if (PyErr_Occurred() != nullptr) {
    return nullptr;
  }
  bool is_finite = false;
  std::string error;
  Py_BEGIN_ALLOW_THREADS;
  try {
    is_finite = compute(values);
  } catch (const std::exception& failure) {
    error = failure.what();
  }
  Py_END_ALLOW_THREADS;
  if (!error.empty()) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  return PyBool_FromLong(is_finite);
}

template <class Call, Py_ssize_t COUNT, bool (*compute)(const Call&)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<Call, COUNT, compute>)), METH_FASTCALL,
          nullptr};
}

}  // namespace

// Its import loads the library. The attention kernels are plain functions, because a call of an operator with 40
// arguments costs more than a small attention.
PyMODINIT_FUNC PyInit__C() {
  using namespace dpb_triton;
  static PyMethodDef methods[] = {
      method<Attention, FORWARD_ARGUMENTS, &attention_forward>("attention_forward"),
      method<BackwardCall, BACKWARD_ARGUMENTS, &attention_backward>("attention_backward"),
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   nullptr,
                                   -1,
                                   has_attention() ? methods : nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
