# SPDX-License-Identifier: MIT
"""The Triton attention kernels with small tiles: small grids then have edges, whole tiles, several bands and chunks."""

import importlib
import itertools
from functools import partial

import pytest
import torch
from attention_oracle import Case, check, dropout_keep, seed_of
from quick import slow

from dpb_triton import bias_attention
from dpb_triton.dispatch import why_not

blocks = pytest.importorskip("dpb_triton.attention.kernels.blocks", reason="Triton is not installed")
replay = pytest.importorskip("dpb_triton.launching.replay")

TILES = [
    {"forward": (16, 16, 4, 1), "dkdv": (16, 16, 4, 1), "dq": (16, 16, 4, 1), "dtable": (16, 16, 4, 1)},
    {"forward": (32, 16, 4, 1), "dkdv": (32, 16, 4, 1), "dq": (32, 16, 4, 1), "dtable": (16, 32, 4, 1)},
    {"forward": (16, 32, 4, 1), "dkdv": (16, 32, 4, 1), "dq": (16, 32, 4, 1), "dtable": (32, 16, 4, 1, False, 2)},
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
    # float32 rows of more than 64 columns are multiplied in chunks of 64: the last chunk is full, short, one column
    "wide": Case(i=40, j=57, head_dim=128, value_dim=65, options={"is_causal": True}),
    "wide values": Case(heads=4, kv_heads=2, i=33, j=33, head_dim=40, value_dim=100, options={"window": (9, 9)}),
    "wide keys": Case(i=33, j=50, head_dim=136, value_dim=24, layout="sliced"),
}
# Tensor descriptors serve dense batches of 2-byte types; "float32" and "odd" fall back to pointers
DESCRIBED = {
    "causal": Case(batch=2, i=70, j=70, head_dim=40, dtype=torch.bfloat16, options={"is_causal": True}),
    "window, grouped": Case(
        heads=4, kv_heads=2, i=50, j=81, head_dim=16, value_dim=72, dtype=torch.float16, layout="transposed",
        options={"window": (21, 18)},
    ),
    "dropout": Case(i=40, j=57, head_dim=64, dtype=torch.bfloat16, layout="transposed", options={"dropout_p": 0.3}),
    "float32": Case(i=40, j=57, head_dim=128),
    "odd": Case(i=40, j=57, head_dim=33, dtype=torch.bfloat16),
}  # fmt: skip


# `make test` runs each kind of edge with the square tiles, and two cases with the other tiles
QUICK = ("plain", "causal", "window", "bf16, grouped, batch", "masked", "wide", "wide keys")
TILED = [
    (pytest.param if name in (QUICK if tile == "16" else QUICK[2:4]) else slow)(name, tiles, id=f"{tile}-{name}")
    for tile, tiles in zip(("16", "tall", "wide"), TILES, strict=True)
    for name in CASES
]


@pytest.mark.parametrize(("name", "tiles"), TILED)
def test_small_tiles(name, tiles, set_tiles, device):
    set_tiles(tiles)
    if reason := why_not("triton", device):
        pytest.skip(reason)
    check(partial(bias_attention, backend="triton"), CASES[name], device)


@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    [(40, 40), (72, 72), (80, 80), (96, 96), (160, 160), (192, 192), (64, 128), (128, 24), (192, 128), (16, 256)],
)
def test_widths_that_are_padded_or_differ(head_dim, value_dim, device):
    """With the tiles of `blocks.py`, which has rows for such widths, and lengths that are multiples of nothing."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    case = Case(heads=1, i=67, j=71, head_dim=head_dim, value_dim=value_dim, dtype=torch.bfloat16, layout="transposed",
                options={"is_causal": True})  # fmt: skip
    check(partial(bias_attention, backend="triton"), case, device)


@pytest.mark.parametrize("name", DESCRIBED)
def test_rows_by_descriptors(name, monkeypatch, device):
    """The results are right, and the kernels use descriptors where the case allows them."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    launch = pytest.importorskip("dpb_triton.attention.kernels.launch")
    modules = [
        pytest.importorskip(f"dpb_triton.attention.kernels.{name}") for name in ("forward", "backward", "dtable")
    ]
    made = []

    def describe(*arguments):
        made.append(launch.describe(*arguments))
        return made[-1]

    for module in modules:
        monkeypatch.setattr(module, "describe", describe)
    for constants in (blocks.BLOCKS, blocks.FLOAT32):
        for generation in constants:
            tiles = {kernel: ((*tile, True),) * 3 for kernel, tile in TILES[1].items()}
            monkeypatch.setitem(constants, generation, tiles)
    case, keep = DESCRIBED[name], None
    if "dropout_p" in case.options:
        keep = dropout_keep(seed_of(5, device), case.batch, case.heads, case.i, case.j, case.options["dropout_p"])

    def attend(*tensors, **options):
        torch.manual_seed(5)
        return bias_attention(*tensors, backend="triton", **options)

    check(attend, case, device, keep)
    assert len(made) >= 4  # forward, dq, and two for dtable
    assert all(descriptors is None for descriptors in made) == (name in ("float32", "odd"))


