# SPDX-License-Identifier: MIT
"""Small random transformers models, and the comparison of a model with its own eager attention."""

import torch
import transformers

from dpb_triton.integrations.transformers import NAME, use_bias_attention

VOCAB = 40


def decoder(name, seed=0, dtype=torch.float32, **options):
    """A decoder-only model of class `name` in eval mode: 4 heads of dim 6, 2 key heads, 2 layers."""
    torch.manual_seed(seed)
    options = {
        "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 2,
        "intermediate_size": 24, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        # the initial weights are so large that attention is not flat
        "initializer_range": 0.3,
    } | options  # fmt: skip
    config = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")
    return getattr(transformers, f"{name}ForCausalLM")(config(**options)).to(dtype).eval()


def t5(family="T5", seed=0, dtype=torch.float32, **options):
    """An encoder-decoder of T5's family with bias_attention, in eval mode: 3 heads of dim 5, 2 layers on each side."""
    torch.manual_seed(seed)
    options = {
        "d_model": 20, "d_kv": 5, "num_heads": 3, "d_ff": 16, "num_layers": 2, "vocab_size": VOCAB, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0, "initializer_factor": 1.0,
    } | options  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:  # T5 initialises it so small that a wrong bias would hide
            torch.nn.init.normal_(parameter)
    return use_bias_attention(model)


def tokens(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(batch, length, side, seed=0):
    """Mask (batch, length), 1 for a token; padding on the right, on the left, or anywhere. No sequence is empty."""
    generator = torch.Generator().manual_seed(seed)
    if side is None:
        return torch.ones(batch, length, dtype=torch.int64)
    if side == "holes":
        mask = torch.rand(batch, length, generator=generator) < 0.7
        mask[:, 0] = True
    else:
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        lengths[0], lengths[-1] = (length + 1) // 2, length  # at least one sequence is padded, one is full
        mask = torch.arange(length) < lengths
        mask = mask.flip(1) if side == "left" else mask
    return mask.long()


def run(model, implementation, valid=None, **inputs):
    """(logits of the valid positions, gradient of each parameter for a loss of these logits)."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(**inputs).logits
    logits = logits if valid is None else logits[valid.bool()]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, valid=None, *, tolerance=2e-5, **inputs):
    """Logits and every gradient equal those of eager attention, within a fraction of the largest number in each."""
    expected, expected_gradients = run(model, "eager", valid, **inputs)
    logits, gradients = run(model, NAME, valid, **inputs)
    assert logits.isfinite().all()
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).abs().max()
        assert error <= tolerance * (expected_gradients[name].abs().max() + 1e-2 * largest), name


def generated(model, implementation, inputs, mask, **options):
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False} | options
    with torch.no_grad():
        return model.generate(inputs, attention_mask=mask, **options)
