# SPDX-License-Identifier: MIT
"""What `bench codegen` catches of a launch, and what it reports of a compiled kernel, without compiling one."""

import contextlib
import inspect
import os
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="compiling needs the extra `triton`")

from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bench.codegen import assembly  # noqa: E402
from bench.codegen import attention as codegen_attention  # noqa: E402
from bench.codegen import command as codegen_command  # noqa: E402
from bench.codegen import compile as codegen_compile  # noqa: E402
from bench.codegen import cuda as codegen_cuda  # noqa: E402
from bench.codegen import matrix as codegen_matrix  # noqa: E402
from bench.codegen import run as codegen_run  # noqa: E402
from bench.codegen.compile import Report, caught_launches, compile_launches, report, target_of  # noqa: E402
from bench.codegen.matrix import Case  # noqa: E402
from bench.codegen.promises import broken  # noqa: E402
from dpb_triton.attention.kernels import backward, forward, paged  # noqa: E402
from dpb_triton.expand import triton_kernels as expand  # noqa: E402

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


def test_the_output_of_ptxas_is_kept_for_the_next_launch_of_a_kernel(launch, monkeypatch):
    """Triton compiles no kernel again that it has in memory. Then ptxas prints nothing."""
    with caught_launches("sm_90"):
        launch("_again")
        monkeypatch.setattr("builtins.print", lambda *words: None)
        launch("_again")
    assert codegen_compile._logs["_again"] == "ptxas says something of _again\n"


def arguments_of(monkeypatch, module, name, launch, *arguments, **options):
    """What `launch` gives to the launcher `name` of `module`, by the names of its parameters."""
    signature, seen = inspect.signature(getattr(module, name)), []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *given, **named: seen.append(signature.bind(*given, **named).arguments))
        launch(*arguments, **options)
    (found,) = seen
    return found


def described(arguments):
    """Tensors as their shapes, sizes as they are. All tensors are without memory."""
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_meta for tensor in tensors)
    return {name: tuple(value.shape) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


FORWARD = {
    "query": (2, 8, 32, 64), "key": (2, 8, 48, 64), "value": (2, 8, 48, 64), "table": (8, 48), "key_bias": None,
    "seqlens": None, "seed": None, "longest_query": 32, "longest_key": 48, "offset": 16, "signed": False, "left": None,
    "right": 0, "scale": 0.125, "softcap": 0.0, "dropout_p": 0.0, "blocks": None,
}  # fmt: skip
TILES = {"forward": (64, 64, 4, 2), "dq": (32, 32, 4, 1)}


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, {}),
        ({"is_causal": False}, {"right": None}),
        ({"window": 7}, {"left": 7}),
        ({"softcap": 30.0}, {"softcap": 30.0}),
        ({"dropout_p": 0.1}, {"dropout_p": 0.1, "seed": (1,)}),
        ({"group": 4}, {"key": (2, 2, 48, 64), "value": (2, 2, 48, 64)}),
        ({"has_mask": True}, {"key_bias": (2, 48)}),
        ({"heads": 3}, {"query": (2, 3, 32, 64), "key": (2, 3, 48, 64), "value": (2, 3, 48, 64), "table": (3, 48)}),
        ({"value_dim": 16}, {"value": (2, 8, 48, 16)}),
        (
            {"is_packed": True},
            {"query": (1, 8, 32, 64), "key": (1, 8, 48, 64), "value": (1, 8, 48, 64), "seqlens": (4, 5)},
        ),
        ({"blocks": TILES}, {"blocks": TILES}),
        ({"i": 64}, {"query": (2, 8, 64, 64), "table": (8, 64), "longest_query": 64, "offset": -16}),
    ],
    ids=lambda value: ",".join(value),
)
def test_what_an_option_set_launches(options, changed, monkeypatch):
    """Each option arrives, and changes nothing else."""
    options = {"head_dim": 64, "i": 32, "j": 48} | options
    asked = FORWARD | changed
    tile = asked["blocks"] and TILES["forward"]
    found = arguments_of(monkeypatch, forward, "forward", codegen_attention.launch_forward, torch.bfloat16, **options)
    assert described(found) == asked | {"blocks": tile}
    assert {found[name].dtype for name in ("query", "key", "value")} == {torch.bfloat16}
    assert found["query"].transpose(1, 2).is_contiguous() and found["key"].transpose(1, 2).is_contiguous()
    out = *asked["query"][:3], asked["value"][3]
    asked |= {
        "dout": out, "out": out, "dlse": asked["query"][:3] if asked["seed"] else None,
        "state": (2, *asked["query"][:3]), "is_part": False, "needs_dq": True, "needs_dkv": True,
        "needs_dtable": True, "needs_dkey_bias": False,
    }  # fmt: skip
    found = arguments_of(
        monkeypatch, backward, "backward", codegen_attention.launch_backward, torch.bfloat16, **options
    )
    assert described(found) == asked
    assert found["dout"].dtype == torch.bfloat16 and found["state"].dtype == torch.float32


