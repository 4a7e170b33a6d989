# SPDX-License-Identifier: MIT
"""What bias_attention does not compute for a transformers model: eager's numbers or an exception."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from hf_models import VOCAB, assert_same, decoder, padding, run, t5, tokens
from transformers import masking_utils

from dpb_triton import DynamicPositionBias, bias_attention
from dpb_triton.integrations import transformers_attention
from dpb_triton.integrations.transformers import NAME, add_position_bias, use_bias_attention
from dpb_triton.integrations.transformers_mask import read_window
from dpb_triton.integrations.transformers_table import place


@pytest.fixture
def reasons(monkeypatch):
    """The reasons for which layers fell back to their eager attention."""
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


@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_attention_weights_fall_back(reasons, name):
    model = t5() if name == "T5" else decoder(name)
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


def test_padding_with_softcap_falls_back(reasons):
    mask = padding(2, 9, "right")
    model = decoder("Gemma2", sliding_window=5, query_pre_attn_scalar=8)
    assert_same(model, mask, input_ids=tokens(2, 9), attention_mask=mask)
    assert reasons[-1] == "padding and softcap together"


@pytest.mark.parametrize(("head_dim", "side"), [(258, None), (256, "left")])
def test_a_large_head_dim_falls_back(reasons, head_dim, side):
    mask = padding(2, 6, side)
    model = decoder("Llama", num_attention_heads=1, num_key_value_heads=1, head_dim=head_dim, initializer_range=0.1)
    assert_same(model, mask, input_ids=tokens(2, 6), attention_mask=mask)
    assert f"head_dim is {head_dim}" in reasons[-1]


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
    llama.config.is_causal = False  # transformers' way to make a decoder see both ways
    assert_same(llama, mask, input_ids=tokens(2, 9), attention_mask=mask)
    assert set(reasons) == {None}


WINDOWS = {
    "causal": (masking_utils.causal_mask_function, (None, 0)),
    "bidirectional": (masking_utils.bidirectional_mask_function, (None, None)),
    "window": (masking_utils.sliding_window_causal_mask_function(4), (3, 0)),
    "window of 1": (masking_utils.sliding_window_causal_mask_function(1), (0, 0)),
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(4), (4, 4)),
    "two windows": (masking_utils.and_masks(WINDOW := masking_utils.sliding_window_overlay(4), WINDOW), (3, None)),
    "the caller's window": (lambda b, h, x, y: (x - y < 3) & (y < x + 2), (2, 1)),
    # what is no window
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
    "scaled": (lambda b, h, x, y: y <= x + x, None),
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


NOT_A_MODEL, BIAS = torch.nn.Linear(2, 2), DynamicPositionBias(8, 4)
CASES = {
    "model": (lambda: use_bias_attention(NOT_A_MODEL), TypeError, ["model", "Linear"]),
    "bias to no model": (lambda: add_position_bias(NOT_A_MODEL, BIAS), TypeError, ["model", "Linear"]),
    "bias": (lambda: add_position_bias(decoder("Llama"), NOT_A_MODEL), TypeError, ["position_bias", "Linear"]),
    "shared": (lambda: add_position_bias(decoder("Llama"), BIAS, shared=1), TypeError, ["shared", "1"]),
    "heads": (lambda: add_position_bias(decoder("Llama"), DynamicPositionBias(8, 2)), ValueError, ["4 heads", "got 2"]),
    "T5": (lambda: add_position_bias(t5(), DynamicPositionBias(8, 3)), ValueError, ["self-attention only", "T5"]),
    "twice": (
        lambda: add_position_bias(add_position_bias(decoder("Llama"), BIAS), BIAS),
        ValueError, ["no position bias yet"],
    ),
    "no interface": (
        lambda: use_bias_attention(
            transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=8, n_head=2, n_layer=1, vocab_size=9))
        ),
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
    with pytest.raises(ValueError, match="made for 5 queries and 5 keys, as LlamaAttention has, got one for 5 and 7"):
        model(input_ids=tokens(1, 5), attention_mask=padding(1, 7, None), use_cache=False)
