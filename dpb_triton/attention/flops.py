# SPDX-License-Identifier: MIT
"""FLOP formulas of the attention operators, for `torch.utils.flop_counter.FlopCounterMode`.

They count as torch counts its own flash attention, so that the numbers compare: matrix products only, 2 FLOPs per
multiply-add, for all i * j pairs, including those that causality or a window excludes.

    forward    q k^T, p v                                            2 i j (head_dim + value_dim)      per head
    backward   q k^T again, dout v^T, p^T dout, ds k, ds^T q         2 i j (3 head_dim + 2 value_dim)  per head

Expand and reduce have no formula: they multiply nothing, and torch does not count sums. The module of torch's registry
also imports Triton and takes 0.15 s, so the formulas are registered only when other code imports that module.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

import torch

from ..dispatch import suffixes_of
from . import ops

COUNTER = "torch.utils.flop_counter"


def forward_flops(query, value, pairs):
    """FLOPs of two products: q k^T and p v."""
    return 2 * query.shape[1] * pairs * (query.shape[3] + value.shape[3])


def backward_flops(query, value, pairs):
    """FLOPs of five products: the scores again, and four for the gradients, whether or not all are needed."""
    return 2 * query.shape[1] * pairs * (3 * query.shape[3] + 2 * value.shape[3])


def count_pairs(query, key, seqlens, longest_query, longest_key, **_):
    """The number of (query, key) pairs of one head, summed over the batch or over packed sequences."""
    if seqlens is None:
        return query.shape[0] * query.shape[2] * key.shape[2]
    from torch._subclasses.fake_tensor import is_fake

    if is_fake(seqlens) or seqlens.is_meta:  # no numbers: like torch, count every sequence as the longest
        return seqlens.shape[0] * longest_query * longest_key
    return sum(i * j for _, i, _, j, _ in seqlens.tolist())


# {operator: (FLOPs of (query, value, pairs), pairs of its arguments)}; other files add theirs
FORMULAS = {"attention_forward": (forward_flops, count_pairs), "attention_backward": (backward_flops, count_pairs)}


def register_formulas():
    """Register the formulas with torch."""
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        for suffix in suffixes_of(ops.BACKENDS):
            packet = getattr(torch.ops.dpb_triton, name + suffix)
            register_flop_formula(packet, get_raw=True)(_formula_of(packet, *formula))


def _formula_of(packet, formula, count_pairs):
    """`formula` as a function of the operator's arguments, which it finds by their names in the schema."""
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args, out_val=None, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        return formula(given["query"], given["value"], count_pairs(**given))

    return count


class _RegisterOnImport(MetaPathFinder):
    """Import hook: finds torch's module as Python does, and registers the formulas after the module has run."""

    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                register_formulas()

            spec.loader.exec_module = execute_and_register
        return spec


def register_with_counter():
    """Register the formulas now if torch's registry is loaded, else as soon as it is."""
    if COUNTER in sys.modules:
        register_formulas()
    else:
        sys.meta_path.insert(0, _RegisterOnImport())
