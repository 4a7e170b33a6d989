# SPDX-License-Identifier: MIT
"""Call the operators directly with random arguments, valid and invalid: `python fuzz.py CALLS SEED [LIBRARY]`.

An accepted call must agree with the torch implementation bit for bit, with one thread and with three; a refused call
must raise an exception. Most gradients hold small integers, whose sums are exact, and rarely NaN or Inf.
tests/csrc/test_csrc.py runs this file under AddressSanitizer, between guard pages, and with a LIBRARY that has the CUDA
kernels for the host. Prints how many calls were accepted.
"""

import random
import sys

import pytest
import torch

from dpb_triton import dispatch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
# Sizes that nobody can allocate.
NONSENSE = [-1, -7, -(2**31), 2**45, 2**60, 2**61, -(2**61), 2**63 - 1, -(2**63)]
# Rows and columns that the kernels cut into tasks for several threads, into chunks, and into blocks of the fold.
LARGE = [(3, 1030), (70, 600), (300, 130), (1100, 3), (1030, 9), (40, 1025), (2049, 1), (130, 257)]


def size(most=40):
    """A small size, rarely nonsense."""
    return random.choice(NONSENSE) if random.random() < 0.05 else random.randint(0, most)


def tensor(dim):
    """A tensor of random shape, dtype and strides; rarely with another rank, an odd dtype, or too small a storage."""
    if random.random() < 0.05:
        dim = random.randint(0, 4)
    dtype = random.choice(ODD_DTYPES) if random.random() < 0.05 else random.choice(DTYPES)
    sizes = [0, 1, 2, 3, 7, 8, 9, 17, 40, 64, 65, *[random.randint(2, 80) for _ in range(10)]]
    shape = [random.choice([0, 1, 2, 3, 4, 16]), *random.choices(sizes, k=max(dim - 1, 0))]
    if dim == 3 and random.random() < 0.05:
        shape = [random.choice([1, 2, 3]), *random.choice(LARGE)]
    if dim == 2 and random.random() < 0.05:
        shape = [random.choice([1, 2, 3]), random.choice([1025, 1301])]
    return lay_out(torch.randint(-8, 9, shape[:dim]).to(dtype))


def lay_out(values):
    """The same numbers, or a part of them repeated, in memory of random strides and address."""
    kind, shape, dim = random.random(), values.shape, values.dim()
    if values.is_floating_point() and values.numel() and random.random() < 0.1:
        values.view(-1)[random.randrange(values.numel())] = random.choice([torch.nan, torch.inf, -torch.inf])
    if kind < 0.3:  # a slice of something wider
        wide = torch.empty([n + random.choice([0, 0, 1, 3]) for n in shape], dtype=values.dtype)
        starts = [random.randint(0, m - n) for m, n in zip(wide.shape, shape, strict=True)]
        return wide[tuple(slice(at, at + n) for at, n in zip(starts, shape, strict=True))].copy_(values)
    if kind < 0.45 and dim > 1:
        return values.permute(random.sample(range(dim), dim))
    if kind < 0.55 and dim > 1:  # rows or columns that lie in another order
        order = random.sample(range(dim), dim)
        inverse = sorted(range(dim), key=order.__getitem__)
        return values.permute(order).contiguous().permute(inverse)
    if kind < 0.65 and values.numel():
        part = values[tuple(slice(0, 1) if random.random() < 0.5 else slice(None) for _ in shape)]
        return part.expand(shape)
    if kind < 0.75 and dim and shape[-1]:  # columns apart
        wide = torch.empty([*shape[:-1], shape[-1] * 3], dtype=values.dtype)
        return wide[..., 1::3].copy_(values)
    if kind < 0.9 and values.numel():
        return shifted(values)
    if kind < 0.93:
        size = values.untyped_storage().nbytes()
        values.untyped_storage().resize_(random.choice([0, 1, max(size - 1, 0), max(size - values.element_size(), 0)]))
    return values


def is_inside(tensor):
    """Whether every element lies in the tensor's storage."""
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def shifted(values):
    """The same numbers from any byte on, as in a mapped file, to the end of their memory."""
    shift = random.randint(1, 17)
    memory = torch.empty(values.numel() * values.element_size() + shift, dtype=torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=values.dtype, offset=shift).view(values.shape).copy_(values)


