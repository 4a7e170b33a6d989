# SPDX-License-Identifier: MIT
"""One suite for every machine: `--device cpu` (default) runs the Triton kernels in their interpreter, `--device cuda`
runs them on the GPU. A backend that the machine lacks is skipped, and the summary gives the reason."""

import gc
import os
from functools import partial

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the kernels run")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: more threads would only spin and wait
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
        torch.set_num_threads(1)
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # the first import of the kernels reads it
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU here")


# The tests of each file share something that is slow to make, so one worker runs the whole file, before others.
TOGETHER = (
    "bench/test_codegen.py", "bench/test_train.py", "csrc/test_csrc.py", "distributed/test_distributed.py",
    "distributed/test_survival.py", "launching/test_launch_path.py",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For `--dist loadscope`: a scope is a file of TOGETHER, or a single test. The largest scopes come first."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file.endswith(TOGETHER) else nodeid

    return Scheduling(config, log)


def pytest_collection_finish():
    gc.freeze()  # imported objects stay, so no collection needs to look at them again


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter(device):
    """If the kernels run in Triton's interpreter, make it faster, and let it check their addresses."""
    if device == "cpu":
        import guarded_memory
        import quick_interpreter

        quick_interpreter.install()
        guarded_memory.install()


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        own = {"cpu": "cpp", "cuda": "cuda"}[metafunc.config.getoption("--device")]
        metafunc.parametrize("backend", ("torch", "triton", own), indirect=True)


@pytest.fixture
def backend(request, device):
    """Each backend that serves tensors on `device`; skipped if it is not built or installed."""
    from dpb_triton.dispatch import why_not

    reason = why_not(request.param, device)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    threads = torch.get_num_threads()
    if request.param == "cpp":  # its kernels divide the rows among threads
        torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(threads)


@pytest.fixture(params=("torch", "cpp", "triton"))
def attention_backend(request, device):
    """Each backend that serves attention on `device`; skipped if it is not installed."""
    from dpb_triton.dispatch import why_not

    reason = why_not(request.param, device)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(scope="module")
def on_the_device(device):
    """New modules and tensors are on the suite's device."""
    with torch.device(device):
        yield


@pytest.fixture
def fused(monkeypatch):
    """The calls of `DynamicPositionBias.attention`. MultiheadAttention materialises the bias in all other cases."""
    from dpb_triton import DynamicPositionBias

    calls = []
    attention = DynamicPositionBias.attention
    monkeypatch.setattr(DynamicPositionBias, "attention", lambda *a, **o: calls.append(o) or attention(*a, **o))
    return calls


@pytest.fixture
def poisoned():
    """torch.empty fills its memory with NaN, which shows what a kernel forgot to write."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def gpu(monkeypatch):
    """A torch.cuda that only records calls (recorded_cuda.py), for the bench's GPU paths."""
    from recorded_cuda import recorded_cuda

    with recorded_cuda(monkeypatch) as recorder:
        yield recorder


@pytest.fixture
def bench(tmp_path):
    """A function that runs `python -m bench` with the given words in this process."""
    from recorded_cuda import run_bench

    return partial(run_bench, tmp_path)


@pytest.fixture
def set_tiles(monkeypatch):
    """A function that sets {kernel: its constants} for the Triton attention kernels until the test ends."""
    blocks = pytest.importorskip("dpb_triton.attention.kernels.blocks", reason="Triton is not installed")
    replay = pytest.importorskip("dpb_triton.launching.replay")

    def set_them(tiles):
        for constants in (blocks.BLOCKS, blocks.FLOAT32):
            for generation in constants:
                monkeypatch.setitem(constants, generation, {kernel: (tile,) * 3 for kernel, tile in tiles.items()})
        replay.forget()  # launches that were recorded with other tiles

    yield set_them
    replay.forget()


# (TILE, MIN_ROWS, MAX_ROWS). For the sizes attention_oracle.CUT a tile has 2 rows: of 2 heads of one element; of all
# heads of 2 elements; of everything.
SMALL_TILES = {"heads": (1, 4, 4), "elements": (208, 4, 4), "rows": (1 << 20, 4, 4)}


@pytest.fixture(params=SMALL_TILES.values(), ids=SMALL_TILES)
def small_cuts(request, monkeypatch):
    """Plain torch's attention works in so many tiles that small shapes meet every cut of them more than once."""
    from dpb_triton.attention import torch_grid

    for name, number in zip(("TILE", "MIN_ROWS", "MAX_ROWS"), request.param, strict=True):
        monkeypatch.setattr(torch_grid, name, number)
    monkeypatch.setattr(torch_grid.Grid, "flash_rows", lambda self: 4)
