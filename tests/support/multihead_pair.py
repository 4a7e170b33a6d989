# SPDX-License-Identifier: MIT
"""Our MultiheadAttention and torch's with the same weights, and the inputs that tests draw for them."""

import torch
from torch import nn

from dpb_triton import MultiheadAttention

CONSTRUCTORS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim": {"kdim": 10},
    "kdim and vdim": {"kdim": 10, "vdim": 6, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 6, "bias": False},
}
ATTN_MASKS = ("none", "bool", "bool 3-D", "float", "float 3-D")
PADDING = ("none", "bool", "float")


def pair(options, *, is_zero=False, dtype=torch.float64, heads=4):
    """Our module and torch's with the same random projections."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12 if heads == 4 else 3 * heads, heads, dtype=dtype, **options)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = MultiheadAttention(theirs.embed_dim, heads, dtype=dtype, **options)
    weights = ours.pos_bias.state_dict(prefix="pos_bias.")
    ours.load_state_dict(theirs.state_dict() if is_zero else theirs.state_dict() | weights)
    return ours, theirs


def draw(module, batch, i, j, dtype=torch.float64):
    shapes = [(i, batch, module.embed_dim), (j, batch, module.kdim), (j, batch, module.vdim)]
    if batch is None:
        shapes = [(length, dim) for length, _, dim in shapes]
    elif module.batch_first:
        shapes = [(batch, length, dim) for length, _, dim in shapes]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def draw_mask(kind, shape, dtype):
    if kind == "none":
        return None
    if kind.startswith("float"):
        return torch.randn(shape, dtype=dtype)
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # torch gives NaN for a query without a key
    return mask


def draw_masks(module, batch, i, j, attn_mask, padding, dtype=torch.float64):
    rows = module.num_heads * (batch or 1)
    shape = (rows, i, j) if attn_mask.endswith("3-D") else (i, j)
    return {
        "attn_mask": draw_mask(attn_mask, shape, dtype),
        "key_padding_mask": draw_mask(padding, (j,) if batch is None else (batch, j), dtype),
    }


def as_float(mask, dtype=torch.float64):
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def biased(ours, theirs, query, key, value, *, attn_mask=None, key_padding_mask=None, batch, offset=None, **options):
    """torch's module, with our module's bias in its attn_mask."""
    i, j = (x.shape[1 if ours.batch_first and batch is not None else 0] for x in (query, key))
    mask = ours.pos_bias(i, j, offset=j - i if offset is None else offset)
    if attn_mask is not None:
        attn_mask = as_float(attn_mask)
        mask = mask + (attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, ours.num_heads)))
    mask = mask.expand(batch or 1, *mask.shape[-3:]).flatten(0, 1)
    return theirs(query, key, value, attn_mask=mask, key_padding_mask=as_float(key_padding_mask), **options)


def assert_same(ours, theirs, inputs, mine, reference, tolerance=1e-12, has_bias=True):
    """Compare outputs, weights, and the gradients of inputs and parameters."""
    assert (mine[1] is None) == (reference[1] is None)
    gradients = []
    for (out, weights), module in ((mine, ours), (reference, theirs)):
        loss = out.sin().sum() + (0 if weights is None else weights.cos().sum())
        shared = [p for name, p in module.named_parameters() if not name.startswith("pos_bias")]
        wanted = [*inputs, *shared, *(ours.pos_bias.parameters() if has_bias else ())]
        gradients.append([out, *([] if weights is None else [weights])])
        gradients[-1] += torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
