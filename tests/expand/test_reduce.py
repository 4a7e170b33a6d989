# SPDX-License-Identifier: MIT
"""Reduce, the gradient of the table, is deterministic and within the error budget, for gradients of any strides."""

import numpy as np
import oracle
import pytest
import torch
from einops import rearrange
from quick import slow
from torch._subclasses.fake_tensor import FakeTensorMode

from dpb_triton import ReduceBias, expand_bias, reference
from dpb_triton.dispatch import SUFFIXES
from dpb_triton.expand import torch_path


def gradients(heads, i, j, dtype, device):
    """Gradients that autograd may pass: dense, sliced, misaligned, transposed, heads last, strided, broadcast."""
    wide = torch.randn(heads, i + 2, j + 5, device=device).to(dtype)
    flat = torch.randn(heads * i * j + 3, device=device).to(dtype)
    return {
        "contiguous": torch.randn(heads, i, j, device=device).to(dtype),
        "slice": wide[:, 1:-1, 3:-2],
        "misaligned": flat[3:].view(heads, i, j),
        "transposed": torch.randn(heads, j, i, device=device).to(dtype).mT,
        "heads last": torch.randn(i, j, heads, device=device).to(dtype).permute(2, 0, 1),
        "every second": torch.randn(heads, i, 2 * j, device=device).to(dtype)[:, :, ::2],
        "one number": torch.randn((), device=device).to(dtype).expand(heads, i, j),
        "one row": torch.randn(heads, 1, j, device=device).to(dtype).expand(heads, i, j),
        "one column": torch.randn(heads, i, 1, device=device).to(dtype).expand(heads, i, j),
        "one head": torch.randn(1, i, j, device=device).to(dtype).expand(heads, i, j),
    }


@pytest.mark.parametrize("signed", [False, True])
def test_the_eager_code_is_right(signed):
    """Its error is the budget of the others."""
    dbias = torch.randn(2, 5, 7, dtype=torch.float64)
    found = reference.reduce(dbias, 9, offset=3, signed=signed)
    torch.testing.assert_close(found, oracle.reduce(dbias, 9, 3, signed))


@pytest.mark.parametrize("signed", [False, True])
def test_no_distance_has_a_sum(signed, backend, device):
    dbias = torch.ones(2, 0, 5, device=device)
    assert reference.reduce(dbias, 0, offset=0, signed=signed).shape == (2, 0)
    assert ReduceBias.apply(dbias, 0, 0, signed, None, SUFFIXES[backend]).shape == (2, 0)
    with FakeTensorMode() as mode:
        assert ReduceBias.apply(mode.from_tensor(dbias), 0, 0, signed, None, SUFFIXES[backend]).shape == (2, 0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [slow(x) if x == torch.float16 else x for x in oracle.DTYPES], ids=str)
@pytest.mark.parametrize("shape", [(3, 33, 77, 44), (2, 50, 40, -3), (1, 70, 64, 100)], ids=str)
def test_any_strides(shape, dtype, signed, backend, device, poisoned):
    heads, i, j, offset = shape
    n = oracle.length(i, j, offset) + 1
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for name, dbias in gradients(heads, i, j, dtype, device).items():
        dtable = ReduceBias.apply(dbias, n, offset, signed, accumulator, SUFFIXES[backend])
        eager = reference.reduce(dbias, n, offset=offset, signed=signed, dtype=accumulator)
        try:
            oracle.assert_within_budget(dtable, oracle.reduce(dbias, n, offset, signed), eager)
        except AssertionError as error:
            raise AssertionError(f"gradient: {name}") from error


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 47, 20, 9), (1, 33, 4, -7), (3, 14, 2, 0), (2, 12, 31, 3)], ids=str)
def test_many_groups_of_blocks(shape, dtype, signed, monkeypatch, device, poisoned):
    """Plain torch cuts the rows into blocks, and these into groups, whose last one is smaller; rows are left over."""
    monkeypatch.setattr(torch_path, "BLOCK_ROWS", 3)
    monkeypatch.setattr(torch_path, "GROUP", 4)
    heads, i, j, offset = shape
    n = oracle.length(i, j, offset) + 1
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("slice", "transposed", "one row"):
        dbias = gradients(heads, i, j, dtype, device)[name]
        dtable = ReduceBias.apply(dbias, n, offset, signed, accumulator, "_torch")
        eager = reference.reduce(dbias, n, offset=offset, signed=signed, dtype=accumulator)
        oracle.assert_within_budget(dtable, oracle.reduce(dbias, n, offset, signed), eager)
    for x in range(i):  # in every block and at its edges
        dbias = torch.ones(1, i, j, device=device)
        dbias[0, x, x % j] = torch.inf
        dtable = ReduceBias.apply(dbias, n, offset, True, torch.float32, "_torch")[0]
        assert dtable.isinf().nonzero().tolist() == [[x + offset - x % j + n - 1]] and not dtable.isnan().any()


