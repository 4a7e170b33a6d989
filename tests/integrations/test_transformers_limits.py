# SPDX-License-Identifier: MIT
"""What bias_attention cannot compute for a transformers model gives eager's numbers or an exception."""

import copy
import functools
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from hf_models import VOCAB, assert_same, decoder, padding, run, t5, tokens
from transformers import masking_utils

from dpb_triton import DynamicPositionBias, bias_attention
from dpb_triton.integrations.transformers import NAME, add_position_bias, use_bias_attention
from dpb_triton.integrations.transformers import attention as transformers_attention
from dpb_triton.integrations.transformers import mask as transformers_mask
from dpb_triton.integrations.transformers.mask import read_window
from dpb_triton.integrations.transformers.table import has_t5_bias, place


@pytest.fixture
def reasons(monkeypatch):
    """The reasons why layers fell back to their eager attention; None for a fused layer."""
    found, why_not = [], transformers_attention._why_not

    def record(*arguments):
        found.append(why_not(*arguments))
        return found[-1]

    monkeypatch.setattr(transformers_attention, "_why_not", record)
    return found


def causal_mask(i, dtype=torch.float32):
    return torch.full((1, 1, i, i), torch.finfo(dtype).min, dtype=dtype).triu(1)


def test_packed_sequences_fall_back(reasons):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]])
    assert_same(decoder("Llama"), input_ids=tokens(2, 7), position_ids=positions, use_cache=False)
    assert "neither causal" in reasons[-1]


def test_a_mask_of_the_callers_falls_back(reasons):
    mask = causal_mask(7) + torch.randn(2, 4, 7, 7)
    assert_same(decoder("Llama"), input_ids=tokens(2, 7), attention_mask=mask)
    assert "(2, 4, 7, 7)" in reasons[-1]


def test_a_bool_mask_is_true_for_a_seen_key():
    model = decoder("Llama")
    seen = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    expected, _ = run(model, "eager", input_ids=tokens(1, 7), attention_mask=causal_mask(7))
    logits, _ = run(model, NAME, input_ids=tokens(1, 7), attention_mask=seen)
    torch.testing.assert_close(logits, expected)


SOFTCAP = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.5}


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "T5"])
def test_attention_weights_fall_back(reasons, name):
    model = t5() if name == "T5" else decoder(name, **SOFTCAP if name == "Gemma2" else {})
    inputs = {"input_ids": tokens(2, 7), "output_attentions": True, "attention_mask": padding(2, 7, "right")}
    inputs |= {"decoder_input_ids": tokens(2, 3)} if name == "T5" else {}
    weights = []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        out = model(**inputs)
        weights.append(out.cross_attentions + out.decoder_attentions if name == "T5" else out.attentions)
    torch.testing.assert_close(*weights)
    assert reasons[-1] == "output_attentions=True"


def test_sinks_fall_back(reasons):
    model = decoder("GptOss", sliding_window=3, num_local_experts=2, num_experts_per_tok=1)
    mask = padding(2, 9, "left")
    assert_same(model, mask, input_ids=tokens(2, 9), attention_mask=mask)
    assert "more than softmax" in reasons[-1]


def test_chunks_fall_back(reasons):
    options = {"num_local_experts": 1, "attention_chunk_size": 3, "intermediate_size_mlp": 24, "no_rope_layers": [1, 0]}
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_hidden_layers=2,
        intermediate_size=24, vocab_size=VOCAB, pad_token_id=0, **options,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    assert_same(model, input_ids=tokens(2, 8))
    assert any(reason is not None and "neither causal" in reason for reason in reasons) and None in reasons


def test_a_large_head_dim_falls_back(reasons):
    model = decoder("Llama", num_attention_heads=1, num_key_value_heads=1, head_dim=258, initializer_range=0.1)
    assert_same(model, input_ids=tokens(2, 6))
    assert "head_dim is 258" in reasons[-1]


