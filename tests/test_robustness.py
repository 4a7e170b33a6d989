# SPDX-License-Identifier: MIT
"""Threads at once, forks, workers of a DataLoader, no memory, an interrupt, a light import."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attention_oracle import Case, run
from module_rows import ModuleRows
from quick import slow
from torch.utils.data import DataLoader

from dpb_triton import DynamicPositionBias, bias_attention, dispatch, expand_bias
from dpb_triton import module as module_file
from dpb_triton.attention import torch_grid, torch_path


def step(backend, seed=0):
    """Attention's results and gradients, and a bias: forward and backward of a small training step."""
    *tensors, dout, dlse = Case(heads=4, kv_heads=2, i=9, j=13, seed=seed).draw()
    found = run(bias_attention, *tensors, dout, dlse, is_causal=True, enable_gqa=True, backend=backend)
    return [*found.values(), expand_bias(tensors[3], 5, 9, backend=backend)]


def assert_equal(found, expected):
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("attention_backend", ["torch", None])  # Triton's interpreter is not made for threads
def test_threads_at_once(attention_backend):
    """Each thread gets the results of its own inputs, also in the first calls of a module that keeps its table."""
    expected = {seed: step(attention_backend, seed) for seed in range(4)}
    module = DynamicPositionBias(8, 2).eval()
    start = threading.Barrier(4)

    def work(seed):
        start.wait(60)
        results = [step(attention_backend, seed) for _ in range(3)]
        with torch.no_grad():
            tables = [module.table(n) for n in (7, 300, 40, 700)]
        return results, tables

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for seed, (results, tables) in enumerate(found):
        for result in results:
            assert_equal(result, expected[seed])
        for table in tables:
            torch.testing.assert_close(table, module._compute(table.shape[1]))


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), slow("spawn", 1)])
def test_workers_of_a_data_loader(context, workers):
    """After the parent has used the kernels and kept a table."""
    step(None)
    data = ModuleRows(DynamicPositionBias(8, 2).eval())
    expected = [data[n] for n in range(4)]
    found = DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=context, timeout=300)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_fork_after_the_kernels_ran(attention_backend):
    """The child's forward and backward give the parent's bits."""
    expected, threads = step(attention_backend), torch.get_num_threads()
    torch.set_num_threads(1)  # as the child has: more threads round otherwise
    alone = step(attention_backend)
    torch.set_num_threads(threads)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # as a DataLoader's worker does: OpenMP's threads do not survive a fork
            code = 0 if all(map(torch.equal, step(attention_backend), alone)) else 3
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.get_num_threads() == threads
    assert_equal(step(attention_backend), expected)


def test_no_memory_is_torchs_own_error():
    """The result or the scratch does not fit. The error has the type of torch.empty's; nothing stays allocated."""
    table, far = torch.randn(2, 1 << 10), 1 << 25
    many = torch.randn(1, 2, 1, 8).expand(1, 2, 1 << 45, 8)
    few = many[:, :, :20]
    calls = {
        "expand": lambda: expand_bias(torch.zeros(1, 1).expand(1, far), far, far),
        "attention": lambda: bias_attention(many, few, few, table, offset=0, window=(3, 3)),
    }
    if dispatch.why_not("cpp", "cpu") is None:
        calls["scratch"] = lambda: bias_attention(few, many, many, table, window=(3, 3), backend="cpp")
    for name, call in calls.items():
        gc.collect()
        before = tensors_alive()
        with pytest.raises(RuntimeError, match=r"allocate \d{15,} bytes"):
            call()
        gc.collect()
        assert tensors_alive() <= before, name  # fewer: another test left a cache that forgets
    step(None)


def tensors_alive():
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


PLACES = {
    "scores": (torch_grid.Grid, "scores"),
    "blocks": (torch_grid.Grid, "band_of"),
    "results": (torch_path, "like"),
    "call": (dispatch, "_is_seen"),
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_interrupted_and_called_again(place, error, monkeypatch):
    """Grad mode, autocast and the threads are as before, and the next call gives the same bits."""
    expected = step("torch")
    owner, name = place
    original, left = getattr(owner, name), [0]

    def interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return original(*args)

    hits = 0
    for left[0] in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            try:
                step("torch")
            except error:
                hits += 1
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad  # autograd is not left out
        assert_equal(step("torch"), expected)
    assert hits


def test_a_module_interrupted_while_it_computes_its_table(monkeypatch):
    """It keeps the table that it had, and the next call computes the longer one."""
    module = DynamicPositionBias(8, 2).eval()
    with torch.no_grad():
        module.table(9)
        kept = module._cache._kept
        with monkeypatch.context() as patch:
            patch.setattr(module_file, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                module.table(300)
        assert module._cache._kept is kept
        assert torch.equal(module.table(300), module._compute(512)[:, :300])


def interrupt(*args):
    raise KeyboardInterrupt


HEAVY = (
    "triton", "transformers", "numpy", "matplotlib", "sympy", "torch._dynamo", "torch._inductor", "torch._subclasses",
    "torch.distributed._functional_collectives", "torch.distributed.tensor", "torch.fx", "torch.onnx",
    "torch.utils.flop_counter",
)  # fmt: skip


def test_a_light_import():
    """Beyond what torch imports itself: this package, einops, and small modules of Python."""
    code = """
import sys, torch
before = set(sys.modules)
import dpb_triton
print(*sorted(set(sys.modules) - before))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    new = result.stdout.split()
    assert "dpb_triton.attention.api" in new
    heavy = [name for name in new if name in HEAVY or name.startswith(tuple(f"{x}." for x in HEAVY))]
    assert not heavy
    foreign = [name for name in new if name.split(".")[0] not in ("dpb_triton", "einops")]
    assert len(foreign) < 10, foreign