def expand_arguments():
    """Arguments of expand; in half of the calls the table fits."""
    table = tensor(2)
    signed = random.random() < 0.5
    i, j, offset = size(), size(), size(20) - 10
    if random.random() < 0.6 and table.dim() == 2 and table.shape[1]:
        n = (table.shape[1] + 1) // 2 if signed else table.shape[1]
        i = random.randint(0, n)
        offset = random.randint(-3, n - i)
        j = random.randint(0, max(n + offset, 0))
        # most fit, one needs all distances, and two need one more
        grids = (i, j), (i, j), (n - offset, max(n + offset, 0)), (n - offset + 1, j), (i, n + offset + 1)
        i, j = random.choice(grids)
    return table, i, j, offset, signed, random.choice(DTYPES + ODD_DTYPES[:2])


def reduce_arguments():
    """Arguments of reduce; in 70% of the calls n fits."""
    dbias = tensor(3)
    n, offset = size(140), size(20) - 10
    if random.random() < 0.7 and dbias.dim() == 3:
        i, j = dbias.shape[1:]
        offset = random.randint(-5, 5) + j - i
        n = max(i + offset, j - offset, 0) + random.choice([-1, 0, 0, 0, 1, 3])
    return dbias, n, offset, random.random() < 0.5, random.choice(DTYPES + ODD_DTYPES[:2])


def agrees(actual, name, arguments):
    """Whether the torch implementation gives the same bits; reduce in float64, so that its sums are exact too."""
    dtype = arguments[-1]
    if name == "reduce":
        arguments = arguments[0].double(), *arguments[1:-1], torch.float64
    expected = dispatch.OPERATORS[name + "_torch"](*arguments).to(dtype)
    assert actual.shape == expected.shape and actual.dtype == dtype, arguments
    numbers = [actual.nan_to_num(nan=7e3, posinf=torch.inf, neginf=-torch.inf) for actual in (actual, expected)]
    return torch.equal(*numbers)


def rounds(operator, dbias, *arguments):
    """Sums that depend on their order have the same bits with any number of threads, and in float64 are exact."""
    third = dbias.double().mul(1 / 3).to(dbias.dtype)
    both = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        both.append(operator(third, *arguments).nan_to_num(nan=7e3))
    torch.set_num_threads(1)
    assert torch.equal(*both), "3 threads give other bits than 1"
    if arguments[-1] == torch.float64:
        exact = dispatch.OPERATORS["reduce_torch"](third.double(), *arguments).nan_to_num(nan=7e3)
        torch.testing.assert_close(both[0], exact, rtol=1e-12, atol=1e-12)


def refuse_many_blocks():
    """2^32 blocks of threads would wrap around to none."""
    table = torch.ones(1, 1, dtype=torch.float16).expand(2**32, 1)
    with pytest.raises(RuntimeError, match="more than a grid holds|cannot allocate"):
        dispatch.OPERATORS["expand_cuda"](table, 1, 1, 0, False, torch.float16)


def main(calls, seed, library=None):
    """Each operator gets half of the calls."""
    if library:
        torch.ops.load_library(library)
        refuse_many_blocks()
    random.seed(seed)
    torch.manual_seed(seed)
    accepted = 0
    for call in range(calls):
        name, arguments = ("expand", expand_arguments()) if call % 2 else ("reduce", reduce_arguments())
        operator = dispatch.OPERATORS[name + ("_cuda" if library else "")]
        torch.set_num_threads(random.choice([1, 1, 3]))
        try:
            actual = operator(*arguments)
        except (RuntimeError, MemoryError, OverflowError):
            continue
        finally:
            torch.set_num_threads(1)
        accepted += 1
        try:
            assert is_inside(arguments[0]), "the storage is too small"
            assert not library or arguments[0].data_ptr() % arguments[0].element_size() == 0, "no address for a GPU"
            assert agrees(actual, name, arguments)
            if name == "reduce" and (arguments[0].numel() > 2**15 or arguments[-1] == torch.float64):
                rounds(operator, *arguments)
        except BaseException:
            tensor = arguments[0]
            place = tensor.shape, tensor.stride(), tensor.data_ptr() % 64, tensor.dtype
            print(f"call {call} of seed {seed}: {name}", *place, *arguments[1:], file=sys.stderr)
            raise
    print(f"{accepted} of {calls} calls accepted")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
