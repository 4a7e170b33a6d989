# SPDX-License-Identifier: MIT
"""Call the compiled attention kernels with random arguments: `python fuzz_attention.py CALLS SEED`.

Each result must agree with the definition in float64, forward and backward, and must come from the kernels: all numbers
are finite, so torch may not take over. Packed sequences that reach beyond their tensors must raise. tests/csrc/
test_csrc.py runs this file under AddressSanitizer, and on builds for each instruction set. PYTHONPATH names the build.
"""

import random
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.append(str(Path(__file__).parents[1] / "support"))

import attention_oracle
from attention_oracle import Case

from dpb_triton import bias_attention, bias_attention_varlen, dispatch, reference
from dpb_triton.attention import cpp_path

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 2, 3, 8, 15, 16, 17, 30, 31, 32, 33, 40, 48, 64, 65, 100, 256)
INT32 = (0, 1, 7, 100, 2**31 - 1, -1, -(2**31))
calls = 0  # of the kernels
may_give_up = False  # whether torch's path may take over, because not all numbers are finite


def count_calls():
    """Count the kernels' calls, and forbid torch's path to take over."""

    def counted(kernel):
        def call(*arguments):
            global calls
            calls += 1
            return kernel(*arguments)

        return call

    def refused(function, first):
        def call(*arguments):
            query, key = arguments[first : first + 2]
            assert may_give_up or query.numel() * key.numel() == 0, "the kernels gave up, though all numbers are finite"
            return function(*arguments)

        return call

    kernels, path = cpp_path._C, cpp_path.torch_path
    # where the package has no extension beside it, an editable install would find another one
    assert Path(kernels.__file__).parent == Path(dispatch.__file__).parent
    cpp_path._C = SimpleNamespace(
        attention_forward=counted(kernels.attention_forward), attention_backward=counted(kernels.attention_backward)
    )
    cpp_path.torch_path = SimpleNamespace(
        like=path.like, forward=refused(path.forward, 0), backward=refused(path.backward, 2)
    )


def options_of(lengths):
    """Random options that fit every sequence of `lengths`."""
    options = {name: True for name in ("is_causal", "signed") if random.random() < 0.4}
    if random.random() < 0.3:
        longest = max(max(length[:2]) for length in lengths)
        options["window"] = tuple(random.choice([None, 0, random.randint(0, longest), 2**62]) for _ in range(2))
    if random.random() < 0.25:
        options["softcap"] = random.choice([0.3, 2.0, 30.0])
    if random.random() < 0.25:
        options["dropout_p"] = random.choice([0.1, 0.5, 0.9])
    if random.random() < 0.1:
        options["scale"] = random.choice([0.0, -0.2, 1.0])
    return options


def heads():
    kv_heads = random.choice([1, 1, 2, 3])
    return {"heads": kv_heads * random.choice([1, 1, 2, 3, 8]), "kv_heads": kv_heads}


def common(options):
    return {
        "head_dim": random.choice(DIMS), "value_dim": random.choice([None, random.choice(DIMS)]),
        "dtype": random.choice(DTYPES), "layout": random.choice(attention_oracle.LAYOUTS),
        "table": random.choice(attention_oracle.TABLES), "spare": random.choice([0, 3]), "options": options,
        "has_dlse": random.random() < 0.5, "seed": random.randrange(2**31),
    }  # fmt: skip


def mask(*shape):
    """None, a key padding mask with holes or hidden ends, or a floating one."""
    kind = random.choice(["none", "none", "holes", "ends", "floats"])
    if kind == "none" or 0 in shape:
        return {}
    hidden = torch.rand(shape) < random.choice([0.1, 0.9])
    if kind == "ends":
        first = random.randint(0, shape[-1])
        keys = torch.arange(shape[-1])
        hidden = ((keys < first) | (keys > random.randint(first, shape[-1]))).expand(shape).clone()
    if kind == "floats":
        return {"key_padding_mask": torch.randn(shape).masked_fill(hidden, -torch.inf)}
    return {"key_padding_mask": hidden}