def test_the_largest_head_dim_is_fused(reasons):
    mask = padding(2, 6, "left")
    model = decoder("Llama", num_attention_heads=1, num_key_value_heads=1, head_dim=256, initializer_range=0.1)
    assert_same(model, mask, input_ids=tokens(2, 6), attention_mask=mask)
    assert set(reasons) == {None}


@pytest.mark.parametrize("name", ["sinks", "s_aux", "cat", "reshape", "expand", "max", "values", "sigmoid", "tanh"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_only_plain_eager_functions_are_replaced(name, is_wrapped):
    lines = f"def eager_attention_forward(x):\n return x.softmax().{name}", "def forward(x): ALL_ATTENTION_FUNCTIONS"
    exec("\n".join(lines), scope := {})
    if is_wrapped:
        eager = scope["eager_attention_forward"]
        scope["eager_attention_forward"] = functools.wraps(eager)(lambda x: eager(x))
    layer = type("Layer", (), {"forward": scope["forward"]})
    assert transformers_attention._is_plain(layer) == (name == "tanh")


def test_an_eager_function_may_have_a_longer_name():
    code = "def x_eager_attention_forward(): pass\ndef forward(): ALL_ATTENTION_FUNCTIONS, x_eager_attention_forward"
    exec(code, scope := {})
    layer = type("Layer", (), {"forward": scope["forward"]})
    assert transformers_attention.find_eager_attention(layer) is scope["x_eager_attention_forward"]


def test_t5_whose_bias_is_not_replaced_falls_back(reasons):
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=20, d_kv=5, num_heads=3, d_ff=16, num_layers=2, vocab_size=VOCAB)
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert_same(model, input_ids=tokens(2, 9), decoder_input_ids=tokens(2, 4))
    assert "no table of the distance" in reasons[-1]


def test_encoders_and_cross_attention_are_eager(reasons):
    torch.manual_seed(0)
    mask = padding(2, 9, "right")
    options = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCAB, **options)).eval()
    assert_same(bert, mask, input_ids=tokens(2, 9), attention_mask=mask)
    options = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
               (("layers", 1), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=VOCAB, d_model=24, **options))
    assert_same(bart.eval(), input_ids=tokens(2, 9), attention_mask=mask, decoder_input_ids=tokens(2, 4))
    llama = decoder("Llama")
    llama.config.is_causal = False  # this is how transformers makes a decoder see both ways
    assert_same(llama, mask, input_ids=tokens(2, 9), attention_mask=mask)
    assert set(reasons) == {None}


def test_a_model_that_computes_with_the_mask_falls_back(reasons):
    mask = padding(2, 9, "left")
    model = decoder("Doge", num_attention_heads=4, keep_window_size=4)
    assert_same(model, mask, input_ids=tokens(2, 9), attention_mask=mask)
    assert_same(model, input_ids=tokens(2, 9))
    assert "(2, 4, 9, 9)" in reasons[-1]


