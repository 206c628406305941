"""Every version check and every private or easily moved symbol of torch, transformers and peft that we touch.

Each with the reason why the public surface is not enough. A file holds one kind of thing; the names are taken from here.
"""

from __future__ import annotations

from .attention import attention_name, attention_of, mask_of, plain_causal, set_attention
from .caches import (
    CACHE_NAMES,
    cache_keyword,
    copied_layer,
    expand_states,
    has_states,
    layer_kinds,
    layer_tensors,
    linear_layer,
    linear_states,
    window_of,
)
from .devices import input_device, is_quantised, is_spread, layer_device, loaded
from .hooks import (
    active_adapters,
    adapts_tokens,
    checkpointing,
    gguf_bar_as_others,
    give_every_trainer,
    lora_classes,
    peft_tables,
    set_checkpointing,
)
from .kernels import cpu_flash, flash_varlen, flex_varlen, gpu_flash, has_cpu_flash, varlen_kernel
from .models import (
    Turn,
    causal_model_of,
    chunked_attention,
    decoder_of,
    last_block,
    last_logits,
    named_arguments,
    output_projection,
    positions_of,
    rotary_of,
    takes_positions,
    text_config,
)

__all__ = [
    "CACHE_NAMES",
    "Turn",
    "active_adapters",
    "adapts_tokens",
    "attention_name",
    "attention_of",
    "cache_keyword",
    "causal_model_of",
    "checkpointing",
    "chunked_attention",
    "copied_layer",
    "cpu_flash",
    "decoder_of",
    "expand_states",
    "flash_varlen",
    "flex_varlen",
    "gpu_flash",
    "gguf_bar_as_others",
    "give_every_trainer",
    "has_cpu_flash",
    "has_states",
    "input_device",
    "is_quantised",
    "is_spread",
    "last_block",
    "last_logits",
    "layer_device",
    "layer_kinds",
    "layer_tensors",
    "linear_layer",
    "linear_states",
    "loaded",
    "lora_classes",
    "mask_of",
    "named_arguments",
    "output_projection",
    "peft_tables",
    "plain_causal",
    "positions_of",
    "rotary_of",
    "set_attention",
    "set_checkpointing",
    "takes_positions",
    "text_config",
    "varlen_kernel",
    "window_of",
]