def lengths_of_a_call():
    """(i, j, offset): a few tokens, a block or two, a decoding step, many keys, none."""
    kind = random.random()
    if kind < 0.5:
        i, j = random.randint(1, 40), random.randint(1, 70)
    elif kind < 0.65:
        i, j = random.randint(60, 140), random.randint(60, 300)
    elif kind < 0.85:
        i, j = random.randint(1, 4), random.choice([random.randint(1, 300), random.randint(1000, 3000)])
    elif kind < 0.92:
        i, j = random.randint(5, 20), random.randint(1000, 1700)
    else:
        i, j = random.choice([0, 1, 5]), random.choice([0, 0, 3])
    return i, j, random.choice([j - i, random.randint(-i - 5, j + 5)])


def dense():
    """One dense call against the definition."""
    i, j, offset = lengths_of_a_call()
    options = options_of([(i, j)])
    batch = random.choice([1, 1, 2, 3])
    case = common(options | {"offset": offset} | mask(batch, j))
    case = Case(batch=batch, i=i, j=j, **heads(), **case)
    keep, dropout_p = None, options.get("dropout_p", 0)
    torch.manual_seed(case.seed)
    if dropout_p:
        seed = attention_oracle.seed_of(case.seed, "cpu")
        keep = attention_oracle.dropout_keep(seed, batch, case.heads, i, j, dropout_p)
        torch.manual_seed(case.seed)
    attention_oracle.check(partial(bias_attention, backend="cpp"), case, keep=keep, rounds_out=True)


def packed():
    """One call of packed sequences against the definition of each."""
    lengths = [lengths_of_a_call()[:2] for _ in range(random.choice([1, 2, 2, 4]))]
    lengths = [(min(i, 40), min(j, 200)) if n else (i, j) for n, (i, j) in enumerate(lengths)]
    offsets = [random.choice([j - i, random.randint(-i - 5, j + 5)]) for i, j in lengths]
    options = options_of(lengths)
    total = [sum(length[side] for length in lengths) for side in (0, 1)]
    options |= mask(total[1])
    hidden, dropout_p = options.get("key_padding_mask"), options.get("dropout_p", 0)
    case = Case(i=total[0], j=total[1], **heads(), **common({"offset": 0}))
    query, key, value, _, dout, dlse = case.draw()
    n = max([1, *(max(i + at, j - at) for (i, j), at in zip(lengths, offsets, strict=True))])
    table = Case(**vars(case) | {"i": n, "j": n, "options": options}).draw()[3]
    cu = [torch.tensor([0, *(length[side] for length in lengths)]).cumsum(0).int() for side in (0, 1)]
    longest = max(i for i, _ in lengths) + random.choice([0, 5])
    torch.manual_seed(case.seed)
    keeps = [None] * len(lengths)
    if dropout_p:
        seed = attention_oracle.seed_of(case.seed, "cpu")
        torch.manual_seed(case.seed)
        longest = min(longest, total[0])
        keeps = [
            attention_oracle.dropout_keep(seed, number + 1, case.heads, i, j, dropout_p, longest)[number:]
            for number, (i, j) in enumerate(lengths)
        ]
    shared = options | {"enable_gqa": True}
    shared.pop("key_padding_mask", None)

    def ours(query, key, value, table, return_lse, **mask):
        out, lse = bias_attention_varlen(
            *(x[0].transpose(0, 1) for x in (query, key, value)), table, *cu, return_lse=return_lse,
            offsets=torch.tensor(offsets, dtype=torch.int32), max_seqlen_q=longest, backend="cpp", **shared, **mask,
        )  # fmt: skip
        return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]

    def parts():
        for number, ((i, j), offset) in enumerate(zip(lengths, offsets, strict=True)):
            x, y = cu[0][number], cu[1][number]
            yield slice(x, x + i), slice(y, y + j), offset, keeps[number]

    def eager(query, key, value, table, return_lse, key_padding_mask=None):
        results = []
        for x, y, offset, keep in parts():
            one = {} if key_padding_mask is None else {"key_padding_mask": key_padding_mask[None, y]}
            keep = None if keep is None else torch.from_numpy(keep)
            qkv = query[:, :, x], key[:, :, y], value[:, :, y]
            one |= shared | {"offset": offset, "keep": keep}
            results.append(reference.attention(*qkv, table, return_lse=return_lse, **one))
        return [torch.cat(part, 2) for part in zip(*results, strict=True)]

    exact = []
    for x, y, offset, keep in parts():
        one = options | {"offset": offset} | ({} if hidden is None else {"key_padding_mask": hidden[None, y]})
        rows = query[:, :, x], key[:, :, y], value[:, :, y], table, dout[:, :, x]
        exact.append(attention_oracle.attention(*rows, None if dlse is None else dlse[:, :, x], options=one, keep=keep))
    whole = {}
    for name in exact[0]:
        both = [torch.stack if name == "dtable" else torch.cat for _ in range(2)]
        dim = {"dtable": 0, "dmask": 1}.get(name, 2)
        whole[name] = tuple(join([one[name][k] for one in exact], dim) for k, join in enumerate(both))
    whole["dtable"] = tuple(tensor.sum(0) for tensor in whole["dtable"])
    if "dmask" in whole:
        whole["dmask"] = tuple(tensor[0] for tensor in whole["dmask"])
    given = {} if hidden is None else {"key_padding_mask": hidden}
    expected = attention_oracle.run(eager, query, key, value, table, dout, dlse, **given)
    torch.manual_seed(case.seed)
    with attention_oracle.poison():
        actual = attention_oracle.run(ours, query, key, value, table, dout, dlse, **given)
    attention_oracle.assert_within_budget(actual, whole, expected, case.dtype, rounds_out=True)