SPARSE = {  # three of DeepSeek's family: they pass the indices of the chosen keys to an unknown attention
    "HYV4": {"head_dim": 16, "num_key_value_heads": 4, "o_groups": 2, "o_lora_rank": 8},
    "DeepseekV32": {"head_dim": 8, "num_key_value_heads": 4},
    "GlmMoeDsa": {"head_dim": 8, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("kind", ["padding", "bool", "bias"])
@pytest.mark.parametrize("name", SPARSE)
def test_chosen_keys_fall_back(reasons, name, kind):
    options = {
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "index_n_heads": 2, "index_head_dim": 16, "index_topk": 3, "n_routed_experts": 2, "num_experts_per_tok": 1,
        "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
        "num_local_experts": 2, "num_experts": 2,
    }  # fmt: skip
    known = getattr(transformers, f"{name}Config")()
    model = decoder(name, **{k: v for k, v in options.items() if hasattr(known, k)}, **SPARSE[name])
    mask = padding(2, 9, "left")
    inputs = {"input_ids": tokens(2, 9), "attention_mask": mask}
    if kind == "bool":
        inputs["attention_mask"] = (mask[:, None, None] == 1) & torch.ones(9, 9, dtype=torch.bool).tril()
    expected, _ = run(model, "eager", mask, **inputs | {"attention_mask": mask})
    if kind == "bias":  # a bias of zeros
        bias = DynamicPositionBias(8, 4)
        torch.nn.init.zeros_(bias.mlp[-1].weight)
        torch.nn.init.zeros_(bias.mlp[-1].bias)
        add_position_bias(model, bias)
    logits, _ = run(model, NAME, mask, **inputs)
    torch.testing.assert_close(logits, expected)
    assert "its indices name" in reasons[-1]


def test_chosen_blocks_raise():
    layer = decoder("Llama").model.layers[0].self_attn
    x = torch.zeros(1, 4, 5, 6)
    with pytest.raises(ValueError, match="block_indices.*use set_attn_implementation.'eager'"):
        transformers_attention.attend(layer, x, x, x, None, block_indices=torch.zeros(1, 4, 5, 1, dtype=torch.int64))


LOOKS = {
    "rows": lambda mask: mask[:, 0, 2:],
    "keys": lambda mask: mask[..., :3],
    "is_seen": lambda mask: mask == 0,
    "is_hidden": lambda mask: mask != 0,
    "less": lambda mask: mask < 0,
    "not": lambda mask: ~(mask == 0),
    "sum": lambda mask: torch.ones(2, 4, 5, 5) + mask + 1.0,
    "difference": lambda mask: 1.0 - mask,
    "factor": lambda mask: 2 * mask * torch.ones(5),
    "minus": lambda mask: -mask,
    "a method": lambda mask: mask.masked_fill(torch.eye(5, dtype=torch.bool), 7.0),
    "another dtype": lambda mask: mask.to(torch.float64),
    "a named dtype": lambda mask: mask.to(dtype=torch.float64),
    "device and dtype": lambda mask: mask.to("cpu", torch.float16),
    "a tensor's dtype": lambda mask: mask.to(torch.ones(1, dtype=torch.float64)),
    "sum with a number first": lambda mask: 1.0 + mask,
    "less a number": lambda mask: mask - 1.0,
    "quotient": lambda mask: mask / 2,
    "at most": lambda mask: mask <= -1.0,
    "at least": lambda mask: mask >= 0,
    "more": lambda mask: mask > -1.0,
    "bool": lambda mask: mask.bool(),
    "expanded": lambda mask: mask.expand(-1, 4, -1, -1),
    "where": lambda mask: torch.where(mask.bool(), 1, 2),
    "padded": lambda mask: torch.nn.functional.pad(mask, (0, 2)),
    "concatenated": lambda mask: torch.cat([mask, torch.zeros(2, 1, 5, 1)], -1),
    "its like": lambda mask: torch.ones_like(mask),
    "tensor first": lambda mask: torch.add(torch.ones(5), mask),
    "keywords": lambda mask: torch.add(torch.ones(5), other=mask, alpha=3),
}


def make_mask(i, j, offset, tokens, function=masking_utils.causal_mask_function):
    return transformers_mask.make_mask(2, i, j, offset, mask_function=function, attention_mask=tokens)


@pytest.mark.parametrize("look", LOOKS)
def test_a_mask_is_a_tensor_to_who_looks_into_it(look):
    seen = padding(2, 5, "left").bool()
    mask = make_mask(5, 5, 0, seen)
    expected = LOOKS[look](masking_utils.eager_mask(2, 5, 5, attention_mask=seen))
    found = LOOKS[look](mask)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_mask_that_is_asked_for_its_sizes_stays_one():
    mask = make_mask(5, 5, 0, padding(2, 5, "left").bool())
    assert mask.shape == mask.size() == (2, 1, 5, 5)
    assert mask.size(0) == 2 and mask.size(1) == 1 and mask.size(-1) == 5 and mask.dim() == mask.ndim == 4
    assert mask.dtype == torch.float32 and mask.device == torch.device("cpu")
    assert mask.to("cpu") is mask and mask.contiguous() is mask and mask.to(device="cpu") is mask
    assert not hasattr(mask, "nonsense") and len({mask, mask}) == 1
    assert mask._dense is None
    assert torch.equal(copy.deepcopy(mask).dense(), mask.dense())
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float16, "meta")):
        mask = transformers_mask.make_mask(2, 5, 5, dtype=dtype, device=device)
        assert (mask.dtype, mask.device.type) == (dtype, device) == (mask.dense().dtype, mask.dense().device.type)


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(3),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["causal", "window", "chunks"],
)
def test_the_dense_mask_is_transformers_own(function):
    seen = padding(2, 9, "left").bool()
    request = {"batch_size": 2, "q_length": 2, "kv_length": 5, "kv_offset": 3, "mask_function": function}
    expected = masking_utils.eager_mask(**request, q_offset=6, attention_mask=seen)
    for offset in (6, torch.tensor(6)):
        mask = transformers_mask.make_mask(**request, q_offset=offset, attention_mask=seen)
        offset += 1  # as a static cache does in place, after the mask was made
        assert torch.equal(mask.dense(), expected)


