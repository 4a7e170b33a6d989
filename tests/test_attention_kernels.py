# SPDX-License-Identifier: MIT
"""The Triton attention kernels with small tiles: small grids then have edges, whole tiles, several bands and chunks."""

from functools import partial

import pytest
import torch
from attention_oracle import Case, check

from dpb_triton import bias_attention
from dpb_triton.functional import why_not

blocks = pytest.importorskip("dpb_triton.kernels.attention_blocks", reason="Triton is not installed")
replay = pytest.importorskip("dpb_triton.kernels.replay")

TILES = [
    {"forward": (16, 16, 4, 1), "dkdv": (16, 16, 4, 1), "dq": (16, 16, 4, 1), "dtable": (16, 16, 4, 1)},
    {"forward": (32, 16, 4, 1), "dkdv": (32, 16, 4, 1), "dq": (32, 16, 4, 1), "dtable": (16, 32, 4, 1)},
    {"forward": (16, 32, 4, 1), "dkdv": (16, 32, 4, 1), "dq": (16, 32, 4, 1), "dtable": (32, 64, 4, 1)},
]
CASES = {
    "plain": Case(i=65, j=85),
    "causal": Case(i=70, j=70, options={"is_causal": True}),
    "window": Case(i=50, j=81, options={"window": (21, 18), "signed": True}),
    "left": Case(i=50, j=81, options={"window": (40, None)}),
    "right, before the keys": Case(i=80, j=50, options={"window": (None, 20), "offset": -40}),
    "bf16, grouped, batch": Case(batch=2, heads=2, kv_heads=1, i=40, j=40, dtype=torch.bfloat16, layout="transposed"),
    "huge": Case(i=40, j=57, table="huge", options={"softcap": 2.0}),
    "masked": Case(i=40, j=57, table="masked", options={"is_causal": True, "offset": 9}),
}


@pytest.fixture(params=TILES, ids=["16", "tall", "wide"])
def small_tiles(request, monkeypatch):
    for constants in (blocks.BLOCKS, blocks.FLOAT32):
        for generation in constants:
            tiles = {kernel: (tile,) * 3 for kernel, tile in request.param.items()}
            monkeypatch.setitem(constants, generation, tiles)
    replay.forget()  # what was written down with other tiles
    yield
    replay.forget()


@pytest.mark.parametrize("name", CASES)
def test_small_tiles(name, small_tiles, device):
    if reason := why_not("triton", device):
        pytest.skip(reason)
    check(partial(bias_attention, backend="triton"), CASES[name], device)


def test_constants_fit_the_kernels():
    """The skew of the table's gradient wants BLOCK_M <= BLOCK_N; the padding of the bias table, both within 256."""
    for kernels in (*blocks.BLOCKS.values(), *blocks.FLOAT32.values()):
        for kernel, widths in kernels.items():
            for block_m, block_n, _, _ in widths:
                assert block_m + block_n <= 256
                assert kernel != "dtable" or block_m <= block_n
