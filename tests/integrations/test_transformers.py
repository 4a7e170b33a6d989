# SPDX-License-Identifier: MIT
"""Compares transformers' models on bias_attention with eager attention: logits, every gradient, generation."""

import copy
import pickle
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="transformers is not installed")

from hf_models import VOCAB, assert_same, decoder, generated, padding, run, t5, tokens

from dpb_triton import bias_attention
from dpb_triton.integrations.transformers import NAME, use_bias_attention
from dpb_triton.integrations.transformers import attention as transformers_attention

DECODERS = {
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "Gemma3": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "GPTNeoX": {"rotary_pct": 0.5},
}
SIDES = (None, "right", "left", "holes")


@pytest.fixture
def fused_only(monkeypatch):
    """A model raises an error if it falls back to its eager attention."""

    def fall_back(module, *_, reason=None, **__):
        raise AssertionError(f"{type(module).__name__} is not fused: {reason}")

    monkeypatch.setattr(transformers_attention, "_attend_eagerly", fall_back)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_eager(fused_only, name, side):
    mask = padding(3, 11, side)
    assert_same(decoder(name, **DECODERS[name]), mask, input_ids=tokens(3, 11), attention_mask=mask)


def test_decoder_without_a_mask_is_eager(fused_only):
    assert_same(decoder("Llama"), input_ids=tokens(2, 7))


def test_softcap_is_eager(fused_only):
    model = decoder("Gemma2", sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=1.5)
    assert_same(model, input_ids=tokens(2, 12))
    for side in SIDES:
        mask = padding(2, 12, side)
        assert_same(model, mask, input_ids=tokens(2, 12), attention_mask=mask)


