# SPDX-License-Identifier: MIT
"""Call the operators directly with random arguments, valid and invalid: `python fuzz.py CALLS SEED`.

An accepted call must agree with the torch implementation; a refused call must raise an exception.
tests/csrc/test_csrc.py runs this file under AddressSanitizer. Prints how many calls were accepted.
"""

import random
import sys

import torch

from dpb_triton import dispatch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
# Sizes that nobody can allocate.
NONSENSE = [-1, -7, -(2**31), 2**45, 2**60, 2**61, -(2**61), 2**63 - 1, -(2**63)]


def size(most=40):
    """A small size, rarely nonsense."""
    return random.choice(NONSENSE) if random.random() < 0.05 else random.randint(0, most)


def tensor(dim):
    """A tensor of random shape, dtype and strides; rarely with another rank, an odd dtype, or too small a storage."""
    if random.random() < 0.05:
        dim = random.randint(0, 4)
    dtype = random.choice(ODD_DTYPES) if random.random() < 0.05 else random.choice(DTYPES)
    shape = [random.choice([0, 1, 2, 3, 4, 16])] + [
        random.choice([0, 1, 2, 3, 8, 9, 17, 40, 64, 65]) for _ in range(dim - 1)
    ]
    shape = shape[:dim]
    values = torch.randn([n + random.choice([0, 0, 3]) for n in shape]).to(dtype)
    values = values[tuple(slice(random.randint(0, m - n), None) for m, n in zip(values.shape, shape, strict=True))]
    values = values[tuple(slice(0, n) for n in shape)]
    kind = random.random()
    if kind < 0.2 and dim > 1:
        order = random.sample(range(dim), dim)
        values = values.permute(order)
    elif kind < 0.3:
        values = torch.randn(()).to(dtype).expand(shape)
    elif kind < 0.33:
        values = misaligned(values)
    elif kind < 0.36:
        values = values.clone()
        values.untyped_storage().resize_(random.choice([0, 1, 5]))
    return values


def misaligned(values):
    """The same numbers, one byte after an element boundary, as in a memory-mapped file."""
    if values.numel() == 0:
        return values
    memory = bytearray(values.numel() * values.element_size() + 1)
    return torch.frombuffer(memory, dtype=values.dtype, offset=1).view(values.shape).copy_(values)


def expand_arguments():
    """Arguments of expand; in half of the calls the table fits."""
    table = tensor(2)
    signed = random.random() < 0.5
    i, j, offset = size(), size(), size(20) - 10
    if random.random() < 0.5 and table.dim() == 2 and table.shape[1]:
        n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
        i = random.randint(0, n)
        offset = random.randint(-3, n - i)
        j = max(random.randint(0, max(n + offset, 0)), 0)
    return table, i, j, offset, signed, random.choice(DTYPES + ODD_DTYPES[:2])


def reduce_arguments():
    """Arguments of reduce; in 70% of the calls n fits."""
    dbias = tensor(3)
    n, offset = size(140), size(20) - 10
    if random.random() < 0.7 and dbias.dim() == 3:
        i, j = dbias.shape[1:]
        offset = random.randint(-5, 5) + j - i
        n = max(i + offset, j - offset, 0) + random.randint(0, 3)
    return dbias, n, offset, random.random() < 0.5, random.choice(DTYPES + ODD_DTYPES[:2])


def main(calls, seed):
    """Each operator gets half of the calls."""
    random.seed(seed)
    torch.manual_seed(seed)
    accepted = 0
    for call in range(calls):
        name, arguments = ("expand", expand_arguments()) if call % 2 else ("reduce", reduce_arguments())
        try:
            actual = dispatch.OPERATORS[name](*arguments)
        except (RuntimeError, MemoryError, OverflowError):
            continue
        accepted += 1
        expected = dispatch.OPERATORS[name + "_torch"](*arguments)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype, arguments
        if name == "expand":
            assert torch.equal(actual, expected), arguments
        else:
            tolerance = 4 * torch.finfo(actual.dtype).eps if actual.dtype != torch.float64 else 1e-12
            scale = arguments[0].double().abs().sum().item() + 1
            error = (actual.double() - expected.double()).abs()
            assert error.numel() == 0 or error.max().item() <= tolerance * scale, arguments
    print(f"{accepted} of {calls} calls accepted")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
