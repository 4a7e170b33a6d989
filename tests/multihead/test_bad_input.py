# SPDX-License-Identifier: MIT
"""MultiheadAttention refuses what torch's module refuses, with an error of the same type, and takes what torch takes."""

import itertools

import pytest
import torch
from torch import nn

from dpb_triton import DynamicPositionBias, MultiheadAttention

DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8)
ATTN_SHAPES = [
    (3, 5), (8, 3, 5), (5,), (1, 3, 5), (2, 3, 5), (4, 3, 5), (3, 1), (1, 5), (5, 3), (3,), (), (1, 1), (8, 1, 5),
    (1, 8, 3, 5), (2, 4, 3, 5), (3, 6), (8, 5, 3), (0, 5), (8, 3, 6), (15,), (1, 1, 5),
]  # fmt: skip
PADDING_SHAPES = [(2, 5), (5,), (1, 5), (2, 1), (5, 2), (2, 3), (2, 1, 5), (2, 6), (), (10,), (0, 5)]
INPUT_SHAPES = [(3, 2, 8), (5, 2, 8), (3, 8), (5, 8), (8,), (3, 2, 7), (5, 2, 7), (5, 3, 8), (2, 5, 8), (1, 3, 2, 8)]
CONSTRUCTORS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "one more key": {"add_bias_kv": True, "add_zero_attn": True},
    "separate": {"kdim": 6, "vdim": 7},
}

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched", "ignore:Converting")


def outcome(module, inputs, call):
    try:
        return module(*inputs, **call)
    except Exception as error:
        return error


