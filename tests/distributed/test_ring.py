# SPDX-License-Identifier: MIT
"""The parts of the ring that need no processes: how results merge, what a message holds, the seeds of dropout."""

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch is built without torch.distributed", allow_module_level=True)

from dpb_triton.distributed.ring import GRADIENTS, KEYS, Hop, Shard, merge
from dpb_triton.distributed.seeds import seed_of


def splitmix64(seed):
    """The outputs of Steele et al.'s generator, as Vigna's C code has it (prng.di.unimi.it/splitmix64.c)."""
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def test_seeds_are_splitmix64():
    assert f"{next(splitmix64(0)):x}" == "e220a8397b1dcdaf"
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789):
        for number, expected in zip(range(9), splitmix64(seed % 2**64), strict=False):
            found = seed_of(torch.tensor([seed]), number)
            assert found.dtype == torch.int64 and found.shape == (1,)
            assert int(found) % 2**64 == expected


def test_results_of_parts_merge_into_the_whole():
    """Whatever the order and the size of the scores, and with rows that see no key in a part or at all."""
    generator = torch.Generator().manual_seed(0)
    scores = 300 * torch.randn(2, 3, 7, 12, generator=generator, dtype=torch.float64)
    scores[:, :, 1, :5] = -torch.inf  # in the first part
    scores[:, :, 2, 5:] = -torch.inf  # in all parts but the first
    scores[:, :, 3] = -torch.inf
    value = torch.randn(2, 3, 12, 4, generator=generator, dtype=torch.float64)

    def attention(part):
        largest = scores[..., part].amax(3)
        weights = (scores[..., part] - largest.masked_fill(largest == -torch.inf, 0)[..., None]).exp2()
        total = weights.sum(3)
        out = weights @ value[:, :, part] / total.masked_fill(total == 0, 1)[..., None]
        return out, torch.stack([largest, total])

    out, state = torch.zeros(2, 3, 7, 4, dtype=torch.float64), torch.zeros(2, 2, 3, 7, dtype=torch.float64)
    state[0] = -torch.inf
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        merge(out, state, *attention(part))
    expected_out, (largest, total) = attention(slice(None))
    torch.testing.assert_close(out, expected_out, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state[0], largest, atol=0, rtol=0)
    torch.testing.assert_close(state[1], total, atol=1e-12, rtol=1e-12)
    assert not out[:, :, 3].any() and not state[1][:, :, 3].any()


def test_merging_rounds_nothing_to_the_parts_dtype():
    out, state = torch.zeros(1, 1, 1, 1), torch.tensor([[[[-torch.inf]]], [[[0.0]]]])
    for value in (256.0, 1.0, 1.0, 1.0):
        merge(out, state, torch.full((1, 1, 1, 1), value, dtype=torch.bfloat16), torch.tensor([[[[0.0]]], [[[1.0]]]]))
    assert out.item() == pytest.approx(259 / 4, rel=1e-6)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_message_holds_the_keys(has_bias):
    key = torch.randn(2, 3, 5, 7).bfloat16()
    value, key_bias = torch.randn(2, 3, 5, 6).bfloat16(), torch.randn(2, 5) if has_bias else None
    shard = Shard.of(key, value, key_bias)
    aligned = [-(-n // 256) * 256 for n in (key.numel() * 2, value.numel() * 2, 10 * 4 if has_bias else 0)]
    assert shard.flat.dtype == torch.uint8 and len(shard.flat) == sum(aligned)
    other = shard.like(5)
    other.flat.copy_(shard.flat)  # as it arrives
    found = other.keys(slice(1, 4))
    expected = key[:, :, 1:4], value[:, :, 1:4], key_bias[:, 1:4] if has_bias else None
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is theirs is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))
    key.zero_()
    assert shard.tensors["key"].any(), "a message is a copy"
    assert [len(shard.like(n).flat) for n in (0, 6)] == [
        1,
        sum(-(-n * 6 // 5 // 256) * 256 for n in (420, 360, 40)[: 2 + has_bias]),
    ]
    assert shard.like(4).tensors["value"].shape == (2, 3, 4, 6)


@pytest.mark.parametrize(("needs_dkv", "needs_dkey_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_message_of_gradients_holds_those_that_are_needed(needs_dkv, needs_dkey_bias):
    key, value = torch.randn(2, 3, 5, 7).bfloat16(), torch.randn(2, 3, 5, 6).bfloat16()
    shard = Shard.gradients(key, value, torch.float32, needs_dkv, needs_dkey_bias)
    shapes = {"key": key.shape, "value": value.shape} if needs_dkv else {}
    shapes |= {"key_bias": (2, 3, 5)} if needs_dkey_bias else {}
    assert {name: tuple(x.shape) for name, x in shard.tensors.items()} == {n: tuple(s) for n, s in shapes.items()}
    assert all(x.dtype == torch.float32 and not x.any() for x in shard.tensors.values())
    for number, rows in enumerate((slice(1, 4), slice(2, 5))):
        shard.add(rows, *(torch.full(shape, number + 1.0) for shape in ((2, 3, 3, 7), (2, 3, 3, 6), (2, 3, 3))))
    for x in shard.tensors.values():
        assert x.reshape(2, 3, 5, -1)[1, 2, :, 0].tolist() == [0, 1, 3, 3, 2]


def test_a_hop_waits_for_all_that_it_started():
    waited = []

    class Request:
        def wait(self):
            waited.append(self)

    outgoing, incoming, requests = object(), object(), [Request(), Request()]
    hop = Hop(outgoing, incoming, requests)
    assert hop.wait() is incoming and waited == requests and hop.outgoing is outgoing
    assert KEYS != GRADIENTS
