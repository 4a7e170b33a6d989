# SPDX-License-Identifier: MIT
"""Compares a DynamicPositionBias in a transformers model with eager attention that has the bias in its mask."""

import copy
import pickle
import types

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from hf_models import decoder, generated, padding, run, tokens

from dpb_triton import DynamicPositionBias
from dpb_triton.integrations.transformers import NAME, add_position_bias, table


def make_bias(seed=0, **options):
    torch.manual_seed(seed)
    return DynamicPositionBias(8, 4, **options)


@pytest.mark.parametrize("signed", [False, True])
def test_every_distance_of_a_cache_has_its_bias(signed):
    """Also both farthest ones; a query beside the keys, in a part of the cache that nobody reads, has some bias."""
    position_bias, distance = make_bias(signed=signed), torch.arange(-6, 7)
    expected = position_bias.table(7)[:, distance + 6 if signed else distance.abs()]
    torch.testing.assert_close(table._look_up(position_bias, distance, 4, 7), expected)
    beyond = table._look_up(position_bias, torch.tensor([-9, 9]), 4, 7)
    torch.testing.assert_close(beyond, expected[:, [0, -1]])


def biased(shared=True, **options):
    return add_position_bias(decoder("Llama"), make_bias(**options), shared=shared)


@pytest.mark.parametrize("side", ["right", "left", "packed"])
@pytest.mark.parametrize("options", [{}, {"signed": True, "norm": True}], ids=str)
def test_bias_is_that_of_a_mask(options, side):
    bias, plain = make_bias(**options), decoder("Llama")
    mask = padding(2, 9, side if side != "packed" else None)
    added = bias(9, 9)[None].masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
    added = added + (1 - mask[:, None, None]) * -1e9
    inputs = {"input_ids": tokens(2, 9), "use_cache": False}
    masks = {"attention_mask": mask}
    if side == "packed":
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        sequence = torch.tensor([0] * 4 + [1] * 5)
        added, masks = added.masked_fill(sequence[:, None] != sequence, torch.finfo(torch.float32).min), {}
    expected, expected_gradients = run(plain, "eager", mask, attention_mask=added, **inputs)
    model = add_position_bias(decoder("Llama"), copy.deepcopy(bias))
    logits, gradients = run(model, NAME, mask, **masks, **inputs)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    expected_gradients |= {f"model.pos_bias.{name}": p.grad for name, p in bias.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5 * largest, rtol=1e-3, msg=name)


@pytest.mark.parametrize("shared", [True, False])
def test_a_zero_bias_changes_nothing(shared):
    expected, _ = run(decoder("Llama"), "eager", input_ids=tokens(2, 9))
    bias = make_bias()
    torch.nn.init.zeros_(bias.mlp[-1].weight)
    torch.nn.init.zeros_(bias.mlp[-1].bias)
    model = add_position_bias(decoder("Llama"), bias, shared=shared)
    logits, gradients = run(model, NAME, input_ids=tokens(2, 9))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    count = sum("pos_bias" in name and name.endswith("4.bias") for name in gradients)
    assert count == (1 if shared else 2)


@pytest.mark.parametrize("shared", [True, False])
def test_trains(shared):
    model = biased(shared).train()
    before = {name: p.clone() for name, p in model.named_parameters() if "pos_bias" in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = tokens(2, 12)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    parameters = dict(model.named_parameters())
    # the last Linear's bias shifts all scores alike, and a softmax ignores that
    assert all(not torch.equal(parameters[name], p) for name, p in before.items() if "4.bias" not in name)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generates_with_a_cache_what_it_does_without(options):
    inputs, mask = tokens(2, 6), padding(2, 6, "left")
    model = biased()
    expected = generated(model, NAME, inputs, mask, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(generated(model, NAME, inputs, mask, **options), expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
def test_attention_weights_with_a_cache_have_the_bias_of_their_positions(signed, is_static):
    """A static cache has more places than there are tokens."""
    model, ids, past = biased(signed=signed), tokens(2, 7), transformers.DynamicCache()
    if is_static:
        past = transformers.StaticCache(model.config, max_cache_len=11)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 5:]
        model(input_ids=ids[:, :5], past_key_values=past)
        out = model(input_ids=ids[:, 5:], past_key_values=past, output_attentions=True)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-4)
    assert out.attentions[0].shape == (2, 4, 2, 11 if is_static else 7)


@pytest.mark.parametrize("shared", [True, False])
def test_is_copied_pickled_saved_and_loaded(tmp_path, shared):
    model = biased(shared)
    expected = model(input_ids=tokens(2, 9)).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=tokens(2, 9)).logits, expected)
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert torch.equal(pickle.loads(pickle.dumps(model))(input_ids=tokens(2, 9)).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=NAME)
    add_position_bias(loaded, make_bias(seed=1), shared=shared)
    from safetensors.torch import load_file

    missing, unexpected = loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not missing and not unexpected
    assert torch.equal(loaded.eval()(input_ids=tokens(2, 9)).logits, expected)


def test_a_config_need_not_name_the_heads():
    model = decoder("Llama")
    for layer in model.model.layers:
        layer.self_attn.config = types.SimpleNamespace()
    assert add_position_bias(model, bias := make_bias()).model.layers[1].self_attn.pos_bias is bias


def test_another_attention_implementation_raises():
    model = biased()
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="'dpb_triton', which adds it, got 'eager'"):
        model(input_ids=tokens(1, 4))
