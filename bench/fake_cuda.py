# SPDX-License-Identifier: MIT
"""A fake CUDA driver: Triton compiles, loads and launches as on an H100, and the launch does nothing.

All of Triton is real, its C launcher too; only `libcuda.so.1` below it comes from this file. So it shows without a GPU
what a launch costs the host and what the driver would be given. `install().take()` returns the launches since the last
call, each with the grid and the bytes of every parameter of the kernel, as its PTX declares them. A tensor map holds
the arguments it was encoded from. Like a real driver it refuses grids, blocks and tensor maps beyond the limits.
Tensors lie in the CPU's memory. Needs a C compiler, as Triton does.

Install it before a process first uses Triton; it cannot be removed again.
"""

import ctypes
import functools
import itertools
import os
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SHARED_BYTES = 227 * 1024  # at most, per block
WORDS = 256  # of 8 bytes each, for all parameters of a launch
MAP = "b1024"  # PTX declares a tensor map as an array of 128 bytes
POINTER = "p64"

# Attribute numbers, types and errors come from cuda.h.
SOURCE = r"""
#include <stdint.h>
#include <string.h>
#include "cuda.h"
enum { PARAMETERS = 192, WORDS = %(words)d, LAUNCHES = 4096, FUNCTIONS = 8192, SHARED = %(shared)d };
typedef struct { uint64_t function, grid[3], threads, shared, values[WORDS]; } Launch;
Launch fake_launches[LAUNCHES];
int fake_count = 0, fake_is_recording = 1, fake_maps = 0;
static unsigned char sizes[FUNCTIONS][PARAMETERS];
static uintptr_t functions = 0;

void fake_declare(uintptr_t function, int count, const unsigned char *bytes) { memcpy(sizes[function], bytes, count); }

static CUresult launch(const CUlaunchConfig *config, CUfunction f, void **parameters) {
  uint64_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  if (grid[0] < 1 || grid[0] > 0x7fffffff || grid[1] < 1 || grid[1] > 65535 || grid[2] < 1 || grid[2] > 65535 ||
      config->blockDimX > 1024 || config->sharedMemBytes > SHARED)
    return CUDA_ERROR_INVALID_VALUE;
  if (!fake_is_recording) return CUDA_SUCCESS;
  if (fake_count == LAUNCHES) return CUDA_ERROR_OUT_OF_MEMORY;
  Launch *it = &fake_launches[__atomic_fetch_add(&fake_count, 1, __ATOMIC_RELAXED)];  // threads launch concurrently
  memset(it, 0, sizeof *it);
  it->function = (uintptr_t)f;
  memcpy(it->grid, grid, sizeof grid);
  it->threads = config->blockDimX;
  it->shared = config->sharedMemBytes;
  uint64_t *value = it->values;
  for (int n = 0; n < PARAMETERS && sizes[it->function][n]; n++) {
    memcpy(value, parameters[n], sizes[it->function][n]);
    value += (sizes[it->function][n] + 7) / 8;
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **parameters, void **extra) {
  return launch(config, f, parameters);
}
// Keeps its arguments in the order of TensorMap below; the limits come from cuda.h's documentation.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t *words = (uint64_t *)map;
  if (rank < 1 || rank > 5 || !address || (uintptr_t)address %% 16) return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  words[0] = (uintptr_t)address;
  words[1] = type | rank << 8 | interleave << 16 | swizzle << 24 | (uint64_t)promotion << 32 | (uint64_t)fill << 40;
  for (cuuint32_t n = 0; n < rank; n++) {
    if (sizes[n] < 1 || sizes[n] > (1ull << 32) || box[n] < 1 || box[n] > 256 || steps[n] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    words[2 + n] = sizes[n];
    words[11 + n] = box[n];
    if (n + 1 == rank) continue;
    if (strides[n] %% 16 || strides[n] >= (1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
    words[7 + n] = strides[n];
  }
  fake_maps++;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = SHARED + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 65536;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  if (++functions >= FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  *f = (CUfunction)functions;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "error";
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
"""
# functions that Triton's C code names and that nothing here calls
UNUSED = (
    "cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuDeviceGet", "cuDevicePrimaryCtxRetain",
    "cuOccupancyMaxActiveClusters", "cuPointerGetAttributes", "cuStreamIsCapturing", "cuTensorMapEncodeIm2col",
)  # fmt: skip