@pytest.mark.parametrize("name", ["JetMoe", "Afmoe"])
def test_a_layer_may_view_what_attention_returns(fused_only, name):
    if name == "JetMoe":
        options = {"num_local_experts": 2, "kv_channels": 6, "num_key_value_heads": 4}
    else:
        options = {"sliding_window": 4, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    mask = padding(3, 11, "left")
    assert_same(decoder(name, **options), mask, input_ids=tokens(3, 11), attention_mask=mask)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "num_heads": 4, "d_kv": 3},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 1},
        {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 3, "num_heads": 1, "d_kv": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", SIDES)
def test_t5_is_eager(fused_only, options, side):
    mask, decoder_mask = padding(3, 13, side, seed=1), padding(3, 9, side, seed=2)
    inputs = {"input_ids": tokens(3, 13), "decoder_input_ids": tokens(3, 9, seed=1)}
    masks = {} if side is None else {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    assert_same(t5(dtype=torch.float64, **options), decoder_mask, tolerance=1e-6, **inputs, **masks)


@pytest.mark.parametrize("family", ["MT5", "UMT5", "LongT5"])  # LongT5's encoder attends in another way
def test_t5_family_is_eager(fused_only, family):
    mask = padding(2, 8, "right")
    inputs = {"input_ids": tokens(2, 8), "attention_mask": mask, "decoder_input_ids": tokens(2, 5, seed=1)}
    assert_same(t5(family, dtype=torch.float64), tolerance=1e-6, **inputs)


INITIALISATIONS = {
    "init_weights": lambda model: model.init_weights(),
    "initialize_weights": lambda model: model.initialize_weights(),
    "apply": lambda model: model.apply(model._init_weights),
    "resize": lambda model: model.resize_token_embeddings(VOCAB + 5),
    "meta": lambda model: model.to("meta").to_empty(device="cpu").init_weights(),
}


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5", "SwitchTransformers", "LongT5", "Pop2Piano"])
@pytest.mark.parametrize("how", INITIALISATIONS)
def test_t5_is_initialised_as_without(family, how):
    """With `use_bias_attention` a model gets the same weights, and reports the same flags, as without it."""
    ours = t5(family, num_layers=1)
    plain = type(ours)(ours.config)
    for model in (ours, plain):
        for x in (*model.modules(), *model.parameters()):  # otherwise transformers keeps the existing weights
            x.__dict__.pop("_is_hf_initialized", None)
        torch.manual_seed(1)
        INITIALISATIONS[how](model)
    flags = [[getattr(m, "has_relative_attention_bias", None) for m in model.modules()] for model in (ours, plain)]
    assert flags[0] == flags[1]
    state, expected = ours.state_dict(), plain.state_dict()
    assert state.keys() == expected.keys()
    for key, x in state.items() if how != "resize" else ():  # resize draws new rows that resemble the old ones
        assert torch.equal(x, expected[key]), key


@pytest.mark.parametrize("family", ["T5", "UMT5"])
def test_t5_is_copied_pickled_saved_and_loaded(fused_only, tmp_path, family):
    model = t5(family)
    inputs = {"input_ids": tokens(2, 8), "decoder_input_ids": tokens(2, 5, seed=1)}
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    copied = use_bias_attention(copy.deepcopy(model))  # once more changes nothing
    for other in (copied, pickle.loads(pickle.dumps(model)), use_bias_attention(loaded)):
        assert torch.equal(other(**inputs).logits, expected)
        assert {type(part) for part in other.modules()} == {type(part) for part in model.modules()}
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data += torch.randn(32, 3)
    # a replica, as in DataParallel, uses the weights that it was given, not those of the original module
    replica = copy.deepcopy(model)._replicate_for_data_parallel()
    attention = replica.encoder.block[0].layer[0].SelfAttention._replicate_for_data_parallel()
    attention.relative_attention_bias = copy.deepcopy(attention.relative_attention_bias).double()
    assert attention.compute_bias(3, 4).dtype == torch.float64


def test_a_forward_that_fails_leaves_t5_as_it_was():
    attention = t5().decoder.block[0].layer[1].EncDecAttention
    with pytest.raises(RuntimeError):
        attention(torch.zeros(1, 2, 7), key_value_states=torch.zeros(1, 3, 20))
    assert attention.has_relative_attention_bias is False


@pytest.mark.parametrize("seed", range(8))
def test_random_configuration_is_eager(fused_only, seed):
    draw = random.Random(seed)
    batch, length, target = draw.randint(1, 4), draw.randint(1, 70), draw.randint(1, 33)
    side = draw.choice(SIDES)
    mask = padding(batch, length, side, seed)
    kv_heads, layers = draw.randint(1, 3), draw.randint(1, 3)
    heads = kv_heads * draw.randint(1, 3)
    if seed % 2:
        options = {
            "d_kv": draw.randint(1, 20), "num_heads": heads, "num_layers": layers, "d_model": draw.randint(4, 40),
            "relative_attention_num_buckets": 2 * draw.randint(1, 20),
            "relative_attention_max_distance": draw.randint(21, 90),
        }  # fmt: skip
        decoder_mask = padding(batch, target, side, seed + 1)
        inputs = {"input_ids": tokens(batch, length), "decoder_input_ids": tokens(batch, target)}
        masks = {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
        assert_same(t5(seed=seed, dtype=torch.float64, **options), decoder_mask, tolerance=1e-6, **inputs, **masks)
        return
    name = draw.choice(["Llama", "Mistral", "Qwen3", "Gemma3"])
    options = {
        "hidden_size": heads * draw.randint(1, 9), "head_dim": 2 * draw.randint(1, 20), "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "sliding_window": draw.randint(1, length + 9),
    }  # fmt: skip
    if name == "Llama":
        del options["sliding_window"]
    assert_same(decoder(name, seed=seed, **options), mask, input_ids=tokens(batch, length), attention_mask=mask)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "T5"])
def test_generates_what_eager_does(name, options):
    if name == "T5":
        model = t5(dtype=torch.float64, relative_attention_num_buckets=4, relative_attention_max_distance=6)
    else:
        model = decoder(name, **({} if name == "Llama" else {"sliding_window": 5}))
    inputs, mask = tokens(3, 7), padding(3, 7, "right" if name == "T5" else "left")
    expected = generated(model, "eager", inputs, mask, **options)
    assert torch.equal(generated(model, NAME, inputs, mask, **options), expected)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "T5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks_is_the_whole(name, cache):
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    options = {"sliding_window": 4} if name == "Mistral" else {}
    model = t5() if name == "T5" else decoder(name, **options)
    model.set_attn_implementation(NAME)
    ids = tokens(2, 11)
    make = lambda: DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, 16)  # noqa: E731
    past, given, logits = make(), {}, []
    if name == "T5":
        past, given = EncoderDecoderCache(past, DynamicCache(config=model.config)), {"input_ids": tokens(2, 6)}
    word = "decoder_input_ids" if name == "T5" else "input_ids"
    with torch.no_grad():
        expected = model(**given, **{word: ids}).logits
        for part in (slice(0, 5), slice(5, 8), slice(8, 9), slice(9, 11)):
            logits.append(model(**given, **{word: ids[:, part]}, past_key_values=past, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=2e-5, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operation returns. Operations inside dpb_triton's do not count."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", ["Llama", "Mistral", "T5", "UMT5"])
def test_nothing_of_queries_times_keys_is_made(name):
    n = 300
    model = t5(name) if "T5" in name else decoder(name, **({"sliding_window": 20} if name == "Mistral" else {}))
    mask = padding(1, n, "holes")
    inputs = {"input_ids": tokens(1, n), "attention_mask": mask}
    if "T5" in name:
        inputs |= {"decoder_input_ids": tokens(1, n), "decoder_attention_mask": mask}
    with LargestTensor() as largest:
        run(model, NAME, mask, **inputs)
    assert largest.elements < n * n


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_gemma2_with_padding_makes_nothing_of_queries_times_keys(fused_only, monkeypatch, side):
    """Softcap, sliding window, padding and head_dim 256 together, in training and in generation."""
    calls = []

    def count(*tensors, **options):
        calls.append(options)
        return bias_attention(*tensors, **options)

    monkeypatch.setattr(transformers_attention, "bias_attention", count)
    n = 640  # the largest tensor that is allowed: n queries of 2 heads of 256
    options = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
    model = decoder("Gemma2", sliding_window=100, attn_logit_softcapping=1.5, **options)
    ids, mask = tokens(1, n), padding(2, n, side)[:1]
    assert not mask.all()
    with LargestTensor() as largest:
        run(model, NAME, mask, input_ids=ids, attention_mask=mask)
        generated(model, NAME, ids, mask, max_new_tokens=2, min_new_tokens=2)
    assert n * 512 <= largest.elements < n * n
    assert [call["softcap"] for call in calls] == [1.5] * 6  # two layers; training, prefill, one token
    # the last token's window may see no padding
    assert all(call["key_padding_mask"].shape == (1, n) for call in calls[:4])
    assert {call["window"] for call in calls} == {(None, 0), (99, 0)}
    assert_same(model, mask, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
    model = t5(dropout_rate=0.0) if name == "T5" else decoder(name)
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, "right")}
    if name == "T5":
        inputs["decoder_input_ids"] = tokens(2, 5)
    model.train()
    expected, expected_gradients = run(model, NAME, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    logits, gradients = run(model, NAME, **inputs)
    torch.testing.assert_close(logits, expected)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_dropout_is_drawn_in_training_only(name):
    model = t5(dropout_rate=0.0) if name == "T5" else decoder(name, attention_dropout=0.5)
    inputs = {"input_ids": tokens(2, 9)} | ({"decoder_input_ids": tokens(2, 5)} if name == "T5" else {})
    expected, _ = run(model, NAME, **inputs)
    if name == "T5":
        for module in model.modules():
            if hasattr(module, "n_heads"):
                module.dropout = 0.5
    model.train()
    torch.manual_seed(0)
    first, gradients = run(model, NAME, **inputs)
    second, _ = run(model, NAME, **inputs)
    torch.manual_seed(0)
    again, _ = run(model, NAME, **inputs)
    assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, expected)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_bfloat16_is_within_eagers_error(name):
    mask = padding(2, 20, "right")
    inputs = {"input_ids": tokens(2, 20), "attention_mask": mask}
    if name == "T5":
        inputs["decoder_input_ids"] = tokens(2, 20)
    # no ReLU: at its kink a rounding error changes the gradient
    model = t5(feed_forward_proj="gated-gelu") if name == "T5" else decoder(name)
    exact = run(model, "eager", mask, **inputs)
    model.to(torch.bfloat16)
    eager, ours = run(model, "eager", mask, **inputs), run(model, NAME, mask, **inputs)
    for flat in (lambda r: r[0].float().flatten(), lambda r: torch.cat([g.float().flatten() for g in r[1].values()])):
        assert (flat(ours) - flat(exact)).norm() <= 1.5 * (flat(eager) - flat(exact)).norm()