def test_descriptors_where_there_can_be_some():
    """A TensorDescriptor would refuse the other tensors with an assertion."""
    describe = pytest.importorskip("dpb_triton.attention.kernels.launch").describe
    whole = torch.zeros(2, 4, 32, 48, dtype=torch.bfloat16)
    (made,) = describe((whole[..., :40],), 16, None)
    assert (made.shape, made.strides, made.block_shape) == ([2, 4, 32, 40], [6144, 1536, 48, 1], [1, 1, 16, 64])
    assert describe((whole, whole[..., 8:44]), 16, None) is not None
    for tensor in (
        whole[..., 4:40],  # begins off a 16-byte boundary
        whole[..., :36].contiguous(),  # so do its rows
        whole.transpose(2, 3)[..., :1],  # its last stride is 48
        whole[:1, :1, :1].expand(2, 4, 32, 48),
        whole.float(),
    ):
        assert describe((tensor,), 16, None) is None
        assert tensor.dtype == torch.float32 or describe((whole, tensor), 16, None) is None
    assert describe((whole,), 16, torch.zeros(1, 5)) is None


def test_constants_fit_the_kernels():
    """The bias table's padding fits tiles of 256 queries and keys; the row padding fits two blocks of queries."""
    prologue = pytest.importorskip("dpb_triton.attention.kernels.prologue")
    for kernels in (*blocks.BLOCKS.values(), *blocks.FLOAT32.values()):
        for kernel, widths in kernels.items():
            kernel = kernel.split()[0]
            for row in filter(None, widths):
                tile = blocks.Tile(*row)
                assert tile.block_m + tile.bands * tile.block_n <= 256
                assert 2 * tile.block_m <= prologue.ROW_PADDING
                assert tile.bands == 1 or kernel == "dtable"


def test_a_tile_may_bound_the_registers():
    """Triton's AMD backend has no such option, so `options` names it only if the tile has a bound."""
    assert blocks.Tile(64, 32, 4, 2).options == {"num_warps": 4, "num_stages": 2}
    assert blocks.Tile(64, 32, 4, 2, registers=168).options["maxnreg"] == 168
    for generation in ("ampere", "cdna"):
        rows = itertools.chain(*blocks.BLOCKS[generation].values(), *blocks.FLOAT32[generation].values())
        assert not any(blocks.Tile(*row).registers for row in rows if row)