WINDOWS = {
    "causal": (masking_utils.causal_mask_function, (None, 0)),
    "bidirectional": (masking_utils.bidirectional_mask_function, (None, None)),
    "window": (masking_utils.sliding_window_causal_mask_function(4), (3, 0)),
    "window of 1": (masking_utils.sliding_window_causal_mask_function(1), (0, 0)),
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(4), (4, 4)),
    "two windows": (masking_utils.and_masks(*map(masking_utils.sliding_window_overlay, (4, 6))), (3, None)),
    "two windows ahead": (lambda b, h, x, y: (y < x + 2) & (y < x + 5) & (x - y < 3) & (x - y <= 5), (2, 1)),
    "the caller's window": (lambda b, h, x, y: (x - y < 3) & (y < x + 2), (2, 1)),
    # these are no windows
    "chunks": (masking_utils.chunked_causal_mask_function(4, torch.zeros(2)), None),
    "padding": (masking_utils.padding_mask_function(torch.ones(2, 9)), None),
    "packed": (masking_utils.packed_sequence_mask_function(torch.ones(2, 9)), None),
    "or": (masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, x, y: y < 3), None),
    "prefix": (lambda b, h, x, y: (y <= x) & (y < 3), None),
    "from the first query": (lambda b, h, x, y: x >= 3, None),
    "the diagonal only": (lambda b, h, x, y: x == y, None),
    "not the query itself": (lambda b, h, x, y: y < x, None),
    "by head": (lambda b, h, x, y: (y <= x) if h == 0 else (y >= 0), None),
    "by batch": (lambda b, h, x, y: y <= x + b, None),
    "strictly near": (lambda b, h, x, y: abs(x - y) < 4, (3, 3)),
    "near the next": (lambda b, h, x, y: abs(x - y + 1) < 4, None),
    "to the third query": (lambda b, h, x, y: x <= 3, None),
    "scaled": (lambda b, h, x, y: y <= x + x, None),
    "scaled keys": (lambda b, h, x, y: y + y <= x, None),
    "scaled keys ahead": (lambda b, h, x, y: y + y >= x, None),
    "Python's and": (lambda b, h, x, y: x - y < 3 and y <= x, None),
    "everywhere": (lambda b, h, x, y: True, None),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_reads_windows_and_nothing_else(name):
    function, expected = WINDOWS[name]
    window = read_window(function)
    assert window == expected
    if window is not None:
        seen = masking_utils.sdpa_mask(1, 9, 9, mask_function=function, allow_is_causal_skip=False)[0, 0]
        distance = torch.arange(9)[:, None] - torch.arange(9)
        left, right = (9 if side is None else side for side in window)
        assert torch.equal(seen, (distance <= left) & (distance >= -right))


