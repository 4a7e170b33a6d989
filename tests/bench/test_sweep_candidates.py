# SPDX-License-Identifier: MIT
"""`python -m bench sweep`: the tiles that are worth compiling, and their order."""

import itertools

import pytest
from sweep_results import GROUP

for module in ("triton", "click", "tabulate", "tqdm"):
    pytest.importorskip(module, reason="the command needs the extras `triton` and `bench`")


from bench.codegen.promises import shared_limit  # noqa: E402
from bench.sweep.candidates import KERNELS, VARIANTS, Candidate, candidates, elements  # noqa: E402


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_group_has_candidates_that_fit(kernel, width, dtype, arch):
    found = candidates(kernel, width, dtype, arch)
    assert len(set(found)) == len(found) >= 1
    for candidate in found:
        registers, stage, _ = elements(candidate, width)
        lanes = candidate.warps * (64 if arch == "gfx942" else 32)
        assert registers / lanes < (512 if arch == "gfx942" else 255)
        assert stage * (4 if dtype == "fp32" else 2) <= shared_limit(arch)
        assert candidate.block_m + candidate.bands * candidate.block_n <= 256  # the padding of the bias table


def test_the_first_candidates_are_large_tiles():
    """The dkdv tile with the shortest measured loop at width 64 must come early."""
    first = [candidate.blocks for candidate in candidates(*GROUP)][:12]
    assert (64, 64, 4, 2) in first


def test_equal_constants_make_equal_candidates():
    """The constants after the stages end with the last one that is not the default."""
    for more, kept in (
        ((), ()), ((False, 1, 0, False), ()), ((True, 1, 0, False), (True,)), ((False, 2, 0), (False, 2)),
        ((False, 1, 0, True), (False, 1, 0, True)), ((True, 1, 168, False), (True, 1, 168)),
    ):  # fmt: skip
        found = Candidate.of("dq", (64, 32, 4, 2, *more))
        assert found == Candidate("dq", 64, 32, 4, 2, kept)
        assert found.blocks == (64, 32, 4, 2, *kept)
        assert found.bands == (2 if 2 in kept else 1)


def test_what_a_tile_holds():
    """Of 2 queries, 3 keys and 5 columns: accumulators and score tiles, a stage's rows, the rows that stay."""
    found = {kernel: elements(Candidate(kernel, 2, 3, 4, 2), 5) for kernel in KERNELS}
    assert found == {
        "forward": (2 * 5 + 6, 2 * 15, 10),  # out and scores; a key and a value; the query
        "dkdv": (2 * 15 + 2 * 6, 2 * 10, 2 * 15),  # dk and dv, scores and dp; query and dout; key and value
        "dq": (10 + 2 * 6, 2 * 15, 2 * 10),
        "dtable": (4 * 6, 2 * 10 + 2 * 15, 0),
    }
    assert elements(Candidate("dtable", 2, 3, 4, 2, (False, 2)), 5) == (6 * 6, 2 * 10 + 2 * 30, 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_only_what_cannot_work_is_left_out(kernel, width, dtype, arch):
    lanes, registers = 64 if arch == "gfx942" else 32, 512 if arch == "gfx942" else 255
    sizes, expected = (16, 32, 64, 128), set()
    for m, n, warps, stages in itertools.product(sizes, sizes, (2, 4, 8), (1, 2, 3)):
        for more in VARIANTS[kernel] if arch == "sm_90" else [()]:
            candidate = Candidate(kernel, m, n, warps, stages, more)
            numbers, stage, stays = elements(candidate, width)
            held = {"sm_80": stages * stage, "sm_90": stages * stage + stays, "gfx942": max(stages - 1, 1) * stage}
            fits = held[arch] * (4 if dtype == "fp32" else 2) <= shared_limit(arch)
            fits &= numbers / (warps * lanes) <= 0.85 * registers
            fits &= m * n >= warps * lanes and m + candidate.bands * n <= 256
            if fits and not (warps == 2 and arch == "sm_90" and dtype == "bf16"):  # wgmma takes four warps
                expected.add(candidate)
    assert set(candidates(kernel, width, dtype, arch)) == expected


@pytest.mark.parametrize(
    ("kernel", "width", "arch", "full"),
    [
        ("forward", 64, "sm_90", 0.6), ("dq", 256, "sm_100", 0.6), ("forward", 128, "sm_80", 0.4),
        ("forward", 256, "sm_80", 0.3), ("dkdv", 64, "gfx942", 0.4), ("dtable", 64, "sm_90", 0.25),
    ],
)  # fmt: skip
def test_the_first_candidates_fill_the_registers_but_not_too_much(kernel, width, arch, full):
    """Too full is twice as bad. Two stages come before three and one, and four warps before eight and two."""
    found = candidates(kernel, width, "bf16", arch)
    lanes, most = (64, 512) if arch == "gfx942" else (32, 255)
    parts = [
        elements(candidate, width)[0] / candidate.warps / lanes / most
        for candidate in found
        if (candidate.warps, candidate.stages, candidate.more) == (4, 2, ())
    ]
    off = [max(full - part, 2 * (part - full)) for part in parts]
    assert len(off) > 4 and off == sorted(off)
    for one, two in itertools.combinations(found, 2):
        if (one.block_m, one.block_n, one.warps, one.more) == (two.block_m, two.block_n, two.warps, two.more):
            assert (2, 3, 1).index(one.stages) < (2, 3, 1).index(two.stages)
    if kernel == "forward" and width <= 128:
        tiles = [(64, 64, 4, 2), (128, 64, 8, 2)] + ([(32, 64, 2, 2)] if arch == "sm_80" else [])
        places = [[candidate.blocks for candidate in found].index(tile) for tile in tiles]
        assert places == sorted(places)


def test_an_amd_pipeline_holds_one_stage_less_in_shared_memory():
    """Otherwise tiles that fit would be left out."""
    found = candidates("forward", 128, "bf16", "gfx942")
    held = [(2 * elements(c, 128)[1] * max(c.stages - 1, 1), 2 * elements(c, 128)[1] * c.stages) for c in found]
    limit = shared_limit("gfx942")
    assert max(less for less, _ in held) <= limit < max(all_stages for _, all_stages in held)
