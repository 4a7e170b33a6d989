# SPDX-License-Identifier: MIT
"""What `bench codegen` catches of a launch, and what it reports of a compiled kernel, without compiling one."""

import contextlib
from collections import namedtuple
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="compiling needs the extra `triton`")

from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bench.codegen import command as codegen_command  # noqa: E402
from bench.codegen import compile as codegen_compile  # noqa: E402
from bench.codegen import cuda as codegen_cuda  # noqa: E402
from bench.codegen.compile import caught_launches, compile_launches, report, target_of  # noqa: E402

Config = namedtuple("Config", "IS_REPAIR SCALE", defaults=(False, 0.5))


def test_targets():
    def found(arch):
        target = target_of(arch)
        return target.backend, target.arch, target.warp_size

    assert [found(arch) for arch in ("sm_90", "sm_100a")] == [("cuda", 90, 32), ("cuda", 100, 32)]
    assert [found(arch) for arch in ("gfx942", "gfx1100")] == [("hip", "gfx942", 64), ("hip", "gfx1100", 32)]
    for arch in ("h100", "sm_", "xsm_90", "sm_90b"):
        with pytest.raises(ValueError, match=f"expected sm_NN or gfxNNN, got '{arch}'"):
            target_of(arch)


@pytest.fixture
def launch(monkeypatch):
    """A launch as Triton would start it. What is compiled for is noted in the kernel."""

    def run(self, *args, warmup, **kwargs):
        assert warmup and triton.knobs.compilation.always_compile and triton.knobs.nvidia.dump_ptxas_log
        print("ptxas says something of", self.fn.__name__)
        active = driver.active
        found = active.get_current_target().arch, active.get_current_device(), active.get_current_stream(0)
        return SimpleNamespace(name=self.fn.__name__, hash=self.fn.__name__, device=found)

    monkeypatch.setattr(JITFunction, "run", run)

    def launch(name, **options):
        JITFunction.run(SimpleNamespace(fn=SimpleNamespace(__name__=name)), warmup=False, **options)

    return launch


@pytest.mark.parametrize(
    ("options", "caught"),
    [
        ({}, ["_a", "_b"]),
        ({"only": ("_b", "_c")}, ["_b"]),
        ({"repairs": True}, ["_c"]),
        ({"repairs": True, "only": ("_a",)}, []),
    ],
)
def test_which_launches_are_caught(launch, options, caught, capsys):
    """A second launch, for programs that met a NaN, counts only where it is asked for."""
    run, before = JITFunction.run, driver.__dict__.get("_active")
    with contextlib.suppress(KeyError), caught_launches("sm_90", **options) as kernels:
        launch("_a"), launch("_b", config=Config()), launch("_c", config=Config(True))
        raise KeyError("of the caller")
    assert [kernel.name for kernel in kernels] == caught
    assert all(kernel.device == (90, 90, 0) for kernel in kernels)  # a kernel cache for each architecture
    assert all(codegen_compile._logs[name] == f"ptxas says something of {name}\n" for name in caught)
    assert JITFunction.run is run and driver.__dict__.get("_active") is before and capsys.readouterr().out == ""
    assert not triton.knobs.compilation.always_compile


def test_no_launch_at_all_is_an_error(launch, monkeypatch):
    monkeypatch.setattr(codegen_compile, "report", lambda kernel: kernel.name)
    assert compile_launches(lambda: launch("_a"), "sm_90") == ["_a"]
    assert compile_launches(lambda: launch("_a"), "sm_90", only=("_b",)) == []
    with pytest.raises(RuntimeError, match="no kernel was launched"):
        compile_launches(lambda: None, "sm_90")


def kernel(asm, **source):
    metadata = SimpleNamespace(name="_k", num_warps=4, shared=512, num_stages=3,
                               target=SimpleNamespace(warp_size=64 if "amdgcn" in asm else 32))  # fmt: skip
    return SimpleNamespace(hash="of no other", asm=asm, metadata=metadata, src=SimpleNamespace(**source))


SASS = """
 Function _k:
  REG:168 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0
        /*0000*/        STL.64 [R1], R4 ;      /* 0x0 */
        /*0010*/        LDG.E.128 R4, [R2.64] ;      /* 0x0 */
        /*0020*/        EXIT ;      /* 0x0 */
"""


