# SPDX-License-Identifier: MIT
"""csrc/: the CUDA kernels' threads on the host, the CPU kernels under sanitizers, compiler warnings, generated code.

The tests that take the fixture `backend` check that the backends agree.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from quick import slow

from dpb_triton import dispatch, expand_bias
from dpb_triton.dispatch import why_not

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SETUP = runpy.run_path(str(ROOT / "setup.py"))  # its constants
CXX = os.environ.get("CXX", "c++")
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})")


def run(*command, **environment):
    command = [str(part) for part in command]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"} | environment  # spinning threads take each other's cores
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"[-6000:]
    return done.stdout


def torch_options(*flags):
    """The compiler's options for a source that includes torch's headers, and the linker's for a shared library."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    macros = [f"-D{name}={value}" for name, value in SETUP["MACROS"]]
    options = [*SETUP["CXX_FLAGS"], *macros, "-fPIC", "-DPy_LIMITED_API=0x030a0000", *WARNINGS, *flags]
    libraries = [part for path in library_paths() for part in ("-L", path)]
    isystem = [part for path in includes for part in ("-isystem", path)]
    return [*options, *isystem], ["-shared", *libraries, "-ltorch_cpu", "-lc10"]


# The sources that read a macro; all of them read any other flag.
READERS = {"-DDPB_MOST": ["attention_cpu", "expand_cpu", "reduce_cpu"], "-DDPB_AMX_EMULATED": ["attention_amx"]}
OBJECTS = {}


def build_extension(folder, *flags):
    """Copy the package and compile its extension with `flags`; returns the folder for PYTHONPATH."""
    package = folder / "dpb_triton"
    shutil.copytree(ROOT / "dpb_triton", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    options, linker = torch_options(*flags)

    def compiled(source):
        """The object of a source. Builds whose flags differ only in what it does not read share it."""
        path = folder / f"{source.stem}.o"
        key = source.stem, *(flag for flag in flags if source.stem in READERS.get(flag.split("=")[0], [source.stem]))
        if key not in OBJECTS:
            run(CXX, *options, "-c", source, "-o", path)
            OBJECTS[key] = path
        return OBJECTS[key]

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sorted(CSRC.glob("*.cpp"))))
    run(CXX, *flags, *objects, *linker, "-o", package / "_C.abi3.so")
    return str(folder)


@pytest.fixture
def cpp():
    reason = why_not("cpp", "cpu")
    if reason is not None:
        pytest.skip(f"backend cpp: {reason}")


@pytest.fixture(scope="module")
def band_test(tmp_path_factory):
    """The compiled program of band_test.cpp."""
    path = tmp_path_factory.mktemp("csrc") / "band_test"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    source = ROOT / "tests/csrc/band_test.cpp"
    run(CXX, "-std=c++17", "-O2", *WARNINGS, *sanitizers, f"-I{CSRC}", source, "-o", path)
    return path


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_every_thread_of_the_cuda_kernels_on_the_host(band_test, seed):
    assert run(band_test, seed) == "4266 cases\n"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A function that runs Python between guard pages (guard.c): no access beyond an end of a tensor passes."""
    if sys.platform != "linux":
        pytest.skip("guard.c is written for Linux")
    guard = tmp_path_factory.mktemp("guard") / "guard.so"
    run(os.environ.get("CC", "cc"), "-O2", *WARNINGS, "-shared", "-fPIC", ROOT / "tests/csrc/guard.c", "-o", guard)
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests/csrc", "tests/support"))
    python = sys.executable, "-X", "faulthandler"
    return lambda *arguments: run(*python, *arguments, PYTHONPATH=paths, LD_PRELOAD=str(guard))


@needs_compiler
def test_the_cuda_file_on_the_host(tmp_path):
    """All of band_cuda.cu, kernels, launches and checks, compiled for CPU tensors: see cuda_on_host/cuda_runtime.h."""
    source, launches = re.subn(
        r"(\w+(?:<[\w, ]+>)?)<<<(.+?)>>>\(", r"cuda_on_host::launch(\2, [](auto... a) { \1(a...); })(",
        (CSRC / "band_cuda.cu").read_text(),
    )  # fmt: skip
    source, registrations = re.subn(r"\(dpb_triton, CUDA, library\)", "(dpb_triton, CPU, library)", source)
    source, checks = re.subn(r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);", "", source)
    assert (launches, registrations, checks) == (4, 1, 3)
    (tmp_path / "band.cpp").write_text(source)
    aligned = "-fsanitize=alignment", "-fno-sanitize-recover"  # a GPU stops at a misaligned vector
    options, linker = torch_options("-O1", *aligned, f"-I{CSRC}", f"-I{ROOT / 'tests/csrc/cuda_on_host'}")
    run(CXX, *options, tmp_path / "band.cpp", *aligned, *linker, "-o", tmp_path / "band.so")
    out = run(sys.executable, ROOT / "tests/csrc/fuzz.py", 500, 3, tmp_path / "band.so", PYTHONPATH=str(ROOT))
    assert int(out.split()[0]) > 120, out


@needs_compiler
def test_random_calls_between_guard_pages(cpp, guarded):
    """All results of the installed extension are right."""
    out = guarded("-c", "import fuzz, fuzz_cuts; fuzz.main(1000, 7); fuzz_cuts.main(60, 7)")
    accepted, *_, calls, _, _ = out.split()
    assert int(accepted) > 250 and int(calls) > 150, out


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build_extension` in a folder of its own, once for the same flags."""
    return cache(lambda *flags: build_extension(tmp_path_factory.mktemp("build"), *flags))