@dataclass(frozen=True)
class TensorMap:
    """The arguments of cuTensorMapEncodeTiled; the innermost dimension comes first, strides are in bytes."""

    address: int
    kind: tuple[int, ...]  # type, rank, interleave, swizzle, promotion, fill
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """A launch as the driver was given it."""

    kernel: str
    function: int  # the handle of the loaded binary
    grid: tuple[int, int, int]
    threads: int
    shared: int  # bytes
    types: tuple[str, ...]  # of the parameters, as PTX writes them: u64, u32, f32, …; POINTER, MAP
    values: tuple[object, ...]  # numbers and TensorMaps


def _build(folder, include):
    source = Path(folder, "fake.c")
    unused = (f'int no_{name}(void) __asm__("{name}");\nint no_{name}(void) {{ return 801; }}\n' for name in UNUSED)
    source.write_text(SOURCE % {"shared": SHARED_BYTES, "words": WORDS} + "".join(unused))
    library = Path(folder, "libcuda.so.1")
    command = [os.environ.get("CC", "gcc"), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
    return library


class FakeCuda:
    """The library, and what it recorded."""

    def __init__(self, library):
        self.library = library
        self.functions = {}  # handle: (kernel, types)

    def declare(self, module, function, name, files, digest):
        """Triton's hook after loading a binary: tells the library how long the kernel's parameters are."""
        (ptx,) = (Path(path).read_text() for file, path in files.items() if file.endswith(".ptx"))
        head = ptx[ptx.index(".entry") :]
        found = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)( \.ptr)?[^,\[]*(?:\[(\d+)\])?", head[: head.index(")")])
        types = tuple(f"b{8 * int(length)}" if length else POINTER if ptr else kind for kind, ptr, length in found)
        assert sum(-(-int(kind[1:]) // 64) for kind in types) <= WORDS
        self.functions[function] = name, types
        sizes = bytes(int(kind[1:]) // 8 for kind in types)
        self.library.fake_declare(ctypes.c_size_t(function), len(sizes), sizes)

    def record(self, is_recording):
        """Set whether launches are recorded from now on; there is room for 4096 of them."""
        ctypes.c_int.in_dll(self.library, "fake_is_recording").value = is_recording

    def take(self):
        """The launches since the last call."""
        count = ctypes.c_int.in_dll(self.library, "fake_count")
        words = 6 + WORDS
        rows = (ctypes.c_uint64 * (words * count.value)).in_dll(self.library, "fake_launches")
        found = [self._launch(rows[start : start + words]) for start in range(0, len(rows), words)]
        count.value = 0
        return found

    def maps(self):
        """How many tensor maps were encoded since the last call."""
        count = ctypes.c_int.in_dll(self.library, "fake_maps")
        found, count.value = count.value, 0
        return found

    def _launch(self, row):
        function, x, y, z, threads, shared, *words = row
        kernel, types = self.functions[function]
        words = iter(words)
        values = tuple(_value(kind, list(itertools.islice(words, -(-int(kind[1:]) // 64)))) for kind in types)
        return Launch(kernel, function, (x, y, z), threads, shared, types, values)


def _value(kind, words):
    """A parameter's value; PTX writes u for ints of either sign."""
    if kind == MAP:
        address, packed, *rest = words
        rank = packed >> 8 & 255
        parts = rest[:rank], rest[5 : 4 + rank], rest[9 : 9 + rank]
        return TensorMap(address, tuple(packed.to_bytes(8, "little")[:6]), *map(tuple, parts))
    data = words[0].to_bytes(8, "little")
    codes = {"f32": "f", "f64": "d", "u8": "b", "u16": "h", "u32": "i", "u64": "q", POINTER: "q"}
    return struct.unpack_from("<" + codes[kind], data)[0]


@functools.cache
def install():
    """Make this Triton's driver in this process, with tensors on the CPU; returns the FakeCuda."""
    import triton
    from triton.backends.nvidia import driver as nvidia

    folder = tempfile.mkdtemp(prefix="dpb_triton_fake_cuda_")
    library = _build(folder, Path(nvidia.__file__).parent / "include")
    fake = FakeCuda(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))  # the loader now finds it by its name
    triton.knobs.nvidia.libcuda_path = folder

    driver = nvidia.CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=0: (9, 0)
    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.kernel_load_end_hook.add(fake.declare)
    return fake


def let_cpu_tensors_through():
    """`install`, and let backend "triton" serve CPU tensors in this process; returns the FakeCuda."""
    from dpb_triton import dispatch

    fake = install()
    dispatch.why_not = lambda backend, device_type: None
    return fake