def test_a_projection_is_one_tensor_with_rows_of_all_three(monkeypatch):
    found = arguments_of(
        monkeypatch, forward, "forward", codegen_attention.launch_forward, torch.bfloat16, head_dim=64, i=32, j=32,
        is_projection=True, value_dim=16,
    )  # fmt: skip
    row = 8 * (64 + 64 + 16)
    assert [found[name].stride() for name in ("query", "key", "value")] == [
        (32 * row, 64, row, 1), (32 * row, 64, row, 1), (32 * row, 16, row, 1),
    ]  # fmt: skip
    assert [found[name].storage_offset() for name in ("query", "key", "value")] == [0, 512, 1024]


def test_a_paged_launch(monkeypatch):
    options = {"head_dim": 64, "page": 16, "i": 2, "j": 120, "group": 4}
    found = arguments_of(monkeypatch, paged, "paged", codegen_attention.launch_paged, torch.float16, **options)
    assert described(found) == {
        "query": (4, 8, 2, 64), "key": (512, 2, 16, 64), "value": (512, 2, 16, 64), "table": (8, 128),
        "block_table": (4, 8), "lengths": (4,), "signed": False, "left": None, "right": None, "scale": 0.125,
        "softcap": 0.0,
    }  # fmt: skip
    assert found["block_table"].dtype == found["lengths"].dtype == torch.int32


@pytest.mark.parametrize("block", [None, (32, 64)])
def test_launches_of_expand_and_reduce(block, monkeypatch):
    more = {"block_m": 32, "block_n": 64} if block else {}

    def found(name, **options):
        launch = getattr(codegen_matrix, f"launch_{name}")
        arguments = arguments_of(monkeypatch, expand, name, launch, torch.float16, **options, block=block)
        tensor = next(iter(arguments.values()))
        assert tensor.dtype == arguments.pop("dtype") == torch.float16
        return described(arguments), tensor

    assert found("expand", i=4, j=16)[0] == {"table": (8, 16), "i": 4, "j": 16, "offset": 12, "signed": False} | more
    asked = {"table": (8, 31), "i": 16, "j": 4, "offset": -12, "signed": True} | more
    assert found("expand", i=16, j=4, signed=True)[0] == asked
    asked = {"dbias": (8, 4, 16), "n": 16, "offset": 12, "signed": False} | more
    arguments, dbias = found("reduce", i=4, j=16)
    assert arguments == asked and dbias.stride() == (64, 16, 1)
    arguments, dbias = found("reduce", i=4, j=16, first_column=3)
    assert arguments == asked and dbias.stride() == (76, 19, 1) and dbias.storage_offset() == 3
    arguments, dbias = found("reduce", i=4, j=16, is_broadcast=True)
    assert arguments == asked and dbias.stride() == (0, 0, 0)
    arguments, _ = found("reduce", i=16, j=4, signed=True)
    assert arguments == {"dbias": (8, 16, 4), "n": 16, "offset": -12, "signed": True} | more


CASE = Case("reduce", "aligned", "bf16", "sm_90", {"i": 64, "j": 64}, True, ("_reduce_kernel",))


def test_the_records_of_a_case(monkeypatch):
    """A stream's loop is the widest. Attention's is the shortest with products."""
    loops = [assembly.Loop(0, number, {"load.128": number, "tensor": 1}, 0) for number in (5, 9)]
    notes, asked = ["(C7519) of no harm", "(C7515) serialized"], []

    def compile_launches(launch, arch, only):
        asked.append((arch, only))
        kernels = "_reduce_kernel", "_fold_kernel", "_dq_kernel"
        return [Report(kernel, 128, 99, 0, 0, 0, 0, 9, {}, loops=loops, notes=notes) for kernel in kernels]

    monkeypatch.setattr(codegen_compile, "compile_launches", compile_launches)
    records = codegen_run.compile_case(CASE)
    assert asked == [("sm_90", ("_reduce_kernel",))]
    found = [record["interior"] and record["interior"]["instructions"] for record in records]
    assert found == [9, None, 5]
    assert {record["serialised"] for record in records} == {"(C7515) serialized"}
    assert {(record["op"], record["layout"], record["triton"], record["is_trial"]) for record in records} == {
        ("reduce", "aligned", triton.__version__, False)
    }
    narrow = Case("reduce", "broadcast", "bf16", "sm_90", {}, False)
    assert codegen_run.compile_case(narrow)[0]["interior"] is None
    trial = Case("attention", "d64 causal", "bf16", "sm_90", {"blocks": TILES})
    assert codegen_run.compile_case(trial)[0]["is_trial"]


