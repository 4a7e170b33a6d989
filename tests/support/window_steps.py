# SPDX-License-Identifier: MIT
"""The steps of a window that moves along the diagonal: a kernel stores what it computes, a loop over them checks it."""

import triton
import triton.language as tl


@triton.jit
def store_steps(ptr, enter, inside, outside, leave):
    """Write the four numbers to `ptr` and behind it."""
    tl.store(ptr, enter)
    tl.store(ptr + 1, inside)
    tl.store(ptr + 2, outside)
    tl.store(ptr + 3, leave)


def check_steps(found, case, *, start, rows, height, width, seen, plain, chunk):
    """[enter, leave) are the steps of `chunk` that meet a column of `seen`, [inside, outside) those that need no mask.

    The window has `height` rows and `width` columns, and step k begins in row k * height and column start + k * height.
    It needs no mask if all its rows are among `rows`, and all its columns in `plain`. seen, plain, chunk: (begin, end).
    """
    enter, inside, outside, leave = found
    columns = {k: start + k * height for k in range(*chunk) if k * height < rows}
    met = [k for k, y in columns.items() if y < seen[1] and y + width > seen[0]]
    whole = [k for k in met if plain[0] <= columns[k] <= plain[1] - width and (k + 1) * height <= rows]
    assert [*range(enter, leave)] == met, case
    assert [*range(inside, outside)] == whole, case
