# SPDX-License-Identifier: MIT
"""transformers' models on bias_attention under torch.compile have the graphs and the numbers of eager attention."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from hf_models import decoder, padding, t5, tokens
from quick import slow
from recompiled import begin_anew, why_again
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from transformers.generation.configuration_utils import CompileConfig

from dpb_triton import DynamicPositionBias
from dpb_triton.integrations.transformers import NAME, add_position_bias
from dpb_triton.integrations.transformers import attention as transformers_attention


@pytest.mark.parametrize("name", ["Llama", slow("Mistral"), "T5"])
def test_compiles_to_one_graph(name):
    if name == "T5" and torch.__version__ < (2, 13):
        pytest.skip(
            "before torch 2.13 Dynamo cannot follow transformers' DynamicCache, which copies T5's configuration"
        )
    options = {"sliding_window": 4} if name == "Mistral" else {}
    model = t5(num_layers=1) if name == "T5" else decoder(name, num_hidden_layers=1, **options)
    model.set_attn_implementation(NAME)
    inputs = {"input_ids": tokens(2, 9), "attention_mask": padding(2, 9, "left")}
    inputs |= {"decoder_input_ids": tokens(2, 5)} if name == "T5" else {"use_cache": False}
    begin_anew()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert counter.frame_count == 1, why_again()


def biased(shared, **options):
    torch.manual_seed(0)
    return add_position_bias(decoder("Llama"), DynamicPositionBias(8, 4, **options), shared=shared)


MODELS = {
    "Llama": lambda: decoder("Llama"),
    "Llama with a bias": lambda: biased(True),
    "Llama with a signed bias in each layer": lambda: biased(False, signed=True),
    "T5": lambda: t5(num_layers=1),
    "Mistral": lambda: decoder("Mistral", sliding_window=9, num_hidden_layers=1),
    # these fall back to eager in every layer
    "GptOss": lambda: decoder("GptOss", num_local_experts=2, num_experts_per_tok=1, num_hidden_layers=1),
    "Doge": lambda: decoder("Doge", keep_window_size=4, num_hidden_layers=1),
}


def decode(model, implementation, side, **options):
    """(logits of 5 new tokens, number of graphs) with a static cache; compiled if there are `options`."""
    torch.compiler.reset()
    counters.clear()
    if options:
        config = CompileConfig(backend="eager", mode="default", fullgraph=True, **options)
        config._compile_all_devices = True
        options = {"compile_config": config}
    model.set_attn_implementation(implementation)
    out = model.generate(
        tokens(2, 7), attention_mask=padding(2, 7, side), max_new_tokens=5, min_new_tokens=5, do_sample=False,
        cache_implementation="static", return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits, 1), counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "dynamic", "side"),
    [
        slow("Llama", None, None),
        slow("Llama", None, "left"),
        slow("Llama", False, None),
        ("Llama", False, "left"),
        ("Llama with a bias", False, "left"),
        slow("Llama with a signed bias in each layer", False, "left"),
        slow("T5", False, "left"),
        slow("Doge", False, "left"),
        # with a sliding window transformers itself compiles again for the second token
        slow("Mistral", None, "left"),
        slow("GptOss", None, "left"),
    ],
)
def test_a_static_cache_has_the_graphs_of_eager(name, dynamic, side):
    model = MODELS[name]()
    logits, graphs = decode(model, NAME, side, dynamic=dynamic)
    is_biased, is_sliding = "bias" in name, "sliding_window" in model.config.to_dict()
    options = {"dynamic": dynamic} if is_sliding else {}
    expected, expected_graphs = decode(model, NAME if is_biased else "eager", side, **options)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert graphs == (expected_graphs if is_sliding else 1)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Llama with a bias"])
def test_an_eager_call_on_a_cpu_has_a_number(monkeypatch, name):
    offsets = []
    place = transformers_attention.place

    def record(*arguments):
        offsets.append(arguments[4])
        return place(*arguments)

    monkeypatch.setattr(transformers_attention, "place", record)
    decode(MODELS[name](), NAME, None)
    assert {type(offset) for offset in offsets} == {int} and max(offsets) > 7
