# SPDX-License-Identifier: MIT
"""Call the compiled attention kernels with sizes that meet every cut: `python fuzz_cuts.py CALLS SEED`.

Rows, keys, columns, heads and sequences are cut into strips, panels, blocks, chunks, splits and parts. Each result must
agree with torch's path in float64, and must have the same bits with any number of threads. This comparison is weaker
than that of `fuzz_attention.py`, but takes a hundredth of the time.
A part of the calls has NaN or Inf somewhere. Then the results must be finite at the same places.
"""

import random
import sys
from functools import partial
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

import attention_oracle
import fuzz_attention
from attention_oracle import Case

from dpb_triton import bias_attention, bias_attention_varlen

DIMS = (1, 3, 8, 9, 16, 17, 24, 31, 33, 40, 64)
TABLES = ("normal", "normal", "zero", "steep", "masked", "all masked")
# Rounding, relative to the largest number of a result. A forgotten or misplaced term is larger.
TOLERANCE = {torch.float32: 6e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# The ranges of i and j in which a call is cut there, or not yet
LENGTHS = {
    "strips and panels": ((1, 30), (1, 70)),
    "blocks": ((1, 120), (120, 530)),
    "chunks": ((193, 420), (230, 300)),
    "parts of the keys": ((9, 30), (1024, 1160)),
    "decoding": ((1, 9), (1, 300)),
    "splits of a decoding step": ((1, 3), (2048, 2110)),
}


def draw_lengths(kind):
    return [random.randint(*side) for side in LENGTHS[kind]]


def draw_heads(kind):
    kv_heads, group = random.choice([1, 1, 2, 3]), random.choice([1, 2, 3])
    if kind in ("strips and panels", "decoding"):
        kv_heads, group = random.choice([1, 2, 3, 9]), random.choice([1, 1, 2, 3, 4, 5, 8])
    return {"heads": kv_heads * group, "kv_heads": kv_heads}


def draw_options(i, j):
    """Random options; each of them hides pairs in about a fourth of the calls."""
    options = {name: True for name in ("is_causal", "signed") if random.random() < 0.3}
    if random.random() < 0.3:
        options["window"] = tuple(random.choice([None, 0, random.randint(0, max(i, j)), 2**62]) for _ in range(2))
    if random.random() < 0.2:
        options["softcap"] = random.choice([0.7, 5.0])
    if random.random() < 0.2:
        options["dropout_p"] = random.choice([0.2, 0.6])
    if random.random() < 0.2:
        options["scale"] = random.choice([0.0, -0.2, 1.0])
    return options


def draw_case(kind, i, j, options):
    head_dim = random.choice(DIMS)
    return Case(
        i=i, j=j, **draw_heads(kind), head_dim=head_dim, value_dim=random.choice([None, random.choice(DIMS)]),
        dtype=random.choice([*TOLERANCE, torch.float32]), layout=random.choice(attention_oracle.LAYOUTS),
        table=random.choice(TABLES), spare=random.choice([0, 2]), options=options, has_dlse=random.random() < 0.5,
        seed=random.randrange(2**31),
        batch=random.choice([1, 2, 3, 5] if max(i, j) < 100 else [1, 2]),
    )  # fmt: skip


def compare(function, case, tensors, options, is_finite=True):
    """`function(backend, tensors…)` by the compiled kernels, on 1 and 3 threads, against torch's path in float64.

    The gradients of all of query, key, value and table are wanted, or of some of them.
    """

    wanted = random.choice([range(4), range(4), random.sample(range(4), random.randint(1, 3))])

    def call(backend, *tensors, **options):
        return function(backend, *(x if k in wanted else x.detach() for k, x in enumerate(tensors)), **options)

    def results(backend, tensors, threads):
        torch.set_num_threads(threads)
        torch.manual_seed(case.seed)  # of dropout
        with attention_oracle.poison():
            return attention_oracle.run(partial(call, backend), *tensors, **options)

    ours = results("cpp", tensors, 1)
    again = results("cpp", tensors, 3)
    exact = results("torch", [None if x is None else x.double() for x in tensors], 1)
    for name, expected in exact.items():
        if expected is None:
            assert ours[name] is None, name
            continue
        found, accumulator = ours[name].double(), name in ("lse", "dtable", "dmask")
        assert ours[name].dtype == (torch.float32 if accumulator else case.dtype), name
        if is_finite:
            assert torch.equal(ours[name], again[name]), f"{name}: 3 threads give other bits than 1"
        assert torch.equal(found.isneginf() & (name == "lse"), expected.isneginf() & (name == "lse")), name
        finite = expected.isfinite()
        assert torch.equal(found.isfinite(), finite), f"{name}: {(found.isfinite() != finite).nonzero()[:3].tolist()}"
        if finite.any():
            error, size = (found - expected)[finite].abs().max(), expected[finite].abs().max()
            size = max(size, SIZES.get(name, 0.1))
            assert error <= TOLERANCE[case.dtype] * size, f"{name}: error {error:.3g} of {size:.3g}"


# Below this size a result is the difference of larger terms.
SIZES = {"lse": 1, "dq": 1, "dk": 1, "dtable": 8, "dmask": 4}


def spoil(tensors):
    """Write NaN or Inf at one place, most often in a key or value that some queries see and others do not."""
    query, key, value, table, *rest = tensors
    tensor = random.choice([query, key, key, value, value, table, *(x for x in rest if x is not None)])
    number = random.choice([torch.nan, torch.nan, torch.inf, -torch.inf])
    if tensor is table and number == torch.inf:
        return  # softmax makes NaN of it, and a rounding decides where
    place = [random.randrange(n) for n in tensor.shape]
    if tensor is key or tensor is value:
        place[2] = random.choice([0, -1, place[2]])
    tensor[tuple(place)] = number


def dense(kind, is_finite=True):
    i, j = draw_lengths(kind)
    options = draw_options(i, j) | {"offset": random.choice([j - i, random.randint(-i - 3, j + 3)])}
    case = draw_case(kind, i, j, options)
    options = options | fuzz_attention.mask(case.batch, j) | {"enable_gqa": True}
    tensors = list(case.draw())
    if not is_finite:
        window = random.randint(0, 30), random.randint(0, 30)
        options |= random.choice([{"is_causal": True}, {"window": window}, {"window": window}, {}])
        tensors = [None if x is None else x.clone() for x in tensors]
        spoil(tensors)
    compare(lambda backend, *a, **o: bias_attention(*a, backend=backend, **o), case, tensors, options, is_finite)


def packed(kind):
    lengths = [draw_lengths(kind)] + [draw_lengths("strips and panels") for _ in range(random.choice([1, 2, 4]))]
    lengths.insert(random.randrange(len(lengths)), random.choice([(0, 3), (3, 0), (1, 1)]))
    offsets = [random.choice([j - i, random.randint(-i - 3, j + 3)]) for i, j in lengths]
    total = [sum(length[side] for length in lengths) for side in (0, 1)]
    options = draw_options(*total)
    case = draw_case("packed", *total, options | {"offset": 0})
    case = Case(**vars(case) | {"batch": 1})
    n = max(max(i + at, j - at, 1) for (i, j), at in zip(lengths, offsets, strict=True))
    table = Case(**vars(case) | {"i": n, "j": n}).draw()[3]
    tensors = list(case.draw())
    tensors[3] = table
    cu = [torch.tensor([0, *(length[side] for length in lengths)]).cumsum(0).int() for side in (0, 1)]

    def call(backend, query, key, value, table, return_lse, **options):
        out, lse = bias_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)), table, *cu, return_lse=return_lse,
            offsets=torch.tensor(offsets, dtype=torch.int32), backend=backend, **options,
        )  # fmt: skip
        return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]

    compare(call, case, tensors, options | fuzz_attention.mask(total[1]) | {"enable_gqa": True})


def main(count, seed):
    """Each kind of lengths gets its share of the calls."""
    random.seed(seed)
    fuzz_attention.count_calls()
    for call in range(count):
        kind = list(LENGTHS)[call % len(LENGTHS)]
        how = random.choice(["dense", "dense", "packed", "spoiled", "spoiled"])
        try:
            fuzz_attention.may_give_up = how == "spoiled"
            if how == "packed":
                packed(kind)
            else:
                dense(kind, how == "dense")
        except BaseException:
            print(f"call {call} of seed {seed}: {how}, {kind}", file=sys.stderr)
            raise
    print(f"{fuzz_attention.calls} kernel calls")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
