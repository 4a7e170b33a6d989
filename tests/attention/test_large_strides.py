# SPDX-License-Identifier: MIT
"""Tensors whose rows lie 2^25 to 2^30 elements apart, as in a slice of a large tensor, and more elements or pairs than
int32 can count.

The tests write the rows only, so the machine never provides the memory between them.
"""

import importlib
from functools import partial

import attention_oracle
import pytest
import torch
from attention_oracle import FAR, FARTHER, Case, empty_far_apart, far_apart
from quick import slow

from dpb_triton import bias_attention, bias_attention_varlen, dispatch

ROW = 2**25 - 8  # elements between two rows: 65 rows reach beyond element 2^31


@pytest.mark.parametrize(
    "options", [slow({}), {"is_causal": True}, slow({"softcap": 2.0}), {"window": (3, 1)}], ids=str
)
@pytest.mark.parametrize("dim", [2, 3])
def test_attention(dim, options, attention_backend, device):
    query, key, value, table, dout, _ = Case(i=34, j=34, head_dim=34, dtype=torch.bfloat16, has_dlse=False).draw(device)
    attend = partial(bias_attention, backend=attention_backend)
    near = attention_oracle.run(attend, query, key, value, table, dout, **options)
    tensors = [far_apart(x, dim) for x in (query, key, value)]
    far = attention_oracle.run(attend, *tensors, table, far_apart(dout, dim), **options)
    assert all(torch.equal(tensor, near[name]) for name, tensor in far.items())


