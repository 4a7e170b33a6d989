# SPDX-License-Identifier: MIT
"""Bad input raises before any kernel starts, and the message names the argument, the value and the expectation."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from dpb_triton import DynamicPositionBias, checks, expand_bias, plot_bias
from dpb_triton.dispatch import BACKENDS, why_not


def table(*shape, **options):
    return torch.randn(*(shape or (2, 10)), **options)


def module(*args, **options):
    return DynamicPositionBias(*(args or (8, 2)), **options)


# name: (call, exception, words that the message must contain)
CASES = {
    "i float": (lambda: expand_bias(table(), 3.0, 4), TypeError, ["i must be an int", "3.0", "float"]),
    "j float": (lambda: expand_bias(table(), 3, 4.5), TypeError, ["j must be an int", "4.5"]),
    "i bool": (lambda: expand_bias(table(), True, 4), TypeError, ["i must be an int", "True", "bool"]),
    "j numpy bool": (lambda: expand_bias(table(), 3, np.True_), TypeError, ["j must be an int"]),
    "i None": (lambda: expand_bias(table(), None, 4), TypeError, ["i must be an int", "None"]),
    "i str": (lambda: expand_bias(table(), "3", 4), TypeError, ["i must be an int", "'3'"]),
    "i tensor": (lambda: expand_bias(table(), torch.tensor(3), 4), TypeError, ["i must be an int", "Tensor"]),
    "j list": (lambda: expand_bias(table(), 3, [4]), TypeError, ["j must be an int", "list"]),
    "i negative": (lambda: expand_bias(table(), -1, 4), ValueError, ["i must be at least 0", "-1"]),
    "j negative": (lambda: expand_bias(table(), 0, -4), ValueError, ["j must be at least 0", "-4"]),
    "j < i": (lambda: expand_bias(table(), 5, 3), ValueError, ["j must be at least i", "i = 5", "j = 3", "offset"]),
    "offset float": (lambda: expand_bias(table(), 3, 4, offset=1.0), TypeError, ["offset must be an int", "1.0"]),
    "offset bool": (lambda: expand_bias(table(), 3, 4, offset=False), TypeError, ["offset must be an int", "False"]),
    "offset far": (lambda: expand_bias(table(), 3, 4, offset=8), ValueError, ["table is too short", "offset = 8", "up to 10", "0 to 9"]),
    "offset far back": (lambda: expand_bias(table(), 3, 4, offset=-9), ValueError, ["table is too short", "offset = -9"]),
    "j beyond": (lambda: expand_bias(table(), 3, 11), ValueError, ["table is too short", "j = 11", "(2, 10)"]),
    "offset huge": (lambda: expand_bias(table(), 3, 4, offset=2**60), ValueError, ["table is too short"]),
    "offset beyond int64": (lambda: expand_bias(table(), 3, 4, offset=2**63), ValueError, ["offset must be between -2^62 and 2^62", str(2**63)]),
    "offset beyond, nothing to fill": (lambda: expand_bias(table(), 0, 4, offset=-(2**63) - 1), ValueError, ["offset", str(-(2**63) - 1)]),
    "i beyond int64": (lambda: expand_bias(table(), 2**63, 0, offset=0), ValueError, ["i must be between 0 and 2^60", str(2**63)]),
    "j beyond int64": (lambda: expand_bias(table(), 0, 10**30), ValueError, ["j must be between 0 and 2^60", str(10**30)]),
    "j maxsize": (lambda: expand_bias(table(), 0, sys.maxsize), ValueError, ["j must be between 0 and 2^60", str(sys.maxsize)]),
    "table empty": (lambda: expand_bias(table(2, 0), 3, 4), ValueError, ["table is too short", "(2, 0)", "holds none"]),
    "table nested": (lambda: expand_bias(torch.nested.nested_tensor([table(4), table(3)]), 1, 1), TypeError, ["table must be a strided", "nested"]),
    "table jagged": (lambda: expand_bias(torch.nested.nested_tensor([table(4), table(3)], layout=torch.jagged), 1, 1), TypeError, ["table must be a strided", "nested"]),
    "i numpy float": (lambda: expand_bias(table(), np.float64(3), 4), TypeError, ["i must be an int", "3.0", "float64"]),
    "i fraction": (lambda: expand_bias(table(), Fraction(3), 4), TypeError, ["i must be an int", "Fraction(3, 1)"]),
    "i numpy array": (lambda: expand_bias(table(), np.array(3), 4), TypeError, ["i must be an int", "array(3)"]),
    "signed int": (lambda: expand_bias(table(), 3, 4, signed=1), TypeError, ["signed must be True or False", "1"]),
    "signed None": (lambda: expand_bias(table(), 3, 4, signed=None), TypeError, ["signed", "None"]),
    "signed even": (lambda: expand_bias(table(), 3, 4, signed=True), ValueError, ["odd number of columns", "(2, 10)"]),
    "signed short": (lambda: expand_bias(table(2, 5), 3, 4, signed=True), ValueError, ["table is too short", "j = 4"]),
    "table list": (lambda: expand_bias([[1.0]], 1, 1), TypeError, ["table must be a Tensor", "list"]),
    "table None": (lambda: expand_bias(None, 1, 1), TypeError, ["table must be a Tensor", "NoneType"]),
    "table numpy": (lambda: expand_bias(np.ones((2, 4)), 1, 1), TypeError, ["table must be a Tensor", "ndarray"]),
    "table module": (lambda: expand_bias(module(), 1, 1), TypeError, ["table must be a Tensor"]),
    "table 1-D": (lambda: expand_bias(table(10), 3, 4), ValueError, ["table must have 2 dimensions", "(10,)"]),
    "table 3-D": (lambda: expand_bias(table(1, 2, 10), 3, 4), ValueError, ["table must have 2 dimensions", "(1, 2, 10)"]),
    "table no heads": (lambda: expand_bias(table(0, 10), 3, 4), ValueError, ["at least one head", "(0, 10)"]),
    "table int": (lambda: expand_bias(table().long(), 3, 4), TypeError, ["table must be float16", "int64"]),
    "table bool": (lambda: expand_bias(table() > 0, 3, 4), TypeError, ["table must be float16", "bool"]),
    "table complex": (lambda: expand_bias(table() * 1j, 3, 4), TypeError, ["table must be float16", "complex64"]),
    "table float8": (lambda: expand_bias(table().to(torch.float8_e5m2), 3, 4), TypeError, ["table must be", "float8"]),
    "table sparse": (lambda: expand_bias(table().to_sparse(), 3, 4), TypeError, ["table must be a strided", "sparse"]),
    "dtype str": (lambda: expand_bias(table(), 3, 4, dtype="bfloat16"), TypeError, ["dtype must be a torch.dtype", "'bfloat16'"]),
    "dtype int": (lambda: expand_bias(table(), 3, 4, dtype=torch.int32), TypeError, ["dtype must be float16", "int32"]),
    "backend unknown": (lambda: expand_bias(table(), 3, 4, backend="tpu"), ValueError, ["backend must be None or one of", "'tpu'", "'triton'"]),
    "backend type": (lambda: expand_bias(table(), 3, 4, backend=3), ValueError, ["backend must be None or one of", "3"]),
    "backend elsewhere": (lambda: expand_bias(table(), 3, 4, backend="cuda"), ValueError, ["backend='cuda' is not available for cpu", "'triton'", "'torch' is available"]),
    "positional offset": (lambda: expand_bias(table(), 3, 4, 1), TypeError, ["positional"]),
    "dim 0": (lambda: module(0, 2), ValueError, ["dim must be at least 1", "0"]),
    "dim float": (lambda: module(8.0, 2), TypeError, ["dim must be an int", "8.0"]),
    "heads -1": (lambda: module(8, -1), ValueError, ["heads must be at least 1", "-1"]),
    "heads bool": (lambda: module(8, True), TypeError, ["heads must be an int", "True"]),
    "depth 0": (lambda: module(8, 2, depth=0), ValueError, ["depth must be at least 1", "0"]),
    "depth None": (lambda: module(8, 2, depth=None), TypeError, ["depth must be an int", "None"]),
    "norm int": (lambda: module(8, 2, norm=1), TypeError, ["norm must be True or False", "1"]),
    "log_distance str": (lambda: module(8, 2, log_distance="yes"), TypeError, ["log_distance", "'yes'"]),
    "signed str": (lambda: module(8, 2, signed="no"), TypeError, ["signed", "'no'"]),
    "module dtype": (lambda: module(8, 2, dtype=torch.int8), TypeError, ["dtype must be float16", "int8"]),
    "forward j < i": (lambda: module()(5, 3), ValueError, ["j must be at least i", "i = 5", "j = 3"]),
    "forward float": (lambda: module()(5.0, 8), TypeError, ["i must be an int", "5.0"]),
    "forward bool": (lambda: module()(0, True), TypeError, ["j must be an int", "True"]),
    "forward negative": (lambda: module()(-2, 8), ValueError, ["i must be at least 0", "-2"]),
    "forward offset": (lambda: module()(2, 8, offset="x"), TypeError, ["offset must be an int", "'x'"]),
    "forward dtype": (lambda: module()(2, 8, dtype=torch.int32), TypeError, ["dtype", "int32"]),
    "forward backend": (lambda: module()(2, 8, backend="gpu"), ValueError, ["backend", "'gpu'"]),
    "forward j beyond": (lambda: module()(3, 2**63), ValueError, ["j must be between 0 and 2^60", str(2**63)]),
    "forward offset beyond": (lambda: module()(3, 4, offset=-(2**70)), ValueError, ["offset must be between", str(-(2**70))]),
    "dim beyond": (lambda: module(2**64, 2), ValueError, ["dim must be between 1 and 2^60", str(2**64)]),
    "table n beyond": (lambda: module().table(2**64), ValueError, ["n must be between 0 and 2^60", str(2**64)]),
    "table n negative": (lambda: module().table(-1), ValueError, ["n must be at least 0", "-1"]),
    "table n float": (lambda: module().table(4.0), TypeError, ["n must be an int", "4.0"]),
    "plot module": (lambda: plot_bias(torch.nn.Linear(1, 1), 4), TypeError, ["module must be a DynamicPositionBias", "Linear"]),
    "plot head": (lambda: plot_bias(module(), 4, head=2), ValueError, ["head must be in 0 .. 1", "2"]),
    "plot head negative": (lambda: plot_bias(module(), 4, head=-1), ValueError, ["head must be in 0 .. 1", "-1"]),
    "plot i beyond": (lambda: plot_bias(module(), 10**30), ValueError, ["i must be between 1 and 2^60", str(10**30)]),
    "plot on meta": (lambda: plot_bias(module(8, 2, device="meta"), 4), ValueError, ["module", "meta"]),
    "plot nothing": (lambda: plot_bias(module(), 0), ValueError, ["i must be at least 1", "0"]),
    "plot no keys": (lambda: plot_bias(module(), 4, 0), ValueError, ["j must be at least 1", "0"]),
    "plot log_x": (lambda: plot_bias(module(), 4, log_x="y"), TypeError, ["log_x must be True or False", "'y'"]),
    "state_dict type": (lambda: DynamicPositionBias.from_x_transformers([1]), TypeError, ["state_dict must be a mapping", "list"]),
    "state_dict other": (lambda: DynamicPositionBias.from_x_transformers(module().state_dict()), ValueError, ["state_dict must hold", "mlp.0.weight"]),
    "state_dict of norms": (lambda: DynamicPositionBias.from_x_transformers(module(norm=True).state_dict()), ValueError, ["state_dict must hold", "mlp.1.weight"]),
    "state_dict keys": (lambda: DynamicPositionBias.from_x_transformers({1: torch.zeros(2), "mlp.foo": 3}), ValueError, ["state_dict must hold", "mlp.foo"]),
    "state_dict values": (lambda: DynamicPositionBias.from_x_transformers({"mlp.0.0.weight": [1.0]}), TypeError, ["mlp.0.0.weight", "list"]),
    "state_dict prefix": (lambda: DynamicPositionBias.from_x_transformers({}, prefix=3), TypeError, ["prefix", "3"]),
    "state_dict norm": (
        lambda: DynamicPositionBias.from_x_transformers(
            {"mlp.0.0.weight": torch.ones(3, 1), "mlp.0.1.gamma": torch.ones(3), "mlp.1.weight": torch.ones(2, 3)}, norm=False
        ),
        ValueError,
        ["norm must be True", "got False"],
    ),
    "state_dict depth": (
        lambda: DynamicPositionBias.from_x_transformers(
            {"mlp.0.0.weight": torch.ones(3, 1), "mlp.0.0.bias": torch.ones(3), "mlp.1.weight": torch.ones(2, 3), "mlp.1.bias": torch.ones(2)}, depth=2
        ),
        ValueError,
        ["depth must be 1", "got 2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_message(case):
    call, exception, words = case
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    for word in words:
        assert word in str(caught.value)


def test_numpy_integers_are_integers():
    bias = expand_bias(table(), np.int64(3), np.int32(4), offset=np.int8(2))
    assert bias.shape == (2, 3, 4)


def test_every_backend_serves_or_says_why(device):
    data = table(device=device)
    for backend in BACKENDS:
        reason = why_not(backend, device)
        if reason is None:
            assert expand_bias(data, 3, 4, backend=backend).shape == (2, 3, 4)
        else:
            with pytest.raises(ValueError, match="is not available") as caught:
                expand_bias(data, 3, 4, backend=backend)
            assert reason in str(caught.value)


def test_limits_are_allowed_themselves():
    """The least and the largest number pass; the next ones do not."""
    for least, most, right, wrong in (
        (0, 2**60, (0, 2**60), (-1, 2**60 + 1)),
        (1, 2**60, (1, 2**60), (0, 2**60 + 1)),
        (None, 2**62, (-(2**62), 2**62), (-(2**62) - 1, 2**62 + 1)),
        (0, None, (0, 2**80), (-1,)),
    ):
        for number in right:
            assert checks.check_int("x", number, least, most) == number
        for number in wrong:
            with pytest.raises(ValueError, match=f"x must be .* got {number}"):
                checks.check_int("x", number, least, most)
    assert (
        checks.check_limit("x", 2**62 + 2**60) == 2**62 + 2**60 and checks.check_limit("x", 2**62 + 2**60 + 1) is None
    )
    assert checks.check_table(torch.ones(1, 0), True) == checks.check_table(torch.ones(1, 0), False) == 0
    assert checks.check_table(torch.ones(2, 7), True) == 4 and checks.check_table(torch.ones(2, 7), False) == 7
    checks.check_distances(torch.ones(1, 3), 3, 0, 9, 77)
    checks.check_distances(torch.ones(1, 3), 3, 2, 3, 1)
    checks.check_distances(torch.ones(1, 3), 3, 2, 3, 0)
    for grid in ((2, 3, 2), (2, 3, -1)):
        with pytest.raises(ValueError, match="distances of up to 3, a table of shape .* holds 0 to 2"):
            checks.check_distances(torch.ones(1, 3), 3, *grid)