def test_ones_give_the_lengths_of_the_diagonals(backend, device):
    table = torch.zeros(2, 90, device=device, requires_grad=True)
    expand_bias(table, 80, 80, backend=backend).sum().backward()
    lengths = torch.tensor([80.0] + [2.0 * (80 - d) for d in range(1, 80)] + [0.0] * 10)
    assert torch.equal(table.grad.cpu(), lengths.expand(2, 90))


def test_inf_and_nan_stay_on_their_diagonal(backend, device):
    for number in (float("inf"), float("nan")):
        for j in (64, 65):
            for x, y in ((0, 0), (0, j - 1), (39, 0), (20, 31), (39, j - 1)):
                dbias = torch.ones(2, 40, j, device=device)
                dbias[1, x, y] = number
                dtable = ReduceBias.apply(dbias, j, j - 40, False, torch.float32, SUFFIXES[backend])
                oracle.assert_one_place(dtable, (1, abs(x + j - 40 - y)))


@pytest.mark.parametrize("strides", [(513, 64, 1), (512, 65, 1), (520, 64, 1), (4096, 72, 1), (65, 130, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_strides_that_are_no_multiples_of_a_vector(dtype, strides, backend, device):
    """Every head, every row or none begins inside a vector; rows of 64 elements are whole vectors."""
    memory = torch.randint(-9, 9, (2 * 4096,), device=device).to(dtype)  # their sums are exact
    for start in (0, 1, 4, 8):
        dbias = memory[start:].as_strided((2, 8, 64), strides)
        dtable = ReduceBias.apply(dbias, 64, 56, True, torch.float32, SUFFIXES[backend])
        assert torch.equal(dtable.cpu().double(), oracle.reduce(dbias, 64, 56, True)), start


@pytest.mark.parametrize("j", [64, 61])
def test_memory_that_torch_did_not_allocate(j, backend, device):
    """Numpy's memory may begin anywhere, and nothing before it is readable."""
    if device != "cpu":
        pytest.skip("torch allocates the memory of every tensor on a GPU")
    memory = np.random.default_rng(0).integers(-9, 9, 2 * 8 * j + 16).astype(np.float32)
    for shift in range(4):
        start = (shift * 4 - memory.ctypes.data) % 16 // 4
        dbias = torch.from_numpy(memory[start : start + 2 * 8 * j]).view(2, 8, j)
        assert dbias.data_ptr() % 16 == 4 * shift and dbias.storage_offset() == 0
        dtable = ReduceBias.apply(dbias, j, j - 8, False, torch.float32, SUFFIXES[backend])
        assert torch.equal(dtable.double(), oracle.reduce(dbias, j, j - 8)), shift
        gaps = dbias[:, :, : j - 3]  # between the rows
        dtable = ReduceBias.apply(gaps, j, j - 11, False, torch.float32, SUFFIXES[backend])
        assert torch.equal(dtable.double(), oracle.reduce(gaps, j, j - 11)), shift
        table = torch.from_numpy(memory[start : start + 2 * j]).view(2, j)
        assert torch.equal(expand_bias(table, 8, j, backend=backend).double(), oracle.expand(table, 8, j))


def test_repeats_bit_for_bit(backend, device):
    dbias = torch.randn(3, 200, 333, device=device)
    first, *others = (ReduceBias.apply(dbias, 333, 133, False, torch.float32, SUFFIXES[backend]) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_a_float64_table_has_a_float64_sum(backend, device):
    """Also of a float32 bias."""
    dbias = torch.randn(2, 40, 50, device=device)
    dtable = ReduceBias.apply(dbias, 50, 10, False, torch.float64, SUFFIXES[backend])
    torch.testing.assert_close(dtable.cpu(), oracle.reduce(dbias, 50, 10), rtol=1e-12, atol=1e-12)


def test_a_float64_bias_has_a_float64_sum(backend, device):
    """Also for a float32 table: the sum is rounded once."""
    table = torch.zeros(2, 50, device=device, requires_grad=True)
    dbias = torch.randn(2, 40, 50, dtype=torch.float64, device=device)
    expand_bias(table, 40, 50, dtype=torch.float64, backend=backend).backward(dbias)
    assert torch.equal(table.grad.cpu(), oracle.reduce(dbias, 50, 10).float())


def test_low_precision_is_summed_in_float32(device, backend):
    """bf16 at 2,048 tokens: on the CPU eager scatters the gradient in bf16 and is off by over ten; ours only rounds."""
    n = 2048 if backend != "triton" or device == "cuda" else 256  # the interpreter takes minutes at 2,048
    torch.manual_seed(0)
    dbias = torch.randn(8, n, n, device=device).bfloat16()
    exact = reference.reduce(dbias.double(), n)
    ours = ReduceBias.apply(dbias, n, 0, False, torch.float32, SUFFIXES[backend])
    assert (ours - exact).abs().max() < 1e-3

    if device == "cpu":
        rows = torch.zeros(n, 8, dtype=torch.bfloat16, requires_grad=True)
        eager = rearrange(rows[reference.distance(n, n, 0).abs()], "i j h -> h i j")
        eager.backward(dbias)
        assert (rows.grad.mT - exact).abs().max() > (10 if n == 2048 else 1)
