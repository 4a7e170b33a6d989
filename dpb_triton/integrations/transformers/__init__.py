# SPDX-License-Identifier: MIT
"""transformers' models on `bias_attention`. Needs `pip install 'dpb_triton[transformers]'`.

Importing this registers the attention under the name "dpb_triton":

    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    from dpb_triton import DynamicPositionBias
    from dpb_triton.integrations.transformers import add_position_bias, use_bias_attention

    t5 = T5ForConditionalGeneration(T5Config(d_model=64, d_ff=128, num_layers=2, vocab_size=256,
                                             decoder_start_token_id=0))
    use_bias_attention(t5)  # its learned bias stays a table of distances, in training too

    llama = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4,
                                         num_hidden_layers=2, vocab_size=256))
    llama.set_attn_implementation("dpb_triton")  # the same numbers as before
    add_position_bias(llama, DynamicPositionBias(16, heads=4))  # a bias in every layer, trained with the model

Causal and bidirectional attention, sliding windows, softcap, dropout, grouped heads, padding on either side, dynamic
and static caches run in O(n) memory. All other requests (`output_attentions=True`, a mask (i, j) from the caller or the
model, packed sequences, chunks, keys that the model selects, attention sinks, a bias that is no table of distances, …)
go through the model's own eager attention, with its numbers and its memory; a warning says so once. Requests that even
eager attention cannot serve raise. Under torch.compile pass an attention_mask to decoders: without one, transformers
makes a mask (i, j) that looks for packed sequences. With a static cache `generate` compiles as often as with eager
attention: once, except for sliding windows.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "dpb_triton.integrations.transformers needs transformers: pip install 'dpb_triton[transformers]'"
    ) from error

import copy
from typing import Any, TypeVar

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...checks import check_flag
from ...module import DynamicPositionBias
from .attention import attend, find_eager_attention
from .mask import make_mask
from .table import NAME, has_t5_bias, replace_t5_bias

__all__ = ["NAME", "add_position_bias", "use_bias_attention"]

Model = TypeVar("Model", bound=transformers.PreTrainedModel)


def use_bias_attention(model: Model) -> Model:
    """Make a transformers model attend with `bias_attention`; `model.set_attn_implementation("eager")` undoes it.

    For T5 and similar models (mT5, UMT5, Switch, …) this does more than `model.set_attn_implementation("dpb_triton")`:
    their learned bias stays a table of distances, while T5 alone would make an (i, j) tensor of it.

    Args:
        model: a `PreTrainedModel` whose layers use transformers' attention interface.

    Returns:
        The same model.

    Raises:
        TypeError: model is no PreTrainedModel.
        ValueError: its class does not use the attention interface.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    model.set_attn_implementation(NAME)
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel) and part.config._attn_implementation != NAME:
            raise ValueError(
                f"model must use transformers' attention interface, which {type(part).__name__} does not: its "
                f"attention implementation stays {part.config._attn_implementation!r}"
            )
    for module in model.modules():
        if has_t5_bias(module):
            replace_t5_bias(module)
    return model


def add_position_bias(model: Model, position_bias: DynamicPositionBias, *, shared: bool = True) -> Model:
    """Give every self-attention layer a `DynamicPositionBias`, as its `pos_bias`, and run the model on bias_attention.

    The scores get the bias beside the model's own position encoding, and the bias trains with the model. With another
    attention implementation the model then refuses to run. To load a saved model, make the model, add a position bias
    again, and load the state_dict.

    Args:
        model: a `PreTrainedModel` that is no encoder-decoder, already on its device and in its dtype.
        position_bias: a `DynamicPositionBias` with the model's number of query heads.
        shared: True gives all layers one bias, in the state_dict as `pos_bias` of the base model; False gives each
            layer a copy.

    Returns:
        The same model.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the number of heads differs, or the model has cross attention, no attention layers, a bias of its
            own (T5), or a position bias already.
    """
    check_flag("shared", shared)
    if not isinstance(position_bias, DynamicPositionBias):
        raise TypeError(f"position_bias must be a DynamicPositionBias, got {type(position_bias).__name__}")
    if not isinstance(model, transformers.PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    configs = model.config, model.config.get_text_config()
    if any(getattr(c, "is_encoder_decoder", False) or getattr(c, "add_cross_attention", False) for c in configs):
        raise ValueError(f"model must have self-attention only, got {name}, whose keys may be another sequence's")
    layers = [module for module in model.modules() if find_eager_attention(type(module)) is not None]
    if not layers:
        raise ValueError(f"model must have layers that use transformers' attention interface, found none in {name}")
    if any(has_t5_bias(layer) for layer in layers):
        raise ValueError(f"model must have no position bias of its own, got {name}")
    if any(hasattr(layer, "pos_bias") for layer in layers):
        raise ValueError(f"model must have no position bias yet, got a {name} with one")
    for layer in layers:
        heads = getattr(layer.config, "num_attention_heads", position_bias.heads)
        if heads != position_bias.heads:
            raise ValueError(f"position_bias must have the model's {heads} heads, got {position_bias.heads}")
    use_bias_attention(model)
    if shared:
        model.base_model.pos_bias = position_bias
    for layer in layers:
        if shared:
            # not registered as a submodule: the parameters belong to the base model, and are saved once
            layer.__dict__["pos_bias"] = position_bias
        else:
            layer.pos_bias = copy.deepcopy(position_bias)
        layer.register_forward_pre_hook(_check_implementation)
    return model


def _check_implementation(layer: Any, _: Any) -> None:
    if layer.config._attn_implementation != NAME:
        raise RuntimeError(
            f"a model with a position bias needs the attention implementation {NAME!r}, which adds it, got "
            f"{layer.config._attn_implementation!r}"
        )


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, make_mask)