def assert_same(ours, theirs, inputs, **call):
    mine, reference = (outcome(module, inputs, call) for module in (ours, theirs))
    if isinstance(reference, Exception):
        assert type(mine) is type(reference), f"{inputs}, {call}: {mine!r} instead of {reference!r}"
        return
    assert not isinstance(mine, Exception), f"{inputs}, {call}: {mine!r}"
    tolerance = 1e-5 if mine[0].dtype in (torch.float32, torch.float64) else 2e-2
    for a, b in zip(mine, reference, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def pair(dtype=torch.float32, **options):
    torch.manual_seed(0)
    ours, theirs = (cls(8, 4, dtype=dtype, **options) for cls in (MultiheadAttention, nn.MultiheadAttention))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def draw(module, *shapes, dtype=torch.float32):
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [x.transpose(0, 1) for x in tensors] if module.batch_first and len(shapes[0]) == 3 else tensors


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_shapes_of_masks(options, need_weights):
    ours, theirs = pair(**options)
    batched = draw(ours, (3, 2, 8), (5, 2, ours.kdim), (5, 2, ours.vdim))
    for inputs in (batched, draw(ours, (3, 8), (5, ours.kdim), (5, ours.vdim))):
        for attn_mask, padding in (
            *((shape, None) for shape in ATTN_SHAPES),
            *((None, shape) for shape in PADDING_SHAPES),
            *itertools.product(ATTN_SHAPES[:5], PADDING_SHAPES[:4]),
        ):
            masks = {
                name: None if shape is None else torch.zeros(shape, dtype=torch.bool)
                for name, shape in (("attn_mask", attn_mask), ("key_padding_mask", padding))
            }
            assert_same(ours, theirs, inputs, need_weights=need_weights, **masks)


@pytest.mark.parametrize(
    "dtype,is_autocast",
    [*itertools.product(DTYPES[1:5], (False,)), *itertools.product(DTYPES[1:4], (True,))],  # autocast skips float64
)
def test_dtypes_of_masks(dtype, is_autocast):
    ours, theirs = pair(dtype)
    inputs = draw(ours, (3, 2, 8), (5, 2, 8), (5, 2, 8), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        for attn_mask, padding, need_weights in itertools.product((None, *DTYPES), (None, *DTYPES), (True, False)):
            masks = {
                "attn_mask": None if attn_mask is None else torch.zeros(3, 5, dtype=attn_mask),
                "key_padding_mask": None if padding is None else torch.zeros(2, 5, dtype=padding),
            }
            assert_same(ours, theirs, inputs, need_weights=need_weights, **masks)


def test_a_causal_mask_of_another_dtype():
    """If torch's module takes the hint, it does not look at the mask."""
    ours, theirs = pair()
    x = torch.randn(5, 2, 8)
    for dtype, need_weights in itertools.product(DTYPES, (True, False)):
        mask = torch.full((5, 5), -torch.inf).triu(1).to(dtype) if dtype.is_floating_point else torch.ones(5, 5).triu(1)
        mask = mask.to(dtype)
        for padding in (None, torch.zeros(2, 5, dtype=torch.bool)):
            call = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights, "key_padding_mask": padding}
            assert_same(ours, theirs, (x, x, x), **call)


def test_shapes_of_inputs():
    ours, theirs = pair()
    for shapes in itertools.product(INPUT_SHAPES, repeat=3):
        assert_same(ours, theirs, draw(ours, *shapes))
    ours, theirs = pair(kdim=6, vdim=7)
    for key, value in itertools.product([(5, 2, 6), (5, 2, 7), (5, 2, 8), (4, 2, 7), (5, 1, 7), (5, 7)], repeat=2):
        assert_same(ours, theirs, draw(ours, (3, 2, 8), key, value))


@pytest.mark.parametrize("need_weights", [True, False])
def test_nothing_to_look_at(need_weights):
    ours, theirs = pair()
    for i, j, batch in ((0, 4, 2), (3, 0, 2), (3, 4, 0), (0, 0, 2)):
        assert_same(ours, theirs, draw(ours, (i, batch, 8), (j, batch, 8), (j, batch, 8)), need_weights=need_weights)


def test_dtypes_of_inputs():
    ours, theirs = pair()
    x = torch.randn(3, 2, 8)
    for dtypes in itertools.product((torch.float32, torch.float64, torch.int64), repeat=3):
        assert_same(ours, theirs, [x.to(dtype) for dtype in dtypes])


def test_a_hint_lets_no_wrong_mask_in():
    """torch's module drops the mask without looking at it."""
    ours, _ = pair()
    x = torch.randn(5, 2, 8)
    for mask, error in ((torch.zeros(5, 4), RuntimeError), (torch.zeros(3, 5, 5), RuntimeError), (torch.zeros(5, 5).int(), AssertionError)):  # fmt: skip
        for need_weights in (True, False):
            with pytest.raises(error, match="attn_mask"):
                ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize(
    "call,exception,words",
    [
        (lambda m, x: MultiheadAttention(12, 4, pos_bias=torch.nn.Linear(1, 4)), TypeError, "pos_bias must be a DynamicPositionBias.*Linear"),
        (lambda m, x: MultiheadAttention(12, 4, pos_bias=DynamicPositionBias(8, 3)), ValueError, "num_heads = 4 heads, got 3"),
        (lambda m, x: MultiheadAttention(12, 5), AssertionError, "divisible"),
        (lambda m, x: m(None, x, x), TypeError, "query must be a Tensor, got NoneType"),
        (lambda m, x: m(x, x[0], x), AssertionError, "expected `key` and `value` to be 3-D but found 2-D and 3-D"),
        (lambda m, x: m(x[0], x, x[0]), AssertionError, "expected `key` and `value` to be 2-D but found 3-D and 2-D"),
        (lambda m, x: m(x[None], x[None], x[None]), AssertionError, "query should be unbatched 2D or batched 3D tensor but received 4-D"),
        (lambda m, x: m(x[..., :7], x, x), AssertionError, r"embedding dimension of 12, but got query of shape \(9, 2, 7\)"),
        (lambda m, x: m(x, x[:, :1], x[:, :1]), RuntimeError, r"key must have query's batch 2, got shapes \(9, 1, 12\) and \(9, 2, 12\)"),
        (lambda m, x: m(x, x[..., :7], x[..., :7]), RuntimeError, r"key must have kdim = 12 features, got shape \(9, 2, 7\)"),
        (lambda m, x: m(x, x, x[1:]), AssertionError, r"key shape \(9, 2, 12\) does not match value shape \(8, 2, 12\)"),
        (lambda m, x: m(x, x, x, offset=0.5), TypeError, "offset must be an int"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 5)), AssertionError, r"key_padding_mask must have the shape \(2, 9\), got \(2, 5\)"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(9)), AssertionError, "expected `key_padding_mask` to be `None` or 2-D but found 1-D"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 9).int()), AssertionError, "floating types of key_padding_mask are supported, got torch.int32"),
        (lambda m, x: m(x, x, x, key_padding_mask=[0]), TypeError, "key_padding_mask must be a Tensor or None, got list"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(1, 9, 9)), RuntimeError, r"3D attn_mask is \(1, 9, 9\), but should be \(8, 9, 9\)"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(9)), AssertionError, "expected `attn_mask` to be `None`, 2-D or 3-D but found 1-D"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(9, 9).double()), RuntimeError, "query's dtype torch.float32, got torch.float64"),
        (lambda m, x: m(x[:, 0], x[:, 0], x[:, 0], attn_mask=torch.zeros(5, 9, 9)), AssertionError, r"Expected `attn_mask` shape to be \(4, 9, 9\)"),
        (lambda m, x: m(x, x, x, average_attn_weights=False, key_padding_mask=torch.zeros(2, 9).half(), need_weights=False), RuntimeError, "float32 or float32, got torch.float16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_training", [True, False])
def test_bad_input(call, exception, words, is_training):
    with torch.set_grad_enabled(is_training), pytest.raises(exception, match=words):
        call(MultiheadAttention(12, 4).train(is_training), torch.randn(9, 2, 12))
