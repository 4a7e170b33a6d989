# SPDX-License-Identifier: MIT
"""The Triton attention kernels with small tiles: small grids then have edges, whole tiles, several bands and chunks."""

import importlib
import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from attention_oracle import Case, check, dropout_keep, run, seed_of
from quick import slow

from dpb_triton import bias_attention
from dpb_triton.dispatch import why_not

blocks = pytest.importorskip("dpb_triton.attention.kernels.blocks", reason="Triton is not installed")
replay = pytest.importorskip("dpb_triton.launching.replay")

TILES = [
    {"forward": (16, 16, 4, 1), "dkdv": (16, 16, 4, 1), "dq": (16, 16, 4, 1), "dtable": (16, 16, 4, 1)},
    {"forward": (32, 16, 4, 1), "dkdv": (16, 32, 4, 1), "dq": (16, 32, 4, 1), "dtable": (32, 16, 4, 1, False, 2)},
]
# A key bias that is 0 from key 17 to key 46, so that tiles of 16 keys just miss it on both sides
ZEROS = torch.linspace(-2, 2, 160).view(2, 80)
ZEROS[:, 17:47] = 0
FIRST, LAST = torch.arange(80) < 15, torch.arange(80) >= 65
CASES = {
    "plain": Case(heads=1, i=50, j=62),
    "causal": Case(i=63, j=63, options={"is_causal": True}),
    # queries of a tile see 17 keys before a whole tile, or 17 keys after one: both edges are a key too long to be whole
    "edges": Case(heads=1, i=48, j=80, options={"window": (30, 14)}),
    "window": Case(i=50, j=81, options={"window": (21, 18), "signed": True}),
    "key bias": Case(batch=2, heads=2, kv_heads=1, i=34, j=80, options={"key_padding_mask": ZEROS, "offset": 31}),
    "hidden ends": Case(
        batch=2,
        heads=1,
        i=34,
        j=80,
        head_dim=8,
        options={"key_padding_mask": torch.where(torch.stack((FIRST, LAST)), -torch.inf, ZEROS), "window": (40, 36)},
    ),
    "dropout": Case(
        batch=2,
        heads=4,
        kv_heads=2,
        i=34,
        j=50,
        head_dim=8,
        value_dim=24,
        options={"dropout_p": 0.3, "is_causal": True, "softcap": 0.7},
    ),
    "left": Case(i=50, j=81, options={"window": (40, None)}),
    "right, before the keys": Case(i=80, j=50, options={"window": (None, 20), "offset": -40}),
    "bf16, grouped, batch": Case(batch=2, heads=4, kv_heads=2, i=20, j=40, dtype=torch.bfloat16, layout="transposed"),
    "huge": Case(i=40, j=57, table="huge", options={"softcap": 2.0}),
    "masked": Case(i=48, j=50, table="masked", options={"is_causal": True, "offset": 9}),
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
QUICK = ("window", "bf16, grouped, batch", "key bias", "plain", "causal", "edges", "hidden ends", "dropout", "masked",
         "wide", "wide keys")  # fmt: skip
TILED = [
    (pytest.param if name in (QUICK if tile == "16" else QUICK[:3]) else slow)(name, tiles, id=f"{tile}-{name}")
    for tile, tiles in zip(("16", "long"), TILES, strict=True)
    for name in CASES
]


def check_seeded(case, device):
    """`check`, also with dropout."""
    options, keep = case.options, None
    if "dropout_p" in options:
        keep = dropout_keep(seed_of(5, device), case.batch, case.heads, case.i, case.j, options["dropout_p"])
    if "key_padding_mask" in options:
        options = options | {"key_padding_mask": options["key_padding_mask"].to(device)}

    def attend(*tensors, **options):
        torch.manual_seed(5)
        return bias_attention(*tensors, backend="triton", **options)

    check(attend, replace(case, options=options), device, keep)


@pytest.mark.parametrize(("name", "tiles"), TILED)
def test_small_tiles(name, tiles, set_tiles, device):
    set_tiles(tiles)
    if reason := why_not("triton", device):
        pytest.skip(reason)
    check_seeded(CASES[name], device)


def test_a_table_far_below_zero(set_tiles, device):
    """Pairs beyond the ends have a bias of 0 in the padded table, and so an infinite weight, which a select drops.

    For the maximum of a query beyond the first head's end, backward reads that of the second head's first query.
    """
    if reason := why_not("triton", device):
        pytest.skip(reason)
    set_tiles(TILES[0])
    query, key, value, table, dout, _ = Case(heads=2, i=18, j=19, head_dim=8, spare=2).draw(device)
    near, far = (
        run(partial(bias_attention, backend="triton"), query, key, value, table - height, dout) for height in (0, 1024)
    )
    far["lse"] = far["lse"] + 1024
    for name, expected in near.items():
        torch.testing.assert_close(far[name], expected, atol=2e-3, rtol=2e-3)


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
            tiles = {k: (blocks.Tile(*tile)._replace(is_described=True),) * 3 for k, tile in TILES[1].items()}
            monkeypatch.setitem(constants, generation, tiles)
    check_seeded(DESCRIBED[name], device)
    assert len(made) >= 4  # forward, dq, and two for dtable
    assert all(descriptors is None for descriptors in made) == (name in ("float32", "odd"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"forward": False, "dkdv": False, "dq": False}),
        ({"window": (9, None)}, {"forward": False, "dkdv": False, "dq": False}),  # hides nothing
        ({"window": (2, None)}, {"forward": True, "dkdv": True, "dq": True}),
        ({"window": (None, 2)}, {"forward": True, "dkdv": True, "dq": True}),
        ({"key_padding_mask": torch.zeros(1, 5)}, {"forward": True, "dkdv": False, "dq": True}),
    ],
    ids=str,
)
def test_which_kernels_are_launched_again(options, expected, set_tiles, monkeypatch, device):
    """A pair can be masked by its position or, where queries are rows, by its key."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    launch, launched = importlib.import_module("dpb_triton.attention.kernels.launch"), {}
    monkeypatch.setattr(launch, "REPAIR_WARPS", 16)  # 4 programs of 4 warps
    set_tiles(TILES[0])
    launch_one = launch.launch

    def noted(kernel, grid, *args, config, **more):
        name = kernel.__name__.removeprefix("_").removesuffix("_kernel")
        launched.setdefault(name, []).append((grid, config.IS_REPAIR, more))
        return launch_one(kernel, grid, *args, config=config, **more)

    monkeypatch.setattr(launch, "launch", noted)
    query, key, value = (torch.randn(1, 6, 5, 8, device=device, requires_grad=True) for _ in range(3))
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    out = bias_attention(query, key, value, torch.randn(6, 5, device=device), backend="triton", **options)
    out.sum().backward()
    assert launched.keys() == expected.keys()
    for name, launches in launched.items():
        assert [grid for grid, *_ in launches] == [(6,), (4,)][: 1 + expected[name]]
        assert [is_repair for _, is_repair, _ in launches] == [False, True][: 1 + expected[name]]
        assert all(more == {"num_warps": 4, "num_stages": 1} for *_, more in launches[1:])


def test_a_second_launch_has_no_bound_of_registers(monkeypatch):
    """Its code holds more, and it has one stage."""
    launch, seen = importlib.import_module("dpb_triton.attention.kernels.launch"), []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, *args, config, **more: seen.append((grid, more)))
    tile, config = blocks.Tile(64, 64, 8, 3, registers=168), launch.Config(*[None] * 13, NEEDS_REPAIR=True)
    launch.launch_with_repair(None, 1000, config, tile, (torch.empty(1),), ())
    assert seen == [
        ((1000,), {"num_warps": 8, "num_stages": 3, "maxnreg": 168}),
        ((launch.REPAIR_WARPS // 8,), {"num_warps": 8, "num_stages": 1}),
    ]


def test_which_rows_are_copied():
    """Rows of whole 16 bytes must start at such places; other rows need only contiguous elements, and near rows."""
    launch = importlib.import_module("dpb_triton.attention.kernels.launch")
    memory = torch.zeros(2, 3, 4, 48)
    largest = launch.LARGEST_STRIDE
    far = torch.empty(largest + 4)
    far[:3] = far[-3:] = 0
    kept = {
        "whole": memory, "first columns": memory[..., :40], "later columns": memory[..., 8:], "odd": memory[..., 1:38],
        "heads last": memory.transpose(1, 2), "one row of odd strides": memory.as_strided((1, 1, 1, 8), (3, 5, 7, 1)),
        "one column": memory.as_strided((2, 3, 4, 1), (576, 192, 48, 7)),
        "one far row": memory.as_strided((1, 1, 1, 3), (1, 1, 2**30, 1)),
        "odd strides of an odd width": memory.as_strided((2, 2, 3, 5), (129, 65, 5, 1)),
    }  # fmt: skip
    copied = {
        "off by 4 bytes": memory[..., 1:41], "off by 8 bytes": memory[..., 2:42], "dim first": memory.mT,
        "rows": memory.as_strided((2, 2, 3, 8), (128, 64, 12, 1)),
        "heads": memory.as_strided((2, 2, 3, 8), (128, 36, 8, 1)),
        "batch": memory.as_strided((2, 2, 3, 8), (132, 64, 8, 1)),
        "every second": memory[..., ::2], "far rows": far.as_strided((1, 1, 2, 3), (1, 1, largest + 1, 1)),
    }  # fmt: skip
    assert launch.whole_rows(near := far.as_strided((1, 1, 2, 3), (1, 1, largest, 1))) is near
    for name, tensor in kept.items():
        assert launch.whole_rows(tensor) is tensor, name
    for name, tensor in copied.items():
        made = launch.whole_rows(tensor)
        assert made.data_ptr() != tensor.data_ptr() and made.is_contiguous() and torch.equal(made, tensor), name


def test_bounds_and_reach():
    """A bound is dropped if it hides no pair, and the padded table reaches all pairs that are left."""
    launch, table = importlib.import_module("dpb_triton.attention.kernels.launch"), torch.zeros(1, 13)
    sizes = itertools.product((1, 4), (1, 5), (-3, 0, 1, 6), (None, 0, 1, 3, 4, 9), (None, 0, 1, 3, 4, 9))
    for i, j, offset, left, right in sizes:
        pairs = [y - x - offset for x in range(i) for y in range(j)]
        found = launch.bounds_of(table, None, i, j, offset, left, right)
        hides = (left is not None and min(pairs) < -left, right is not None and max(pairs) > right)
        assert found == (left if hides[0] else None, right if hides[1] else None), (i, j, offset, left, right)
        least, largest = launch.reach_of(table, None, i, j, offset, False, *found)
        seen = [d for d in pairs if (left is None or d >= -left) and (right is None or d <= right)]
        assert not seen or (least, largest) == (min(seen), max(seen)), (i, j, offset, left, right)
        assert seen or least > largest or not hides[0] or not hides[1]
    seqlens = torch.zeros(1, 5)
    assert launch.bounds_of(table, seqlens, 4, 5, 0, 2**62, 9) == (13, 9)
    assert launch.bounds_of(table, seqlens, 4, 5, 0, None, 2**62) == (None, 13)
    assert launch.reach_of(table, seqlens, 4, 5, 0, False, None, None) == (-12, 12)
    assert launch.reach_of(table, seqlens, 4, 5, 0, True, 4, 9) == (-4, 6)


def test_sizes_that_the_kernels_refuse():
    launch = importlib.import_module("dpb_triton.attention.kernels.launch")
    most, wide = launch.LARGEST, launch.LARGEST_STRIDE

    def sizes(query=(1, 1, 2, 8), key=(1, 1, 3, 8), value=(1, 1, 3, 8), width=3, i=2, j=3):
        one = torch.zeros(1)
        launch.check_sizes(*(one.expand(size) for size in (query, key, value, (1, width))), i, j)

    sizes(i=most, j=most, width=most)
    sizes((1, 2, 2, wide // 2))
    for changes, name in (
        ({"i": most + 1}, "i"), ({"j": most + 1}, "j"), ({"width": most + 1}, "the table's width"),
        ({"query": (1, wide, 2, 8)}, "query"), ({"key": (1, 2, 3, wide)}, "key"), ({"value": (1, 2, 3, wide)}, "value"),
        ({"query": (1, 2, 2, 8), "value": (1, 1, 3, wide)}, "query"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must"):
            sizes(**changes)


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
    """The padding holds what a tile reads beyond the ends: its rows or keys, and the block that it prefetches."""
    bias, prologue, launch, tiles = (
        importlib.import_module(f"dpb_triton.attention.kernels.{name}")
        for name in ("bias", "prologue", "launch", "tiles")
    )
    for kernels in (*blocks.BLOCKS.values(), *blocks.FLOAT32.values()):
        for kernel, widths in kernels.items():
            kernel = kernel.split()[0]
            for row in filter(None, widths):
                tile = blocks.Tile(*row)
                window = tile.bands * tile.block_n
                assert tile.block_m + window + max(tile.block_m, tile.block_n) <= bias.PADDING
                assert tile.block_m + window <= tiles.KEY_PADDING.value
                assert 2 * tile.block_m <= prologue.ROW_PADDING
                assert max(tile.block_m, tile.block_n) * launch.LARGEST_STRIDE < 2**32
                assert tile.bands == 1 or kernel == "dtable"
                # Triton takes powers of two only; its products have at least 16 rows
                assert {tile.block_m, tile.block_n} <= {16, 32, 64, 128} and tile.num_warps in (4, 8)
                assert 1 <= tile.num_stages <= 4


@pytest.mark.parametrize(
    ("vendor", "arch", "expected"),
    [("cuda", 80, "ampere"), ("cuda", 89, "ampere"), ("cuda", 90, "hopper"), ("cuda", 100, "blackwell"),
     ("cuda", 120, "blackwell"), ("hip", "gfx942", "cdna")],
)  # fmt: skip
def test_the_generation_of_a_gpu(vendor, arch, expected, monkeypatch):
    monkeypatch.setattr(blocks, "IS_INTERPRETED", False)
    monkeypatch.setattr(blocks, "current_target", lambda: SimpleNamespace(backend=vendor, arch=arch))
    assert blocks.generation() == expected
    assert blocks.padded(65) == 128 and blocks.padded(1) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("generation", ["ampere", "hopper", "cdna"])
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_precision_of_products(setting, generation, dtype, monkeypatch):
    """float32 keeps its bits unless torch's setting says otherwise, and AMD has no tf32; all products get it."""
    launch, tiles = (importlib.import_module(f"dpb_triton.attention.kernels.{name}") for name in ("launch", "tiles"))
    monkeypatch.setattr(launch, "generation", lambda: generation)
    backends = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(fp32_precision=setting)))
    monkeypatch.setattr(launch.torch, "backends", backends)
    precision = launch.precision_of(torch.empty(1, dtype=dtype))
    if dtype == torch.float32:
        assert precision == ("ieee" if generation == "cdna" else {"ieee": "tf32x3", "tf32": "tf32"}[setting])
    else:
        assert precision == "tf32"  # 2-byte types have one product, not in chunks
    assert [tiles.is_wide.fn(width, precision) for width in (64, 128)] == [False, precision != "tf32"]

    products = []
    dot = SimpleNamespace(dot=lambda *operands, **options: products.append((operands, options)))
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "tl", dot)
    config = SimpleNamespace(PRECISION=precision)
    tiles.dot.fn("a", "b", config)
    tiles.dot_add.fn("a", "b", "acc", config)
    options = {"input_precision": precision}
    assert products == [(("a", "b"), options), (("a", "b", "acc"), options)]


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


@pytest.mark.parametrize("programs", [1, 15, 40, 10**6])
def test_dtable_is_right_whatever_its_chunks(programs, monkeypatch, set_tiles, device):
    """15: two chunks of a batch of three."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    dtable = pytest.importorskip("dpb_triton.attention.kernels.dtable")
    monkeypatch.setattr(dtable, "PROGRAMS", programs)
    set_tiles(TILES[0] | {"dtable": (16, 16, 4, 1, False, 2)})
    case = Case(batch=3, heads=2, i=50, j=50, head_dim=8, options={"is_causal": True})
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
            ((64, 128), "uneven"), ((96, 40), "uneven"), ((128, 24), "half narrow"), ((32, 256), "half narrow"),
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