@pytest.mark.parametrize("window", [(None, 0), (3, 0), (None, None), (2, 1)])
@pytest.mark.parametrize("kind", ["none", "diagonals", "module", "signed module"])
def test_an_offset_on_the_device_is_that_number(kind, window):
    torch.manual_seed(0)
    i, j, offset = 3, 11, 5
    query, key, value = (torch.randn(2, 4, n, 6) for n in (i, j, j))
    module = DynamicPositionBias(8, 4, signed="signed" in kind) if "module" in kind else None
    diagonals = torch.randn(4, i + j - 1) if kind == "diagonals" else None
    outs = []
    for where in (offset, torch.tensor(offset)):
        table, options = place(diagonals, module, query, key, where, window)
        outs.append(bias_attention(query, key, value, table, **options))
    torch.testing.assert_close(*outs)


def test_a_layer_without_the_flag_of_t5_keeps_its_bias():
    class Layer(torch.nn.Module):
        compute_bias = transformers.models.t5.modeling_t5.T5Attention.compute_bias

    layer = Layer()
    assert not has_t5_bias(layer)
    layer.has_relative_attention_bias = True
    assert has_t5_bias(layer)


def tiny(family, kind, **options):
    config = getattr(transformers, f"{family.removesuffix('Encoder')}Config")
    return getattr(transformers, family + kind)(config(vocab_size=9, **options | {"num_hidden_layers": 1}))


def with_text(config):
    model = decoder("Llama")
    model.config.text_config = config
    return model


def with_part(model, part):
    model.part = part
    return model


