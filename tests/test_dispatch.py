# SPDX-License-Identifier: MIT
"""Which implementation a call reaches, and on which device, with recorders in place of a GPU."""

import platform
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import dpb_triton.__main__ as command
from dpb_triton import dispatch, tracing
from dpb_triton import module as module_file
from dpb_triton.attention import ops
from dpb_triton.dispatch import check_backend, suffixes_of, why_not


@pytest.fixture
def available(monkeypatch):
    """A function that sets what the machine has: Triton, its interpreter, the compiled extension for each backend."""

    def set_it(triton=True, interpreter=False, cpp=None, cuda=None):
        monkeypatch.setattr(dispatch, "has_triton", lambda: triton)
        monkeypatch.setattr(dispatch, "is_interpreting", lambda: interpreter)
        monkeypatch.setattr(dispatch, "why_no_csrc", lambda backend: {"cpp": cpp, "cuda": cuda}[backend])

    return set_it


def test_why_the_extension_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    monkeypatch.setitem(sys.modules, "dpb_triton._C", None)  # then an import raises ModuleNotFoundError
    assert dispatch.load_csrc().startswith("the compiled extension is not loaded: import of dpb_triton._C halted")
    (tmp_path / "_C.txt").write_text("no ninja\n")
    assert dispatch.load_csrc() == "the compiled extension was not built: no ninja"

    def is_broken(name):
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(dispatch.importlib, "import_module", is_broken)  # it is there, whatever setup.py left
    assert dispatch.load_csrc() == "the compiled extension is not loaded: dpb_triton._C: undefined symbol"
    monkeypatch.undo()
    assert dispatch.load_csrc() == dispatch.CSRC_ERROR


@pytest.mark.parametrize(("serves", "key"), [("cpp", "CPU"), ("cuda", "CUDA")])
def test_why_the_extension_has_no_kernels(serves, key, monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "dispatch.py"))
    monkeypatch.setattr(dispatch, "CSRC_ERROR", None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, asked: asked != key)
    why = dispatch.why_no_csrc.__wrapped__
    assert why(serves) == f"the compiled extension was built without {key} kernels"
    (tmp_path / "_C.txt").write_text("nvcc is older than torch's CUDA\n")
    assert why(serves) == f"the compiled extension was built without {key} kernels: nvcc is older than torch's CUDA"
    assert why({"cpp": "cuda", "cuda": "cpp"}[serves]) is None
    monkeypatch.setattr(dispatch, "CSRC_ERROR", "it is broken")
    assert why(serves) == "it is broken"


def test_why_not(available):
    available(cpp="no compiler", cuda="no toolkit")
    assert why_not("torch", "cpu") is why_not("torch", "cuda") is None
    assert why_not("cpp", "cuda") == "serves cpu tensors only" and why_not("cpp", "cpu") == "no compiler"
    assert why_not("cuda", "cpu") == "serves cuda tensors only" and why_not("cuda", "cuda") == "no toolkit"
    assert why_not("triton", "cuda") is None and "TRITON_INTERPRET=1" in why_not("triton", "cpu")
    available(interpreter=True)
    assert why_not("triton", "cpu") is why_not("cpp", "cpu") is why_not("cuda", "cuda") is None
    available(triton=False, interpreter=True)
    assert why_not("triton", "cuda") == why_not("triton", "cpu") and "not installed" in why_not("triton", "cpu")


def test_suffixes(available):
    available(interpreter=True)
    backends = ("torch", "cpp", "triton", "cuda")
    assert [check_backend(x, "cuda" if x == "cuda" else "cpu") for x in (None, *backends)] == [
        "", "_torch", "", "_triton", "_cuda",
    ]  # fmt: skip
    assert list(suffixes_of(backends)) == ["", "_torch", "_triton", "_cuda"]
    assert list(suffixes_of(("torch", "cpp", "triton"))) == ["", "_torch", "_triton"]
    for name in ("expand", "reduce"):
        assert {name + suffix for suffix in suffixes_of(backends)} <= dispatch.OPERATORS.keys()
    for name in ("attention_forward", "attention_backward", "attention_paged"):
        found = {key for key in dispatch.OPERATORS if key.startswith(name)}
        assert found == {name + suffix for suffix in suffixes_of(ops.BACKENDS)}


