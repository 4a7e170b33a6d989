# SPDX-License-Identifier: MIT
"""Dropout's seeds of several processes: one seed from torch's generator becomes a seed for each rank or pair of slabs.

The processes usually have torch's generator in the same state. With the same seed they would drop the same weights of
different heads or positions.
"""

_GOLDEN, _FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def seed_of(seed, number):
    """The seed of stream `number`: int64 (1,), by splitmix64 (Steele et al. 2014), whose 64 bits are an int64's."""
    mixed = seed + _int64((number + 1) * _GOLDEN)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        mixed = (mixed ^ _shifted(mixed, shift)) * _int64(factor)
    return mixed ^ _shifted(mixed, 31)


def _shifted(value, bits):
    """The unsigned value's right shift."""
    return (value >> bits) & ((1 << 64 - bits) - 1)


def _int64(value):
    """The int64 with the low 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