NOT_A_MODEL, BIAS = torch.nn.Linear(2, 2), DynamicPositionBias(8, 4)
CASES = {
    "model": (lambda: use_bias_attention(NOT_A_MODEL), TypeError, ["model", "Linear"]),
    "bias to no model": (lambda: add_position_bias(NOT_A_MODEL, BIAS), TypeError, ["model", "Linear"]),
    "bias": (lambda: add_position_bias(decoder("Llama"), NOT_A_MODEL), TypeError, ["position_bias", "Linear"]),
    "shared": (lambda: add_position_bias(decoder("Llama"), BIAS, shared=1), TypeError, ["shared", "1"]),
    "heads": (lambda: add_position_bias(decoder("Llama"), DynamicPositionBias(8, 2)), ValueError, ["4 heads", "got 2"]),
    "T5": (lambda: add_position_bias(t5(), DynamicPositionBias(8, 3)), ValueError, ["self-attention only", "T5"]),
    "T5 without a decoder": (
        lambda: add_position_bias(tiny("T5Encoder", "Model", d_model=8, d_kv=2, num_heads=4, d_ff=8), BIAS),
        ValueError, ["no position bias of its own", "T5EncoderModel"],
    ),
    "cross attention": (
        lambda: add_position_bias(tiny("GPT2", "LMHeadModel", n_embd=8, n_head=4, add_cross_attention=True), BIAS),
        ValueError, ["self-attention only", "GPT2"],
    ),
    "cross attention of a text model": (
        lambda: add_position_bias(with_text(transformers.GPT2Config(add_cross_attention=True)), BIAS),
        ValueError, ["self-attention only", "Llama"],
    ),
    "more heads": (
        lambda: add_position_bias(decoder("Llama"), DynamicPositionBias(8, 8)), ValueError, ["4 heads", "got 8"],
    ),
    "twice, a copy for each layer": (
        lambda: add_position_bias(add_position_bias(decoder("Llama"), BIAS, shared=False), BIAS, shared=False),
        ValueError, ["no position bias yet"],
    ),
    "a bias to no interface": (
        lambda: add_position_bias(tiny("Bloom", "ForCausalLM", hidden_size=8, n_head=4), BIAS),
        ValueError, ["found none in Bloom"],
    ),
    "twice": (
        lambda: add_position_bias(add_position_bias(decoder("Llama"), BIAS), BIAS),
        ValueError, ["no position bias yet"],
    ),
    "no interface in a part": (
        lambda: use_bias_attention(with_part(decoder("Llama"), tiny("Bloom", "ForCausalLM", hidden_size=8, n_head=2))),
        ValueError, ["interface", "Bloom"],
    ),
    "no interface": (
        lambda: use_bias_attention(tiny("Bloom", "ForCausalLM", hidden_size=8, n_head=2)),
        ValueError, ["interface", "Bloom"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_use_raises(name):
    call, kind, words = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_positions_raise():
    model = add_position_bias(decoder("Llama"), BIAS)
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(1, 4), past_key_values=past)
        with pytest.raises(ValueError, match="where 1 queries stand among 5 keys is not known"):
            model(input_ids=tokens(1, 1), past_key_values=past, attention_mask=torch.zeros(1, 1, 1, 5))


def test_a_mask_for_other_lengths_raises():
    model = decoder("Llama")
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="5 queries and 5 keys, as LlamaAttention has, got one for 5 and 7.*'eager'"):
        model(input_ids=tokens(1, 5), attention_mask=padding(1, 7, None), use_cache=False)


@pytest.mark.parametrize(("i", "j"), [(4, 5), (5, 4)])
def test_a_layer_with_other_lengths_than_its_mask_raises(i, j):
    layer, x = decoder("Llama").model.layers[0].self_attn, torch.zeros(2, 4, 5, 6)
    with pytest.raises(ValueError, match=f"5 queries and 5 keys, as LlamaAttention has, got one for {i} and {j}"):
        transformers_attention.attend(layer, x, x, x, make_mask(i, j, 0, None))


@pytest.mark.parametrize("is_eager", [False, True])
def test_a_layer_that_does_not_train_drops_nothing(is_eager):
    layer, x = decoder("Llama").model.layers[0].self_attn, torch.randn(2, 4, 5, 6)
    inputs, call = (x, x[:, :2], x[:, 2:], None), {"scaling": 0.3, "output_attentions": is_eager}
    expected, _ = transformers_attention.attend(layer, *inputs, **call)
    out, _ = transformers_attention.attend(layer, *inputs, dropout=0.9, **call)
    assert torch.equal(out, expected) and out.is_contiguous()
    assert not torch.equal(transformers_attention.attend(layer.train(), *inputs, dropout=0.9, **call)[0], expected)


@pytest.mark.parametrize("signed", [False, True])
def test_an_eager_layer_has_the_bias_of_an_offset_on_the_device(signed):
    """Of a mask that a compiled decoder of a static cache gets, whose keys are more than its tokens."""
    layer, bias = decoder("Llama").model.layers[0].self_attn, DynamicPositionBias(8, 4, signed=signed)
    layer.pos_bias = bias
    query, key = torch.randn(2, 4, 2, 6), torch.randn(2, 2, 9, 6)
    results = []
    for offset in (4, torch.tensor(4)):
        mask = make_mask(2, 9, offset, None)
        mask._eager = offset, None  # as on a GPU, where nobody reads the number
        call = {"scaling": 0.3, "output_attentions": True}
        results.append(transformers_attention.attend(layer, query, key, key, mask, **call)[0])
    keys = key.repeat_interleave(2, 1)
    scores = 0.3 * query @ keys.mT + bias(2, 9, offset=4) + mask.dense()
    for out in results:
        torch.testing.assert_close(out, (scores.softmax(3) @ keys).transpose(1, 2))


def test_chosen_keys_without_a_mask():
    layer, x = decoder("Llama").model.layers[0].self_attn, torch.randn(1, 2, 3, 6)
    chosen = torch.tensor([[[0, 1], [2, 2], [1, 2]]])
    seen = torch.tensor([[True, True, False], [False, False, True], [False, True, True]])
    query = torch.randn(1, 4, 3, 6)
    keys = x.repeat_interleave(2, 1)
    out, _ = transformers_attention.attend(layer, query, x, x, None, scaling=0.3, indices=chosen)
    expected = (0.3 * query @ keys.mT).masked_fill(~seen, -torch.inf).softmax(3) @ keys
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_other_calls_of_a_layer_are_eager(reasons, monkeypatch):
    """A scaling that is a tensor, and one batch of keys for all queries."""
    warned = []
    monkeypatch.setattr(transformers_attention.logger, "warning_once", warned.append)
    layer, x, key = decoder("Llama").model.layers[0].self_attn, torch.randn(2, 4, 5, 6), torch.randn(1, 2, 5, 6)
    keys_of_both = key.expand(2, -1, -1, -1)
    expected, _ = transformers_attention.attend(layer, x, *[keys_of_both] * 2, None, scaling=0.3)
    assert reasons == [None] and not warned
    for keys, scaling in (([key] * 2, 0.3), ([keys_of_both] * 2, torch.tensor(0.3))):
        out, _ = transformers_attention.attend(layer, x, *keys, None, scaling=scaling)
        torch.testing.assert_close(out, expected)
    out, _ = transformers_attention.attend(torch.nn.Identity(), x, *[keys_of_both] * 2, None, scaling=0.3)
    assert torch.equal(out, expected) and reasons.pop() is None
    bias, k = torch.randn(4, 5, 5), keys_of_both.repeat_interleave(2, 1)
    for added in (bias, bias[None]):
        call = {"scaling": 0.3, "position_bias": added}
        out, _ = transformers_attention.attend(layer, x, *[keys_of_both] * 2, None, **call)
        torch.testing.assert_close(out, ((0.3 * x @ k.mT + bias).softmax(3) @ k).transpose(1, 2))
        assert f"but of shape {tuple(added.shape)}" in reasons.pop() and warned.pop()
    layer.pos_bias = torch.nn.Identity()  # of the model's own
    assert torch.equal(transformers_attention.attend(layer, x, *[keys_of_both] * 2, None, scaling=0.3)[0], expected)
    assert reasons.pop() is None
    layer.pos_bias = BIAS
    out, _ = transformers_attention.attend(layer, x, *[keys_of_both] * 2, None, **call)
    torch.testing.assert_close(out, ((0.3 * x @ k.mT + bias + BIAS(5, 5)).softmax(3) @ k).transpose(1, 2))
    assert reasons.pop() and warned.pop()
    del layer.pos_bias
    assert "key 1" in reasons[1] and "scaling is no number" in reasons[2]
    assert all("LlamaAttention attends eagerly" in text for text in warned) and len(warned) == 2
    with pytest.raises(ValueError, match="Identity has no eager attention function to fall back to: output_attentions"):
        transformers_attention.attend(torch.nn.Identity(), x, x, x, None, output_attentions=True)


def test_a_mask_that_hides_nothing_has_no_padding():
    for i in (5, 2):
        assert make_mask(i, 5, 5 - i, torch.ones(2, 5, dtype=torch.bool)).key_padding_mask is None
        hidden = make_mask(i, 5, 5 - i, padding(2, 5, "left").bool())
        assert torch.equal(hidden.key_padding_mask, padding(2, 5, "left") == 0)
        assert type(hidden.offset) is int and hidden.offset == 5 - i and hidden.dense() is hidden.dense()
        with mock.patch("torch.compiler.is_compiling", return_value=True):
            assert hidden.offset == 5 - i and isinstance(hidden.offset, torch.Tensor) == (i != 5)
            assert torch.equal(hidden.key_padding_mask, padding(2, 5, "left") == 0)
    call = {"mask_function": masking_utils.bidirectional_mask_function, "allow_is_bidirectional_skip": True}
    both_ways = transformers_mask.make_mask(2, 5, 5, **call)  # transformers' own would be None
    assert both_ways.window == (None, None) and not both_ways.dense().any()
