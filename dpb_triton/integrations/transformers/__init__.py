# SPDX-License-Identifier: MIT
"""transformers' models on `bias_attention`. Needs `pip install 'dpb_triton[transformers]'`.

Importing this registers the attention under the name "dpb_triton":

    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
    from dpb_triton import DynamicPositionBias
    from dpb_triton.integrations.transformers import add_position_bias, use_bias_attention

    t5 = T5ForConditionalGeneration(T5Config(d_model=64, d_ff=128, num_layers=2, vocab_size=256,
                                             decoder_start_token_id=0))
    use_bias_attention(t5)  # its learned bias stays a table of the distance, in training too

    llama = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4,
                                         num_hidden_layers=2, vocab_size=256))
    llama.set_attn_implementation("dpb_triton")  # the same numbers as before
    add_position_bias(llama, DynamicPositionBias(16, heads=4))  # a bias in every layer, trained with the model

Causal and bidirectional attention, sliding windows, softcap, dropout, grouped heads, padding on either side, dynamic
and static caches have their O(n) path. Everything else a model may ask for (`output_attentions=True`, a mask (i, j) of
the caller's or one that the model computes, packed sequences, chunks, keys that it chooses, attention sinks, a bias
that is no table of the distance, …) goes through the model's own eager attention, whose numbers and whose memory it
then has; a warning says so once. What even that cannot do raises. Under torch.compile give decoders an attention_mask:
without one transformers makes a mask (i, j) that looks for packed sequences. With a static cache `generate` compiles as
often as with eager attention: once, but for sliding windows.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "dpb_triton.integrations.transformers needs transformers: pip install 'dpb_triton[transformers]'"
    ) from error

import copy

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...checks import check_flag
from ...module import DynamicPositionBias
from .attention import attend, find_eager_attention
from .mask import make_mask
from .table import NAME, has_t5_bias, replace_t5_bias

__all__ = ["NAME", "add_position_bias", "use_bias_attention"]


def use_bias_attention(model):
    """Have a transformers model attend by `bias_attention`; `model.set_attn_implementation("eager")` undoes it.

    More than `model.set_attn_implementation("dpb_triton")` for T5 and what is built like it (mT5, UMT5, Switch, …):
    their learned bias stays a table of the distance, where otherwise T5 makes an (i, j) tensor of it.

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


def add_position_bias(model, position_bias, *, shared=True):
    """Give every self-attention layer a `DynamicPositionBias`, as its `pos_bias`, and run the model on bias_attention.

    The bias is added to the scores beside what the model has for positions already, and trains with the model. With
    another attention implementation the model then refuses to run. To load a saved one, make the model, add a position
    bias again, and load its state_dict.

    Args:
        model: a `PreTrainedModel` that is no encoder-decoder, with the device and dtype it is to have.
        position_bias: a `DynamicPositionBias` with the model's number of query heads.
        shared: one bias for all layers, in the state_dict as `pos_bias` of the base model; else each layer has a copy.

    Returns:
        The same model.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: another number of heads, a model with cross attention or without attention layers, one with a bias
            of its own (T5), one that has a position bias already.
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
            # past nn.Module's registration: the parameters belong to the base model, and are saved once
            layer.__dict__["pos_bias"] = position_bias
        else:
            layer.pos_bias = copy.deepcopy(position_bias)
        layer.register_forward_pre_hook(_check_implementation)
    return model


def _check_implementation(layer, _):
    if layer.config._attn_implementation != NAME:
        raise RuntimeError(
            f"a model with a position bias needs the attention implementation {NAME!r}, which adds it, got "
            f"{layer.config._attn_implementation!r}"
        )


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, make_mask)