@pytest.mark.parametrize(
    ("device_type", "machine", "expected"),
    [
        ("cpu", {}, "cpp"),
        ("cpu", {"cpp": "not built"}, "torch"),
        ("cuda", {}, "triton"),
        ("cuda", {"triton": False}, "cuda"),
        ("cuda", {"triton": False, "cuda": "not built"}, "torch"),
    ],
    ids=str,
)
def test_the_command_names_the_choice(device_type, machine, expected, available, monkeypatch, capsys):
    available(**machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command.print_backends(device_type)
    first, *lines = capsys.readouterr().out.strip().splitlines()
    assert first == f"{device_type} tensors: {expected!r} is chosen"
    assert [line.split()[0] for line in lines] == list(dispatch.BACKENDS)
    for line in lines:
        backend, said = line.split(maxsplit=1)
        assert said == (why_not(backend, device_type) or "available")


@pytest.mark.parametrize(("cuda", "hip"), [(None, None), ("13.0", None), (None, "7.0")])
def test_the_command_without_a_gpu(cuda, hip, available, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    available(cuda="built without CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command.main()
    out = capsys.readouterr().out
    for words in (
        f"dpb_triton {command.__version__} in {Path(dispatch.__file__).parent}\n",
        f"Python {platform.python_version()}, ",
        f"torch {torch.__version__}, triton {command.version_of('triton')}\n",
        "cuda: torch sees no GPU" + " (a CPU build of torch)" * (cuda is None and hip is None) + "\n",
        f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n",
        "cuda tensors: there are none here, torch sees no GPU; with one 'triton' is chosen",
        "  triton  installed, but there is no GPU",
        "  cuda    built without CUDA",
    ):
        assert words in out
    assert command.version_of("no such package of ours") == "not installed"
    available(triton=False)
    command.main()
    out = capsys.readouterr().out
    for words in (f"torch {torch.__version__}, triton not installed\n", "  cuda    built, but there is no GPU\n"):
        assert words in out
    assert "; with one 'cuda' is chosen\n" in out and out.count("  torch   available\n") == 2


@pytest.mark.parametrize("name", ["triton", "pytorch-triton-rocm"])
def test_the_command_knows_tritons_other_names(name, available, monkeypatch, capsys):
    """torch's builds for ROCm bring Triton in a package of another name."""
    available()
    monkeypatch.setattr(command.importlib.metadata, "packages_distributions", lambda: {"triton": [name]})
    monkeypatch.setattr(command, "version_of", lambda package: f"3.9 of {package}")
    command.main()
    assert f", triton 3.9 of {name}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("cuda", "hip", "said"), [("13.0", None, "CUDA 13.0"), (None, "7.0", "HIP 7.0")])
def test_the_command_with_a_gpu(cuda, hip, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(command, "print_backends", print)
    command.main()
    assert f"cuda: a GPU, {said}\n" in capsys.readouterr().out


class On:
    """Stands for a tensor on a GPU, or with -1 on the CPU."""

    device = torch.device("cpu")  # asked for with -1 only

    def __init__(self, index):
        self.index = index

    def get_device(self):
        return self.index


def test_a_kernel_runs_on_the_device_of_its_tensor(monkeypatch):
    entered, found = [], []

    @contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.append(None)

    monkeypatch.setattr(dispatch, "why_not", lambda backend, device_type: None)
    kernels = ModuleType("kernels_of_a_test")
    kernels.scale = lambda tensor, *args: found.append((tensor.index, args, entered[-1:])) or "done"
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    function = dispatch.on_its_device(kernels.__name__, "scale")
    for index in (-1, 0, 1, 2):
        assert function(On(index), "more", index) == "done"
    assert found == [(-1, ("more", -1), []), (0, ("more", 0), [0]), (1, ("more", 1), [None]), (2, ("more", 2), [2])]
    assert entered == [0, None, 2, None]


@pytest.mark.parametrize("name", ["expand", "reduce", "attention_forward", "attention_backward", "attention_paged"])
def test_tritons_operator_refuses_what_its_kernels_do_not_serve(name, monkeypatch):
    """A graph, or a user, may call it on a CPU; a GPU would read from an address that is not its own."""
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device_type: f"serves no {device_type} tensors")
    function = dispatch.DIRECT[f"{name}_triton", "cpu"]
    with pytest.raises(
        ValueError, match="backend='triton' is not available for cpu tensors: 'triton' serves no cpu tensors"
    ):
        function(torch.ones(2, 3))


def test_tritons_operator_says_that_triton_is_missing(monkeypatch):
    """Not an ImportError of the kernels' module, which it imports on first use; on a GPU too."""
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device_type: "is not installed")
    monkeypatch.setattr(On, "device", torch.device("cuda"))
    function = dispatch.on_its_device("a_module_that_does_not_exist", "scale")
    with pytest.raises(ValueError, match="is not available for cuda tensors: 'triton' is not installed"):
        function(On(0))


def test_float64_on_a_gpu_is_torchs():
    """Below autograd, so that its operations record nothing."""
    calls, leaf = [], torch.ones(1, requires_grad=True)
    on_cuda = ops._on_cuda(
        lambda *args: calls.append(("torch", *args[1:], (2 * leaf).requires_grad)),
        lambda *args: calls.append(("triton", *args[1:])),
    )
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        on_cuda(SimpleNamespace(dtype=dtype), 7)
    assert calls == [("torch", 7, False), ("triton", 7), ("triton", 7), ("triton", 7)]


@pytest.mark.parametrize("name", ["expand", "reduce", "attention_forward", "attention_backward"])
def test_what_a_call_on_a_gpu_reaches(name):
    """Without the dispatcher: Triton if the caller names it or nothing, else the dispatcher decides."""
    by_triton = dispatch.DIRECT[name + "_triton", "cuda"]
    assert dispatch.DIRECT[name + "_triton", "cpu"] is by_triton
    if dispatch.has_triton():
        chosen = dispatch.DIRECT[name, "cuda"]
        assert (chosen is by_triton) == (name in ("expand", "reduce"))
    assert (name + "_torch", "cuda") not in dispatch.DIRECT and (name + "_cuda", "cuda") not in dispatch.DIRECT


@pytest.mark.parametrize(
    ("device_type", "precision", "expected"),
    [
        ("cuda", "tf32", True), ("cuda", "ieee", False), ("cuda", "none", False), ("cpu", "tf32", True),
        ("cpu", "bf16", True), ("cpu", "ieee", False), ("meta", "tf32", False), ("xpu", "bf16", False),
    ],
)  # fmt: skip
def test_whether_products_round(device_type, precision, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(torch._C, "_get_fp32_precision_getter", lambda *names: asked.append(names) or precision)
    assert module_file._is_rounding(device_type) is expected
    assert asked == [{"cuda": ("cuda", "matmul"), "cpu": ("mkldnn", "matmul")}.get(device_type)] * (
        device_type in ("cuda", "cpu")
    )


def test_a_module_asks_for_the_precision_of_its_device(monkeypatch):
    """The products of a CPU module run in float64 if the CPU rounds, whatever a GPU does; a kept table knows both."""
    module = module_file.DynamicPositionBias(8, 2)
    dtypes, run = [], module_file.run
    monkeypatch.setattr(module_file, "run", lambda mlp, x: dtypes.append(x.dtype) or run(mlp, x))

    def round_on(device_type):
        monkeypatch.setattr(module_file, "_is_rounding", lambda asked: asked == device_type)

    for rounding, expected in (("cuda", torch.float32), ("cpu", torch.float64)):
        round_on(rounding)
        assert module.table(5).dtype == torch.float32
        assert dtypes[-1] == expected
    module.eval()
    with torch.no_grad():
        for rounding in ("none", "cuda", "cpu", "none"):
            round_on(rounding)
            before = len(dtypes)
            module.table(5), module.table(5)
            assert len(dtypes) == before + 1, rounding


def test_a_capture_is_asked_for_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tracing.is_capturing(torch.device("cuda", 0)) and not tracing.is_capturing(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not tracing.is_capturing(torch.device("cuda"))
