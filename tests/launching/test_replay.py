# SPDX-License-Identifier: MIT
"""The tensors that a repeated call makes but does not return lie side by side in one block."""

import pytest
import torch

pytest.importorskip("triton", reason="launching needs the extra `triton`")

from dpb_triton.launching import replay


def test_the_tensors_in_a_block_share_nothing():
    tensors = [
        torch.empty(3, dtype=torch.float32),
        torch.empty_strided((2, 5, 7), (70, 7, 1), dtype=torch.bfloat16),
        torch.empty(1, dtype=torch.int32),
        torch.empty(8, 128, dtype=torch.float64),
    ]
    (function, arguments), places = replay._block(tensors)
    block = function(*arguments)
    assert (block.dtype, block.dim()) == (torch.uint8, 1)
    assert all(place % replay.BLOCK_BYTES == 0 for place in places)
    for place, tensor, end in zip(places, tensors, [*places[1:], block.numel()], strict=True):
        assert place + tensor.untyped_storage().nbytes() <= end


def test_no_block_for_nothing():
    assert replay._block([]) == (None, [])


@pytest.mark.parametrize("stride", [(12, 4, 1), (1, 2, 6)])
def test_an_allocation_is_torchs(stride):
    function, arguments = replay._allocation((2, 3, 4), stride, torch.float16, torch.device("cpu"))
    made = function(*arguments)
    assert (made.shape, made.stride(), made.dtype) == ((2, 3, 4), stride, torch.float16)
    assert not made.requires_grad