# A row's number times its stride needs 64 bits in the first tiles; a row's place in its tile does in the second ones.
@pytest.mark.parametrize("tile", [(16, 16, 4, 1), (128, 128, 8, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [8, 9])  # rows of whole 16 bytes, or not
def test_rows_of_tritons_tiles(head_dim, tile, set_tiles, far_results, device):
    """Rows as far apart as the kernels take them without a copy, also of the results."""
    skip_without_memory("triton", device)
    set_tiles(dict.fromkeys(("forward", "dkdv", "dq", "dtable"), tile))
    case = Case(heads=1, i=81, j=81, head_dim=head_dim, dtype=torch.bfloat16, has_dlse=False)
    query, key, value, table, dout, _ = case.draw(device)
    options = {"window": (2, 1), "backend": "triton"}
    near = attention_oracle.run(bias_attention, query, key, value, table, dout, **options)
    launch = far_results(2, ROW)
    tensors = [far_apart(x, 2, ROW) for x in (query, key, value, dout)]
    assert all(launch.whole_rows(x) is x for x in tensors)
    *tensors, dout = tensors
    far = attention_oracle.run(bias_attention, *tensors, table, dout, **options)
    assert all(torch.equal(tensor, near[name]) for name, tensor in far.items())


@pytest.mark.parametrize("tile", [(16, 16, 4, 1), (128, 128, 8, 1)], ids=str)
def test_rows_of_packed_sequences(tile, set_tiles, device):
    """The second sequence begins beyond element 2^31."""
    skip_without_memory("triton", device)
    set_tiles(dict.fromkeys(("forward", "dkdv", "dq", "dtable"), tile))
    tensors = [torch.randn(75, 2, 8, device=device) for _ in range(3)]
    table, cu = torch.randn(2, 3, device=device), torch.tensor([0, 70, 75], dtype=torch.int32, device=device)
    results = []
    for place in (torch.clone, lambda x: far_apart(x, 0, ROW)):
        leaves = [*(place(x).requires_grad_() for x in tensors), table.clone().requires_grad_()]
        out = bias_attention_varlen(*leaves, cu, cu, window=(2, 1), backend="triton")
        grads = torch.autograd.grad(out, leaves, place(torch.ones_like(out)))
        results.append((out.detach(), *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dim", [0, 1])
def test_batches_and_heads(dim, far_results, set_tiles, attention_backend, device):
    """Three batch elements, or three heads, of every input and every result reach beyond element 2^31."""
    skip_without_memory(attention_backend, device)
    if attention_backend == "triton":
        set_tiles(dict.fromkeys(("forward", "dkdv", "dq", "dtable"), (16, 16, 4, 1)))
    case = Case(batch=(3, 1)[dim], heads=(1, 3)[dim], i=5, j=7, head_dim=8, dtype=torch.bfloat16)
    query, key, value, _, dout, dlse = case.draw(device)
    table, mask = torch.randn(case.heads, 3, device=device), torch.randn(case.batch, 7, device=device)
    attend = partial(bias_attention, backend=attention_backend)
    options = {"window": (2, 0), "key_padding_mask": mask}
    near = attention_oracle.run(attend, query, key, value, table, dout, dlse, **options)
    if attention_backend == "triton":
        far_results(dim, FARTHER)
    query, key, value, dout = (far_apart(x, dim, FARTHER) for x in (query, key, value, dout))
    dlse = dlse.transpose(1, 2).contiguous().transpose(1, 2)
    table = far_apart(table, 1 - dim, FARTHER)  # it has no batch: there its columns are far apart
    far = attention_oracle.run(attend, query, key, value, table, dout, dlse, **options)
    assert all(torch.equal(tensor, near[name]) for name, tensor in far.items())


def skip_without_memory(backend, device):
    if reason := dispatch.why_not(backend, device):
        pytest.skip(reason)
    if device != "cpu":
        pytest.skip("the test needs memory that is reserved but never touched; a GPU has none")


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("dim", "stride"), [(0, FARTHER), (1, 2**29 + 8)])
def test_the_key_bias(dim, stride, is_packed, device):
    """The operator's, because `bias_attention` makes a new tensor of a mask."""
    skip_without_memory("triton", device)
    bias = importlib.import_module("dpb_triton.attention.kernels.bias")
    key_bias = torch.arange(30.0, device=device).view(-1, 10 if is_packed else 6)[: 1 if is_packed else 3]
    key_bias, seqlens = key_bias.masked_fill(key_bias == 9, 0), None
    if is_packed:
        seqlens = torch.tensor([[0, 1, 0, 7, 0], [1, 1, 7, 3, 0]], dtype=torch.int32, device=device)
    near, far = (bias.pad_key_bias(x, seqlens) for x in (key_bias, far_apart(key_bias, dim, stride)))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@pytest.fixture
def far_results(monkeypatch):
    """A function that makes the kernels' results lie far apart from then on, in dimension `dim`."""
    launch = pytest.importorskip("dpb_triton.attention.kernels.launch", reason="Triton is not installed")
    modules = [launch, *(importlib.import_module(f"dpb_triton.attention.kernels.{x}") for x in ("forward", "backward"))]

    def install(dim, stride):
        def like(tensor, width=None):
            return empty_far_apart((*tensor.shape[:3], width or tensor.shape[3]), dim, stride, tensor)

        def empty_results(query, value_dim):
            batch, heads, i, _ = query.shape
            numbers = torch.empty(0, dtype=torch.float32)
            if dim == 2:  # rows of lse are contiguous
                lse, state = numbers.new_empty(batch, heads, i), numbers.new_empty(2, batch, heads, i)
            else:
                lse = empty_far_apart((batch, heads, i), dim, stride, numbers)
                halves = i * (heads if dim == 0 else batch)  # the halves of state lie side by side
                state = numbers.new_empty(stride * 2 + 2 * halves)
                state = state.as_strided((2, batch, heads, i), (halves, *lse.stride()))
            return like(query, value_dim), lse, state

        for module in modules:
            for name, function in (("like", like), ("empty_results", empty_results)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, function)
        return launch

    return install


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim", "stride"),
    # the last one: rows of one window of 16 rows. test_integers.py has columns
    [((3, 9, 20), 0, FARTHER), ((2, 34, 20), 1, FAR), ((1, 18, 20), 1, 2**28 + 8)],
    ids=str,
)
def test_reduce(shape, dim, stride, signed, backend, device):
    skip_without_memory(backend, device)
    dbias = torch.randint(-9, 9, shape, device=device).to(torch.bfloat16)  # their sums are exact
    reduce = dispatch.OPERATORS["reduce" + dispatch.SUFFIXES[backend]]
    near, far = (reduce(x, 34, 0, signed, torch.float32) for x in (dbias, far_apart(dbias, dim, stride)))
    assert torch.equal(near, far)


@pytest.mark.parametrize("shape", [(1, 40, 20), (2, 40, 20)], ids=str)
def test_reduce_of_many_row_chunks(shape, device):
    """A program's first row, not its number, times the stride needs 64 bits."""
    skip_without_memory("triton", device)
    kernels = importlib.import_module("dpb_triton.expand.triton_kernels")
    dbias = torch.randint(-9, 9, shape, device=device).to(torch.bfloat16)
    options = {"block_m": 8, "block_n": 32, "rows": 8}
    far = kernels.reduce(far_apart(dbias, 1, FAR), 40, 0, True, torch.float32, **options)
    assert torch.equal(far, kernels.reduce(dbias, 40, 0, True, torch.float32, **options))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_expand(dim, signed, backend, device):
    table = torch.randn(2 if dim else 34, 67, device=device)
    expand = dispatch.OPERATORS["expand" + dispatch.SUFFIXES[backend]]
    assert torch.equal(*(expand(x, 5, 20, 7, signed, torch.float32) for x in (table, far_apart(table, dim))))


# (heads, i, j, options): more than 2^31 elements before the last head, row chunk, step, row of a window, column
MANY = {
    "heads": (3, 2**15, 2**15 + 71, {}),
    "row chunks": (1, 1024 + 40, 2**21 + 71, {}),
    "steps": (1, 1024, 2**21 + 2**17, {"block_m": 16, "block_n": 64, "rows": 1024}),
    "rows of a window": (1, 128, 2**24 + 2**18, {}),
    "rows of a window, shifted": (1, 128, 2**24 + 2**18 + 71, {}),
}


@pytest.mark.parametrize("name", MANY)
def test_expand_to_more_elements_than_int32_counts(name, monkeypatch, device):
    """Only the programs of the last head's last row chunk run, and of these only three bands and the first."""
    skip_without_memory("triton", device)
    kernels = importlib.import_module("dpb_triton.expand.triton_kernels")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    heads, i, j, options = MANY[name]
    rows = options.get("rows") or kernels.rows_per_program(heads, i, j)
    block_n = options.get("block_n") or kernels.window_of(2, rows)[1]
    bands, chunks = -(-(j + rows) // block_n), -(-i // rows)
    chosen = [0, bands - 1 - rows // block_n, bands - rows // block_n, bands - 1]
    pids = [(heads * chunks - 1) * bands + band for band in chosen]

    launch, builder = kernels.launch, interpreter.interpreter_builder
    monkeypatch.setattr(kernels, "launch", lambda kernel, grid, *a, **o: launch(kernel, (len(pids),), *a, **o))
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: setattr(builder, "grid_idx", (pids[x], y, z)))
    table = torch.arange(1, j + i + 1).remainder(251).add(1).bfloat16().expand(heads, -1)
    bias = kernels.expand(table, i, j, 0, False, torch.bfloat16, **options)
    first = (chunks - 1) * rows
    written = torch.zeros(i - first, dtype=torch.int64)
    for start in {0, j - 3 * rows}:  # the columns that these bands may write
        part = bias[-1, first:, start : start + 3 * rows]
        x, y = torch.arange(first, i)[:, None], torch.arange(start, start + part.shape[1])
        is_written = part != 0
        written += is_written.sum(1)
        assert torch.equal(part, torch.where(is_written, table[-1, (x - y).abs()], 0))
    assert written.max() >= 2 * block_n and written[-1] >= block_n, written


def test_more_pairs_than_int32_counts():
    """65,537 queries and keys; each query sees two keys."""
    n = (1 << 16) + 1
    query, key, value = torch.randn(3, 1, 1, n, 4)
    table = torch.tensor([[0.5, -0.5]], requires_grad=True)
    leaves = [x.requires_grad_() for x in (query, key, value, table)]
    out = bias_attention(*leaves, window=(1, 0), backend="torch")
    scores = [(query[:, :, 1:] * key[:, :, y : n - 1 + y]).sum(-1) / 2 + table[0, 1 - y] for y in (0, 1)]
    p = torch.stack(scores, -1).softmax(-1)
    expected = p[..., :1] * value[:, :, : n - 1] + p[..., 1:] * value[:, :, 1:]
    expected = torch.cat([value[:, :, :1], expected], 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, leaves, dout) for x in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3)
