# SPDX-License-Identifier: MIT
"""The Triton launchers with small tiles, so that a small grid meets every edge of the band algorithms."""

import oracle
import pytest
import torch
from quick import slow

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from window_steps import check_steps, store_steps

from dpb_triton import reference
from dpb_triton.dispatch import why_not
from dpb_triton.expand import triton_kernels as kernels

TILES = [
    {"block_m": 8, "block_n": 32, "rows": 16},
    {"block_m": 16, "block_n": 32, "rows": 32},
    {"block_m": 16, "block_n": 256, "rows": 64},
]


# `make test` runs every window in float32. In the other types it runs the widest, whose rows have the most vectors.
TILED = [
    (pytest.param if dtype == torch.float32 or tiles is TILES[-1] else slow)(dtype, tiles, id=f"{dtype}-{tiles}")
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    for tiles in TILES
]


@pytest.mark.parametrize(("dtype", "tiles"), TILED)
@pytest.mark.parametrize("grid", oracle.GRIDS, ids=str)
def test_both_directions(tiles, grid, dtype, device, poisoned):
    heads, i, j, offset, signed, spare = grid
    offset = j - i if offset is None else offset
    n = oracle.length(i, j, offset) + spare
    table = oracle.draw_table(grid, dtype, device)
    bias = kernels.expand(table, i, j, offset, signed, dtype, **tiles)
    assert torch.equal(bias.cpu().double(), oracle.expand(table, i, j, offset, signed))

    dbias = torch.randn(heads, i, j, device=device).to(dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    dtable = kernels.reduce(dbias, n, offset, signed, accumulator, **tiles)
    eager = reference.reduce(dbias, n, offset=offset, signed=signed, dtype=accumulator)
    oracle.assert_within_budget(dtable, oracle.reduce(dbias, n, offset, signed), eager)


ALIGNED = [
    (torch.bfloat16, {"block_m": 16, "block_n": 32, "rows": 32}),  # aligned to a sector
    (torch.bfloat16, {"block_m": 64, "block_n": 64, "rows": 64, "warps": 8}),  # aligned to a line
    (torch.bfloat16, {"block_m": 32, "block_n": 128, "rows": 64, "align": 16}),  # aligned to a vector
    (torch.float32, {"block_m": 32, "block_n": 64, "rows": 32}),
    (torch.float64, {"block_m": 16, "block_n": 32, "rows": 16}),
]


@pytest.mark.parametrize("offset", [0, 5, -301])
@pytest.mark.parametrize(("dtype", "tiles"), ALIGNED, ids=str)
def test_rows_that_begin_anywhere(dtype, tiles, offset, device, poisoned):
    """Widths with many residues of the widest alignment, and some that are less than a vector."""
    line = 128 // dtype.itemsize
    widths = [0, 1, 2, 3, 7, 9, 17, *range(line + 1, 2 * line + 2)]
    for width in widths[:: 3 if offset == 5 else 7]:
        x, y = torch.arange(70)[:, None], torch.arange(width)
        distance = (x + offset - y).abs()
        table = torch.arange(2 * 512, device=device).remainder(251).to(dtype).view(2, 512)
        bias = kernels.expand(table, 70, width, offset, False, dtype, **tiles)
        assert torch.equal(bias.cpu(), table.cpu()[:, distance]), width


@pytest.mark.parametrize("tiles", TILES[:2], ids=str)
def test_every_width(tiles, device, poisoned):
    """A whole window ends just inside a row, just beyond it, or anywhere else."""
    for width in range(48, 48 + tiles["block_m"]):
        table = torch.arange(2.0 * width, device=device).view(2, width)
        bias = kernels.expand(table, 34, width, width - 34, False, torch.float32, **tiles)
        assert torch.equal(bias.cpu().double(), oracle.expand(table, 34, width)), width
        dbias = torch.randint(-9, 9, (2, 34, width), device=device).float()  # their sums are exact
        dtable = kernels.reduce(dbias, width, width - 34, False, torch.float32, **tiles)
        assert torch.equal(dtable.cpu().double(), oracle.reduce(dbias, width)), width


@pytest.mark.parametrize("options", [{"unroll": 2}, {"align": 32, "block_m": 16}, {"warps": 8}], ids=str)
@pytest.mark.parametrize("width", [300, 333])
def test_options_of_the_reduction(options, width, device, poisoned):
    """Two windows per iteration, another alignment, or 8 warps; more row chunks than the fold loads at a time."""
    dbias = torch.randn(2, 150, width, device=device).bfloat16()
    dtable = kernels.reduce(dbias, width, width - 150, False, torch.float32, **(TILES[0] | options))
    eager = reference.reduce(dbias, width, dtype=torch.float32)
    oracle.assert_within_budget(dtable, oracle.reduce(dbias, width), eager)


def check_reduce(dbias):
    """Of bfloat16, whose vectors have 8 elements."""
    width = dbias.shape[2]
    dtable = kernels.reduce(dbias, width, width - 20, False, torch.float32, **TILES[0])
    eager = reference.reduce(dbias, width, dtype=torch.float32)
    oracle.assert_within_budget(dtable, oracle.reduce(dbias, width), eager)


@pytest.mark.parametrize("misalignment", range(8))
@pytest.mark.parametrize("width", [40, 41, 54])
def test_misaligned_rows(misalignment, width, device, poisoned):
    """Rows inside wider rows begin at every phase of the 16-byte boundary. At 54 a whole window ends beyond a row."""
    memory = torch.randn(2 * 20 * 56 + 8, device=device).bfloat16()[misalignment:]
    check_reduce(memory.as_strided((2, 20, width), (20 * 56, 56, 1)))


def test_misaligned_heads(device, poisoned):
    """The rows of the first head begin at the boundary, those of the second one do not."""
    memory = torch.randn(2 * 20 * 48 + 8, device=device).bfloat16()
    check_reduce(memory.as_strided((2, 20, 40), (20 * 48 + 3, 48, 1)))


def test_memory_that_torch_did_not_allocate(device, poisoned):
    """Its storage begins off the boundary, so the kernel cannot step back to one."""
    if device != "cpu":
        pytest.skip("torch allocates the memory of every tensor on a GPU")
    memory = torch.randn(2 * 20 * 48 + 8).bfloat16()
    place = torch.frombuffer(memory.view(torch.uint8).numpy().data[6:], dtype=torch.bfloat16)
    assert place.data_ptr() % 16 == 6 and place.storage_offset() == 0
    check_reduce(place.as_strided((2, 20, 48), (20 * 48, 48, 1)))


@pytest.mark.parametrize("tiles", TILES[:2], ids=str)
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_stays_on_its_diagonal(number, tiles, device, poisoned):
    """Small windows: the number lies in either half of a band, in edges and whole windows, in several row chunks."""
    for j in (64, 65):
        for x, y in ((0, 0), (3, 60), (18, 0), (20, 31), (39, j - 1)):
            dbias = torch.ones(2, 40, j, device=device)
            dbias[1, x, y] = number
            oracle.assert_one_place(kernels.reduce(dbias, 70, 5, True, torch.float32, **tiles), (1, x + 5 - y + 69))


def test_rows_per_program_depends_on_the_shape_alone():
    assert kernels.rows_per_program(8, 64, 64) == 64
    assert kernels.rows_per_program(8, 8192, 8192) == 1024
    assert kernels.rows_per_program(1, 8192, 8192) == 128
    assert kernels.rows_per_program(64, 65536, 65536) == 1024


def test_large_windows_serve_programs_with_many_rows():
    assert (
        kernels.window_of(2, 512) == kernels.LARGE_WINDOWS[2] and kernels.window_of(4, 1024) == kernels.LARGE_WINDOWS[4]
    )
    assert kernels.window_of(2, 256) == kernels.window_of(4, 256) == (16, 256, 4)
    assert kernels.window_of(8, 64) == kernels.window_of(8, 1024) == (16, 128, 4)
    # Triton takes powers of two only
    assert all(set(window) <= {4, 8, 16, 32, 64, 128, 256} for window in kernels.LARGE_WINDOWS.values())


@pytest.mark.parametrize("signed", [False, True])
def test_contiguous_columns_are_read_as_rows(signed, monkeypatch, device):
    dbias, read, reduce = torch.randn(2, 9, 7, device=device), [], kernels.reduce
    monkeypatch.setattr(kernels, "reduce", lambda x, *args, **more: read.append(x.stride()) or reduce(x, *args, **more))
    expected = reference.reduce(dbias, 12, offset=2, signed=signed)
    for x, strides in ((dbias, []), (dbias.mT.contiguous().mT, [(63, 9, 1)])):
        torch.testing.assert_close(reduce(x, 12, 2, signed, torch.float32, **TILES[0]), expected)
        assert read == strides


def test_float64_is_summed_in_float64_from_any_dtype(device):
    dbias = torch.randn(1, 40, 70, device=device)
    found = kernels.reduce(dbias, 70, 30, False, torch.float64, **TILES[0])
    torch.testing.assert_close(found.cpu(), oracle.reduce(dbias, 70), rtol=1e-13, atol=1e-13)


@triton.jit
def _steps_kernel(cases_ptr, steps_ptr, steps: tl.constexpr, SHIFT: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    ptr = cases_ptr + 3 * tl.program_id(0)
    enter, inside, outside, leave = steps(tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), SHIFT, BLOCK_M, BLOCK_N)
    store_steps(steps_ptr + 4 * tl.program_id(0), enter, inside, outside, leave)


@pytest.mark.parametrize("shift", [0, 3])
def test_steps_of_a_window(shift, device):
    """A row of the window may lie up to `shift` columns farther right."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    block_m, block_n, most = 4, 8, 16  # the rows of a program; one that has fewer ends a head
    cases = [(rows, column, j) for rows in (3, 4, 14, 16) for j in range(1, 40, 2) for column in range(-most, j, 3)]
    found = torch.zeros(len(cases), 4, dtype=torch.int32, device=device)
    sizes = torch.tensor(cases, dtype=torch.int32, device=device)
    _steps_kernel[(len(cases),)](sizes, found, kernels._steps, shift, block_m, block_n)
    for case, steps in zip(cases, found.tolist(), strict=True):
        rows, column, j = case
        check_steps(steps, case, start=column, rows=rows, height=block_m, width=block_n + shift, seen=(0, j),
                    plain=(0, j), chunk=(0, most // block_m))  # fmt: skip


def test_the_largest_sizes():
    """Beyond them a sum of two positions is no int32."""
    most = kernels.LARGEST
    assert 2 * most <= 2**31 - 1
    kernels._check_sizes(most, most, most)
    for i, j, n in ((most + 1, 1, 1), (1, most + 1, 1), (1, 1, most + 1)):
        with pytest.raises(ValueError, match=f"at most {most} for Triton's kernels, got i = {i}, j = {j}, n = {n}"):
            kernels._check_sizes(i, j, n)