@pytest.fixture
def sanitized(build):
    """A function that runs a program of this folder with arguments, on a build with AddressSanitizer."""
    if sys.platform != "linux":
        pytest.skip("the test preloads gcc's AddressSanitizer")
    path = build("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover", "-fno-omit-frame-pointer")
    preload = " ".join(run(CXX, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so"))
    options = "detect_leaks=0:allocator_may_return_null=1"

    def run_program(name, *arguments):
        command = sys.executable, ROOT / "tests/csrc" / name, *arguments
        return run(*command, PYTHONPATH=path, LD_PRELOAD=preload, ASAN_OPTIONS=options)

    return run_program


@pytest.mark.slow
@needs_compiler
def test_random_calls_under_address_sanitizer(sanitized):
    out = sanitized("fuzz.py", 5_000, 7)
    accepted, _, calls = out.split()[:3]
    assert calls == "5000" and 1200 < int(accepted) < 4500, out


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("program", "count"), [("fuzz_cuts.py", 60), ("fuzz_attention.py", 15)])
def test_random_attention_under_address_sanitizer(program, count, sanitized):
    assert int(sanitized(program, count, 7).split()[0]) > count


# The flags of a build that uses at most that instruction set, and whether this processor has it.
INSTRUCTION_SETS = {
    "baseline": (["-DDPB_BASELINE"], lambda: True),
    "avx2": (["-DDPB_MOST=avx2"], lambda: torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")),
    "avx512": (["-DDPB_MOST=avx512"], lambda: torch.backends.cpu.get_cpu_capability() == "AVX512"),
    "avx512_bf16, beside AMX": (["-DDPB_MOST=avx512_bf16"], torch.cpu._is_amx_tile_supported),
    "amx, emulated": (["-DDPB_AMX_EMULATED"], torch.cpu._is_avx512_bf16_supported),
}


@pytest.fixture(scope="module")
def build_for(build):
    """A function that returns the folder of a build for an instruction set, or skips if the processor lacks it."""

    def of(name):
        flags, is_here = INSTRUCTION_SETS[name]
        if not is_here():
            pytest.skip(f"this processor has no {name}")
        return build(*flags)

    return of


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_random_calls_with_each_instruction_set(name, build_for):
    """The sets round differently; each result is within the budget of the definition."""
    for program, calls in (("fuzz.py", 250), ("fuzz_cuts.py", 30), ("fuzz_attention.py", 15)):
        out = run(sys.executable, ROOT / "tests/csrc" / program, calls, 3, PYTHONPATH=build_for(name))
        assert int(out.split()[0]) > calls // 10


SAME_BITS = """
import sys, torch
from dpb_triton import dispatch
torch.manual_seed(0)
found = []
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for shape in ((3, 65, 130), (8, 300, 301), (1, 1200, 77)):
        for dbias in (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).mT.contiguous().mT):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(dispatch.OPERATORS["reduce"](dbias, 1300, shape[2] - shape[1], True, dtype))
torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_same_bits_with_any_threads_and_instruction_set(name, build_for, tmp_path):
    """Each instruction set gives the bits of its architecture's baseline; 2 threads give the bits of 1."""
    results = []
    for each in (name, "baseline"):
        run(sys.executable, "-c", SAME_BITS, tmp_path / f"{each}.pt", PYTHONPATH=build_for(each))
        results.append(torch.load(tmp_path / f"{each}.pt"))
    ours, baseline = results
    assert len(ours) == 48
    for mine, theirs in zip(ours, baseline, strict=True):
        assert torch.equal(mine, theirs)
    for one, two in zip(ours[::2], ours[1::2], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("expand", (torch.ones(3), 2, 2, 0, False, torch.float32), "table must have 2 dimensions, got 1"),
        ("expand", (torch.ones(1, 3).int(), 2, 2, 0, False, torch.float32), "table must be float16"),
        ("expand", (torch.ones(1, 3), -2, 2, 0, False, torch.float32), "i must be between 0 and 2^60, got -2"),
        ("expand", (torch.ones(1, 3), 2, 2, 0, False, torch.int64), "dtype must be float16"),
        ("expand", (torch.ones(1, 3), 2, 4, 2, False, torch.float32), "need distances up to 3, the table holds 0 to 2"),
        ("expand", (torch.ones(1, 4), 2, 2, 0, True, torch.float32), "odd number of columns (2 n - 1), got 4"),
        ("expand", (torch.ones(1, 3), 2, 2, -(2**62), False, torch.float32), "offset must be between"),
        ("expand", (torch.ones(1, 1).expand(1, 2**40), 2**40, 2**40, 0, False, torch.float32), "more than memory can"),
        ("expand", (torch.ones(16, 3), 2**60, 0, 0, False, torch.float32), "more than memory can"),
        ("expand", (torch.ones(0, 2**60), 2**60, 2**60, 0, False, torch.float32), "more than memory can"),
        ("expand", (torch.ones(1, 1).expand(1, 2**30), 2**30, 2**30, 0, False, torch.float32), "cannot allocate 46116"),
        ("reduce", (torch.ones(1, 3, 3), 2**60, 0, False, torch.float64), "more than memory can"),
        ("reduce", (torch.ones(3, 3), 3, 0, False, torch.float32), "dbias must have 3 dimensions, got 2"),
        ("reduce", (torch.ones(1, 3, 3), 2, 0, False, torch.float32), "need distances up to 2, the table holds 0 to 1"),
        ("reduce", (torch.ones(1, 3, 3), -1, 0, False, torch.float32), "n must be between"),
    ],
)
def test_a_direct_call_with_nonsense_is_refused(cpp, name, arguments, words):
    with pytest.raises(RuntimeError) as caught:
        dispatch.OPERATORS[name](*arguments)
    assert words in str(caught.value)


def test_a_freed_storage_is_refused(cpp):
    table = torch.ones(2, 5)
    table.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has its storage been freed"):
        expand_bias(table, 3, 3)


@pytest.mark.slow
def test_more_than_2_to_31_elements(cpp):
    """A bias of 4 GiB, and the sums of its diagonals."""
    i, j = 2**16 + 1, 2**15 + 8
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 * 2**30:
        pytest.skip("too little free memory")
    table = torch.randint(-2, 3, (1, i)).half()
    bias = dispatch.OPERATORS["expand"](table, i, j, 0, False, torch.float16)
    for x in (0, 1, j, i // 2, i - 40, i - 2, i - 1):
        assert torch.equal(bias[0, x], table[0, (x - torch.arange(j)).abs()])
    dtable = dispatch.OPERATORS["reduce"](bias, i, 0, True, torch.float32)
    distance = torch.arange(1 - i, i)
    pairs = (distance.clamp(max=0) + j).clamp(0) - (distance + j - i).clamp(0)
    assert torch.equal(dtable[0], table[0, distance.abs()] * pairs.float())


def test_half_conversions_are_exact(cpp):
    """Every float16 number, each alone at its distance."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    dtable = dispatch.OPERATORS["reduce"](every.view(1, 1, -1), 2**16, 0, False, torch.float32)
    assert torch.equal(dtable[0].nan_to_num(7.0), every.float().nan_to_num(7.0))
    assert torch.equal(dtable[0].isnan(), every.isnan())


@pytest.fixture(scope="module")
def nvcc():
    pytest.importorskip("triton", reason="Triton's wheel holds the disassembler")
    from bench.codegen import cuda as codegen_cuda

    if codegen_cuda.nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME")
    return codegen_cuda


@pytest.mark.parametrize("arch", ["sm_90", *map(slow, ("sm_80", "sm_100", "sm_120"))])  # no list has sm_120
def test_cuda_kernels_compile_and_keep_their_promises(nvcc, arch):
    """No kernel spills, and the interior loops use 16-byte accesses only."""
    from bench.codegen.promises import broken

    records = nvcc.compile_cuda([arch], 2)
    assert not [record for record in records if "error" in record], records[0]
    assert len(records) == 3 + 14 + 8
    for record in records:
        assert (record["spills"], record["stack"]) == (0, 0), record
        if record["streams"]:
            access = record["streams"] + ".128"
            assert record["interior"]["counts"] == {access: record["interior"]["counts"][access]}, record
        assert broken(record) == []


@pytest.mark.slow
def test_cuda_kernels_link(nvcc, tmp_path):
    run(*nvcc.compile_command(tmp_path / "band.o", "-c", "-arch=sm_90"))
    home = Path(nvcc.nvcc()).resolve().parents[1]
    home = home if (home / "include/cuda_runtime.h").exists() else Path("/usr/local/cuda")
    run(CXX, "-shared", tmp_path / "band.o", f"-L{home}/lib64", "-lcudart", "-o", tmp_path / "band.so")