def test_an_error_of_a_compiler_is_a_record(monkeypatch):
    def compile_launches(launch, arch, only):
        raise KeyError("no such thing")

    monkeypatch.setattr(codegen_compile, "compile_launches", compile_launches)
    (record,) = codegen_run.compile_case(CASE)
    found = record["op"], record["kernel"], record["layout"], record["error"]
    assert found == ("reduce", "reduce", "aligned", "KeyError: 'no such thing'")


@pytest.mark.parametrize("before", [None, "1"])
def test_children_compile_into_a_cache_of_their_own(before, monkeypatch):
    names = "TRITON_INTERPRET", "TRITON_CACHE_DIR"
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if before:
            monkeypatch.setenv(name, before)
    with contextlib.suppress(KeyError), codegen_run.environment():
        assert "TRITON_INTERPRET" not in os.environ
        folder = os.environ["TRITON_CACHE_DIR"]
        assert os.path.isdir(folder) and not os.listdir(folder)
        raise KeyError("of the caller")
    assert not os.path.exists(folder)
    assert [os.environ.get(name) for name in names] == [before, before]


def test_records_come_in_the_order_of_the_matrix(monkeypatch):
    """A process compiles the cases that share kernels, the largest family first."""
    groups = []

    def compile_group(group):
        groups.append(group)
        return {case: [case.layout, f"{case.layout} again"] for case in group}

    monkeypatch.setattr(codegen_run, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(codegen_run, "_compile", compile_group)
    matrix = [
        Case("attention", name, "bf16", "sm_90", options)
        for name, options in (
            ("a", {"head_dim": 64}), ("b", {"head_dim": 32}), ("c", {"head_dim": 64, "value_dim": 32}),
            ("d", {"head_dim": 32, "i": 7}), ("e", {"head_dim": 64}), ("f", {"head_dim": 32}),
        )
    ]  # fmt: skip
    found = codegen_run.compile_all(matrix, 1)
    assert found == [word for name in "abcdef" for word in (name, f"{name} again")]
    assert ["".join(case.layout for case in group) for group in groups] == ["bdf", "ae", "c"]


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
    monkeypatch.setitem(
        codegen_compile._logs, "of no other", "(C7519) of no harm\nptxas info: Compiling entry function '_k'\n"
    )
    monkeypatch.setattr(codegen_compile, "_sass", lambda cubin: SASS)
    found = report(nvidia)
    assert found.notes == ["(C7519) of no harm"]
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


def test_a_cuda_source_that_does_not_compile_is_one_record(monkeypatch):
    """The compiler's last words are the reason, wherever it writes them."""
    commands, failed = [], SimpleNamespace(returncode=2, stderr="band.cu(7): no such thing\n", stdout="1 error\n")

    def run(command, **options):
        commands.append(command)
        return failed

    monkeypatch.setattr(codegen_cuda, "nvcc", lambda: "/bin/nvcc")
    monkeypatch.setattr(codegen_cuda, "subprocess", SimpleNamespace(run=run))
    (record,) = codegen_cuda.compile_cuda(["sm_80"], 1)
    ((nvcc, *words),) = commands
    assert nvcc == "/bin/nvcc" and words.index("-cubin") + 1 == words.index("-arch=sm_80")
    assert words[words.index("-Werror") + 1] == "all-warnings" and "-Werror" in words[words.index("-Xcompiler") + 1]
    assert words[-3:-1] == [str(codegen_cuda.SOURCE), "-o"]
    assert record == {
        "op": "cuda", "arch": "sm_80", "triton": triton.__version__, "kernel": "band_cuda.cu", "dtype": "",
        "layout": "", "error": "band.cu(7): no such thing\n1 error\n",
    }  # fmt: skip
    assert broken(record) == ["does not compile: 1 error"]


def test_the_records_of_a_cuda_source(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout=CUDA_SASS)

    monkeypatch.setattr(codegen_cuda, "nvcc", lambda: "/bin/nvcc")
    monkeypatch.setattr(codegen_cuda, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(codegen_cuda, "_report", lambda name, usage, sass: {"kernel": name})
    found = codegen_cuda.compile_cuda(["sm_80", "sm_90"], 1)
    assert [(record["arch"], record["kernel"]) for record in found] == [
        ("sm_80", "_two"), ("sm_80", "_one"), ("sm_90", "_two"), ("sm_90", "_one"),
    ]  # fmt: skip
    assert commands[1][1:3] == ["-sass", "-res-usage"] and commands[1][3] == commands[0][-1]


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