@pytest.mark.parametrize("wanted", [0, 1, 2, 5, 7, 64, 1000])
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 9), (3, 4), (70, 2), (2, 100)])
def test_dtables_chunks_hold_every_step_of_the_batch_once(wanted, batch, steps):
    dtable = pytest.importorskip("dpb_triton.attention.kernels.dtable")
    chunk_batch, step_chunks, chunk_steps = dtable._chunks(wanted, batch, steps)
    seen = [
        (index, step)
        for chunk in range(-(-batch // chunk_batch) * step_chunks)
        for index in range(chunk // step_chunks * chunk_batch, min((chunk // step_chunks + 1) * chunk_batch, batch))
        for step in range(chunk % step_chunks * chunk_steps, min((chunk % step_chunks + 1) * chunk_steps, steps))
    ]
    assert seen == [(index, step) for index in range(batch) for step in range(steps)]


@pytest.mark.parametrize("programs", [1, 40, 10**6])
def test_dtable_is_right_whatever_its_chunks(programs, monkeypatch, set_tiles, device):
    if reason := why_not("triton", device):
        pytest.skip(reason)
    dtable = pytest.importorskip("dpb_triton.attention.kernels.dtable")
    monkeypatch.setattr(dtable, "PROGRAMS", programs)
    set_tiles(TILES[0] | {"dtable": (16, 16, 4, 1, False, 2)})
    case = Case(batch=3, heads=2, i=70, j=70, options={"is_causal": True})
    check(partial(bias_attention, backend="triton"), case, device)


class TestWhichRowServes:
    """Rows of `blocks.py` that serve only some calls, on Hopper. The interpreter uses Hopper's constants too."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch):
        monkeypatch.setattr(blocks, "generation", lambda: "hopper")

    def tile(self, kernel, dim, dtype=torch.bfloat16, value_dim=None, **options):
        query, value = (torch.empty(1, 1, 1, d, dtype=dtype) for d in (dim, value_dim or dim))
        return blocks.blocks_of(kernel, query, value, **options)

    @pytest.mark.parametrize("dim", [33, 64, 65, 128])
    def test_descriptors_where_there_may_be_some(self, dim):
        assert self.tile("forward", dim, is_describable=True).is_described
        assert not self.tile("forward", dim).is_described
        assert not self.tile("forward", dim, torch.float32, is_describable=True).is_described
        assert not self.tile("dkdv", dim, is_describable=True).is_described  # dkdv has no such row

    @pytest.mark.parametrize("dim", [16, 32, 129, 256])
    def test_narrow_and_wide_heads_come_by_pointers(self, dim):
        assert not any(self.tile(k, dim, is_describable=True).is_described for k in ("forward", "dq", "dkdv"))
        assert self.tile("dtable", dim, is_describable=True).is_described

    @pytest.mark.parametrize("dims", [(72, 72), (128, 72), (40, 128)])
    def test_padded_heads_have_rows_of_their_own(self, dims):
        head_dim, value_dim = dims
        tile = self.tile("dtable", head_dim, value_dim=value_dim, is_describable=True)
        assert tile.is_described and not self.tile("dtable", 128, is_describable=True).is_described
        assert not self.tile("dtable", head_dim, value_dim=value_dim).is_described
        assert self.tile("dkdv", 72, is_causal=True) != self.tile("dkdv", 128, is_causal=True)
        assert self.tile("dkdv", 72) == self.tile("dkdv", 128)

    def test_uneven_heads_have_rows_of_their_own(self):
        rows = blocks.BLOCKS["hopper"]
        for dims, kind in (
            ((64, 128), "uneven"), ((96, 40), "uneven"), ((128, 24), "half narrow"), ((16, 256), "half narrow"),
        ):  # fmt: skip
            column = 1 if max(dims) <= 128 else 2
            for head_dim, value_dim in (dims, dims[::-1]):
                tile = self.tile("dkdv", head_dim, value_dim=value_dim, is_causal=True)
                assert tile == blocks.Tile(*rows[f"dkdv {kind}"][column]), dims
        assert self.tile("dkdv", 192, value_dim=128) == blocks.Tile(*rows["dkdv"][2])
        assert self.tile("dkdv", 48, value_dim=20) == blocks.Tile(*rows["dkdv"][0])

    def test_narrow_heads_have_rows_of_their_own(self):
        assert self.tile("dkdv", 32) == blocks.Tile(*blocks.BLOCKS["hopper"]["dkdv narrow"][0])
        assert self.tile("dkdv", 64) == blocks.Tile(*blocks.BLOCKS["hopper"]["dkdv"][0])
        assert self.tile("dtable", 16) == blocks.Tile(*blocks.BLOCKS["hopper"]["dtable narrow"][0])

    @pytest.mark.parametrize(
        ("more", "is_causal"),
        [({}, False), ({"is_causal": True}, True), ({"window": (9, 0)}, False), ({"softcap": 5.0}, False),
         ({"dropout_p": 0.5}, False), ({"kv_heads": 1, "enable_gqa": True}, False)],
    )  # fmt: skip
    def test_causal_calls_have_rows_of_their_own(self, more, is_causal, monkeypatch, device):
        if reason := why_not("triton", device):
            pytest.skip(reason)
        seen = {}
        backward = importlib.import_module("dpb_triton.attention.kernels.backward")

        def spy(kernel, query, value, *calls):
            seen[kernel] = calls[2]
            return blocks.blocks_of(kernel, query, value, *calls)

        monkeypatch.setattr(backward, "blocks_of", spy)
        more = {"is_causal": "window" not in more} | more if more else {}
        heads = more.pop("kv_heads", 2)
        query, key, value = (torch.randn(1, n, 17, 8, device=device, requires_grad=True) for n in (2, heads, heads))
        table = torch.randn(2, 17, device=device)
        bias_attention(query, key, value, table, backend="triton", **more).sum().backward()
        assert set(seen.values()) == {is_causal}
        assert self.tile("dkdv", 128, is_causal=True) != self.tile("dkdv", 128)
        assert self.tile("dkdv", 32, is_causal=True) == self.tile("dkdv", 32)

    def test_dropout_comes_before_all_others(self):
        row = blocks.BLOCKS["hopper"]["dkdv dropout"]
        assert self.tile("dkdv", 32, has_dropout=True) == blocks.Tile(*row[0])
        assert self.tile("dkdv", 128, has_dropout=True) == self.tile("dkdv", 128)  # that row serves heads up to 64 wide
