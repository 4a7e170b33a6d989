# SPDX-License-Identifier: MIT
"""What `torch.utils.flop_counter.FlopCounterMode` counts for the attention operators.

As torch counts its own flash attention, so that the two compare: the products of matrices only, 2 FLOPs a factor, of
all i * j pairs, also those that causality or a window leaves out.

    forward    q k^T, p v                                            2 i j (head_dim + value_dim)      a head
    backward   q k^T again, dout v^T, p^T dout, ds k, ds^T q         2 i j (3 head_dim + 2 value_dim)  a head

Expand and reduce multiply nothing, and torch counts no sums: they have no formula. The module with torch's registry
takes 0.15 s to import, Triton with it, so the formulas are registered when somebody else imports it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

import torch

from ..dispatch import suffixes_of
from . import ops

COUNTER = "torch.utils.flop_counter"


def forward_flops(query, value, pairs):
    """Two products: q k^T and p v."""
    return 2 * query.shape[1] * pairs * (query.shape[3] + value.shape[3])


def backward_flops(query, value, pairs):
    """Five products: the scores once more, and four for gradients, whichever of them are asked for."""
    return 2 * query.shape[1] * pairs * (3 * query.shape[3] + 2 * value.shape[3])


def count_pairs(query, key, seqlens, longest_query, longest_key, **_):
    """Pairs of a query and a key of one head, summed over the batch or over packed sequences."""
    if seqlens is None:
        return query.shape[0] * query.shape[2] * key.shape[2]
    from torch._subclasses.fake_tensor import is_fake

    if is_fake(seqlens) or seqlens.is_meta:  # no numbers: torch too takes each sequence for the longest then
        return seqlens.shape[0] * longest_query * longest_key
    return sum(i * j for _, i, _, j, _ in seqlens.tolist())


FORMULAS = {"attention_forward": forward_flops, "attention_backward": backward_flops}


def register_formulas():
    """Tell torch's registry."""
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        for suffix in suffixes_of(ops.BACKENDS):
            packet = getattr(torch.ops.dpb_triton, name + suffix)
            register_flop_formula(packet, get_raw=True)(_formula_of(packet, formula))


def _formula_of(packet, formula):
    """`formula` of the operator's arguments, by the names that its schema gives them."""
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args, out_val=None, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        return formula(given["query"], given["value"], count_pairs(**given))

    return count


class _RegisterOnImport(MetaPathFinder):
    """Finds the one module, where Python does, and has the formulas registered behind its own."""

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
    """Register the formulas: now if torch's registry is loaded, else as soon as it is."""
    if COUNTER in sys.modules:
        register_formulas()
    else:
        sys.meta_path.insert(0, _RegisterOnImport())
