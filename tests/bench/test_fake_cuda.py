# SPDX-License-Identifier: MIT
"""The fake driver by itself: what it records of a launch and of a tensor map, and what it refuses as a GPU would."""

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton's wheel has cuda.h")
pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "gcc")) is None, reason="there is no C compiler")

from bench import fake_cuda  # noqa: E402
from bench.fake_cuda import SHARED_BYTES, FakeCuda, TensorMap, _value  # noqa: E402


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    from triton.backends import nvidia

    include = Path(next(iter(nvidia.__path__)), "include")
    return ctypes.CDLL(str(fake_cuda._build(tmp_path_factory.mktemp("fake"), include)))


def test_a_driver_that_does_not_compile_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(subprocess.CalledProcessError, match="non-zero exit status 1"):
        fake_cuda._build(tmp_path, tmp_path)


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    ]  # fmt: skip


PTX = """.version 8
.visible .entry _k(
	.param .u64 .ptr .global .align 1 _k_param_0,
	.param .u32 _k_param_1,
	.param .f32 _k_param_2,
	.param .align 64 .b8 _k_param_3[128],
	.param .u16 _k_param_4
)
{"""


def launch(library, function, parameters, grid=(1, 1, 1), threads=128, shared=0):
    pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(x) for x in parameters))
    config = Config(*grid, threads, 1, 1, shared, None, None, 0)
    return library.cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)


def encode(library, address=64, sizes=(5, 7), strides=(16,), box=(8, 256), steps=(1, 1), rank=None):
    """(the error, the words of the map)."""
    found = (ctypes.c_uint64 * 16)()
    arrays = [(kind * len(x))(*x) for kind, x in (
        (ctypes.c_uint64, sizes), (ctypes.c_uint64, strides), (ctypes.c_uint32, box), (ctypes.c_uint32, steps),
    )]  # fmt: skip
    rank = len(sizes) if rank is None else rank
    return library.cuTensorMapEncodeTiled(found, 9, rank, ctypes.c_void_p(address), *arrays, 0, 3, 2, 1), found


def test_a_launch_is_recorded_with_its_parameters(library, tmp_path):
    fake = FakeCuda(library)
    (tmp_path / "k.ptx").write_text(PTX)
    fake.declare(None, 5, "_k", {"k.ptx": tmp_path / "k.ptx", "k.json": None}, None)
    error, described = encode(library)
    assert error == 0 and fake.maps() == 1 and fake.maps() == 0
    parameters = (ctypes.c_uint64(4096), ctypes.c_int32(-3), ctypes.c_float(0.5), described, ctypes.c_int16(-7))
    assert launch(library, 5, parameters, (2, 3, 4), 256, 1024) == 0
    (found,) = fake.take()
    assert (found.kernel, found.function, found.grid, found.threads, found.shared) == ("_k", 5, (2, 3, 4), 256, 1024)
    assert found.types == ("p64", "u32", "f32", "b1024", "u16")
    map_ = TensorMap(64, (9, 2, 0, 3, 2, 1), (5, 7), (16,), (8, 256))
    assert found.values == (4096, -3, 0.5, map_, -7) and fake.take() == []
    fake.record(False)
    launch(library, 5, parameters)
    fake.record(True)
    assert fake.take() == []


MOST = {"grid": (2**31 - 1, 65535, 65535), "threads": 1024, "shared": SHARED_BYTES}


@pytest.mark.parametrize(
    "more",
    [
        {"grid": (2**31, 1, 1)}, {"grid": (1, 65536, 1)}, {"grid": (1, 1, 65536)}, {"grid": (0, 1, 1)},
        {"grid": (1, 0, 1)}, {"grid": (1, 1, 0)}, {"threads": 1025}, {"shared": SHARED_BYTES + 1},
    ],
    ids=str,
)  # fmt: skip
def test_launches_beyond_the_limits(library, more):
    library.fake_declare(ctypes.c_size_t(6), 0, b"")
    fake = FakeCuda(library)
    fake.functions[6] = "_k", ()
    assert launch(library, 6, (), **MOST) == 0 and launch(library, 6, (), **(MOST | more)) == 1
    assert len(fake.take()) == 1


@pytest.mark.parametrize(
    ("kind", "packed", "value"),
    [("f64", "<d", -0.25), ("f32", "<f", 1.5), ("u64", "<q", -(2**40)), ("u32", "<i", -5), ("u16", "<h", -7),
     ("u8", "<b", -1), ("p64", "<q", 2**47 - 16)],
)  # fmt: skip
def test_values_of_every_type(kind, packed, value):
    data = struct.pack(packed, value)
    assert _value(kind, [int.from_bytes(data, "little")]) == value


def test_parameters_that_fill_no_word_and_more_than_one_are_recorded(library, tmp_path):
    parameters = ", ".join([".param .u8 a", ".param .align 4 .b8 b[128]", ".param .f64 c", ".param .u16 d"])
    (tmp_path / "k.ptx").write_text(f".entry _k({parameters})")
    fake = FakeCuda(library)
    fake.declare(None, 7, "_k", {"k.ptx": tmp_path / "k.ptx"}, None)
    error, described = encode(library)
    assert launch(library, 7, (ctypes.c_int8(-2), described, ctypes.c_double(0.1), ctypes.c_int16(300))) == error == 0
    (found,) = fake.take()
    assert (found.values[0], *found.values[2:]) == (-2, 0.1, 300) and found.values[1].sizes == (5, 7)


FIVE = {"sizes": (2**32, 1, 1, 1, 1), "strides": (2**40 - 16, 16, 16, 16), "box": (256,) * 5, "steps": (1,) * 5}


@pytest.mark.parametrize(
    "more",
    [
        {"rank": 0}, {"rank": 6}, {"address": 0}, {"address": 72}, {"sizes": (2**32 + 1, 1, 1, 1, 1)},
        {"sizes": (1, 0, 1, 1, 1)}, {"strides": (2**40, 16, 16, 16)}, {"strides": (16, 24, 16, 16)},
        {"box": (256, 257, 1, 1, 1)}, {"box": (0, 1, 1, 1, 1)}, {"steps": (1, 1, 1, 1, 2)},
    ],
    ids=str,
)  # fmt: skip
def test_tensor_maps_beyond_the_limits(library, more):
    error, words = encode(library, **FIVE)
    assert error == 0
    found = _value("b1024", list(words))
    assert (found.sizes, found.strides, found.box) == (FIVE["sizes"], FIVE["strides"], FIVE["box"])
    assert encode(library, **(FIVE | more))[0] == 1


def test_there_is_no_room_beyond_the_last_launch_and_the_last_function(library):
    fake = FakeCuda(library)
    fake.functions[9] = "_k", ()
    library.fake_declare(ctypes.c_size_t(9), 0, b"")
    assert [launch(library, 9, ()) for _ in range(4097)] == [0] * 4096 + [2]
    assert len(fake.take()) == 4096 and launch(library, 9, ()) == 0 and len(fake.take()) == 1
    handle, errors = ctypes.c_size_t(), []
    for _ in range(8192):
        errors.append(library.cuModuleGetFunction(ctypes.byref(handle), None, b"_k"))
    assert errors == [0] * 8191 + [2] and handle.value == 8191


def test_what_the_device_says(library):
    def asked(attribute):
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        return value.value

    # shared memory of a block and of a multiprocessor, multiprocessors, lanes of a warp
    assert [asked(number) for number in (97, 81, 16, 10)] == [SHARED_BYTES, SHARED_BYTES + 1024, 132, 32]