def far():
    """An offset so far that a bound hides every pair: no result, no gradient, and no address out of range."""
    options = {"window": (random.choice([3, 2**40, 2**59]),) * 2, "signed": random.random() < 0.5}
    case = Case(**heads(), i=random.choice([1, 20]), **common(options))
    tensors = case.draw()
    offset = random.choice([2**60, -(2**60)])
    results = attention_oracle.run(
        partial(bias_attention, backend="cpp"), *tensors, offset=offset, enable_gqa=True, **options
    )
    assert (results.pop("lse") == -torch.inf).all()
    assert all((tensor == 0).all() for tensor in results.values())


def nonsense():
    """Packed sequences with random places: what has no room is refused, the rest is only computed."""
    i, j, count = random.randint(1, 100), random.randint(1, 100), random.randint(1, 3)
    query, key = torch.randn(1, 2, i, 8), torch.randn(1, 2, j, 8)
    table = torch.randn(2, 399)
    numbers = [[random.choice([*INT32, random.randint(0, 100)]) for _ in range(4)] for _ in range(count)]
    has_room = all(min(s) >= 0 and s[0] + s[1] <= i and s[2] + s[3] <= j for s in numbers)
    seqlens = torch.tensor([[*s, 0] for s in numbers], dtype=torch.int32)
    arguments = query, key, key, table, None
    options = seqlens, None, i, j, 0, True, None, None, 0.3, 0.0, 0.0
    operators = dispatch.OPERATORS
    error = None
    try:
        out, _, state = operators["attention_forward"](*arguments, *options)
        operators["attention_backward"](out, None, *arguments, out, state, *options, False, True, True, True, False)
    except RuntimeError as caught:
        error = str(caught)
    assert has_room if error is None else not has_room and "has no room" in error, (numbers, error)


def main(count, seed):
    count_calls()
    random.seed(seed)
    torch.manual_seed(seed)
    for call in range(count):
        torch.set_num_threads(random.choice([1, 2, 3]))
        state = random.getstate()
        kind = random.choice([dense, dense, dense, packed, far, nonsense])
        try:
            kind()
        except Exception:
            print(f"call {call} of seed {seed}, {kind.__name__}, random state {hash(state)}", file=sys.stderr)
            raise
    print(f"{calls} kernel calls")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