def test_the_report_of_a_kernel(monkeypatch):
    """Accesses to local memory are spills. A NamedTuple's fields are arguments and constants of their own."""
    source = {
        "signature": {"x_ptr": "*bf16", "config": Config("constexpr", "fp32"), "n": "i32", "one": "constexpr"},
        "constants": {(1,): Config(True, 0.5), (1, 0): 7, (3,): 1},
    }
    nvidia = kernel({"cubin": b"code"}, **source)
    with pytest.raises(RuntimeError, match="_k: the output of ptxas is missing"):
        report(nvidia)
    monkeypatch.setitem(codegen_compile._logs, "of no other", "ptxas info    : Compiling entry function '_k'\n")
    monkeypatch.setattr(codegen_compile, "_sass", lambda cubin: SASS)
    found = report(nvidia)
    assert (found.kernel, found.threads, found.registers, found.spills, found.scalar_spills) == ("_k", 128, 168, 1, 0)
    assert (found.stack, found.shared, found.instructions, found.stages) == (16, 512, 3, 3)
    assert list(found.counts.items()) == [("load.128", 1), ("local", 1)] and found.loops == []
    assert found.signature == {
        "x_ptr": "*bf16", "config.IS_REPAIR": "constexpr", "config.SCALE": "fp32", "n": "i32", "one": "constexpr",
    }  # fmt: skip
    assert found.constants == {"IS_REPAIR": True, "one": 1}
    sizes = {"vgpr_count": 256, "agpr_count": 0, "sgpr_count": 96, "private_segment_fixed_size": 40,
             "vgpr_spill_count": 7, "sgpr_spill_count": 3}  # fmt: skip
    text = "\t.type\t_k,@function\n\ts_endpgm\n.Lfunc_end0:\n---\n"
    text += "".join(f"    .{name}:     {size}\n" for name, size in sizes.items())
    found = report(kernel({"amdgcn": text}, **source))
    assert (found.threads, found.registers, found.spills, found.scalar_spills) == (256, 256, 7, 3)


def test_which_nvcc_and_which_architectures(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/opt/toolkit")
    assert codegen_cuda.nvcc() == "/opt/toolkit/bin/nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(codegen_cuda.shutil, "which", lambda name: f"/bin/{name}")
    assert codegen_cuda.nvcc() == "/bin/nvcc"
    monkeypatch.setattr(codegen_cuda, "_compile", lambda arch: [arch, arch])
    assert codegen_cuda.compile_cuda(["sm_80", "gfx942", "sm_90"], 1) == ["sm_80", "sm_80", "sm_90", "sm_90"]


CUDA_SASS = """
 Function _one:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0
 Function _two:
  REG:50 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0
\t\tFunction : _two
        /*0000*/        STL.64 [R1], R4 ;      /* 0x0 */
\t\tFunction : _one
        /*0000*/        LDG.E.128 R4, [R2.64] ;      /* 0x0 */
        /*0010*/        @P0 BRA 0x0 ;      /* 0x0 */
        /*0020*/        EXIT ;      /* 0x0 */
"""


@pytest.mark.parametrize(
    ("name", "dtype", "threads", "streams"),
    [
        ("expand_kernel<unsigned short>", "16 bits", 128, "store"),
        ("reduce_kernel<true, c10::BFloat16, float>", "bf16", 128, "load"),
        ("reduce_kernel<false, double, double>", "fp64", 128, None),
        ("fold_kernel<float, c10::Half>", "fp32", 256, None),
    ],
)
def test_the_record_of_a_cuda_kernel(name, dtype, threads, streams, monkeypatch):
    """The first flag of `reduce_kernel` says whether rows are whole, so that it reads vectors."""
    asked = []

    def demangled(command, **options):
        asked.append(command)
        return SimpleNamespace(stdout=f"void (anonymous namespace)::{name}(band::Cut, int)\n")

    monkeypatch.setattr(codegen_cuda.subprocess, "run", demangled)
    two, one = (codegen_cuda._report(*function) for function in codegen_cuda._functions(CUDA_SASS))
    assert asked == [["c++filt", "_two"], ["c++filt", "_one"]]
    kernel, layout = name.rstrip(">").split("<")
    assert (one["kernel"], one["layout"], one["dtype"], one["threads"]) == (kernel, layout, dtype, threads)
    assert (one["registers"], one["shared"], one["stack"], one["spills"], one["instructions"]) == (40, 1024, 0, 0, 3)
    assert (two["registers"], two["shared"], two["stack"], two["spills"]) == (50, 0, 8, 1)
    assert (one["streams"], one["is_wide"]) == (streams, streams is not None)
    assert (one["interior"] is not None) == (streams == "load")


@pytest.mark.parametrize(
    ("constants", "words", "taken"),
    [
        ({}, "64,32,4,2", (64, 32, 4, 2)),
        ({"IS_DESCRIBED": False, "BANDS": 1}, "64,32,4,2", (64, 32, 4, 2)),
        ({"IS_DESCRIBED": True}, "64,32,4,2,1", (64, 32, 4, 2, True)),
        ({"IS_DESCRIBED": False, "BANDS": 2}, "64,32,4,2,0,2", (64, 32, 4, 2, False, 2)),
        ({"IS_DESCRIBED": True, "BANDS": 2}, "64,32,4,2,1,2", (64, 32, 4, 2, True, 2)),
    ],
)
def test_a_printed_tile_may_be_asked_for(constants, words, taken):
    """`--tile` takes what the table prints, and compiles the same kernel."""
    record = {"kernel": "_dtable_kernel", "arch": "sm_90", "threads": 128, "stages": 2}
    record["constants"] = {"BLOCK_M": 64, "BLOCK_N": 32} | constants
    assert codegen_command._tile(record | {"arch": "gfx942", "threads": 256}) == words
    assert codegen_command._tile(record) == words
    assert codegen_command._tiles(None, None, [f"dtable={words}"]) == {"dtable": taken}
