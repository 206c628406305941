"""Every version check and every private or easily moved symbol of torch, transformers and peft that we touch.

Each with the reason why the public surface is not enough.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch's CPU flash attention. The public `scaled_dot_product_attention` calls it too, but drops the log-sum-exp that is
# needed to merge the attention over two sets of keys. Same signature from torch 2.3 to 2.15.
_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def has_cpu_flash() -> bool:
    """Whether this torch has the CPU kernel that returns the log-sum-exp."""
    return hasattr(torch.ops.aten, _CPU_FLASH)


def cpu_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output (B, H, q, d) and log-sum-exp (B, H, q), float32, of one fused CPU kernel; fewer KV heads are fine."""
    return getattr(torch.ops.aten, _CPU_FLASH)(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)


def varlen_kernel() -> Any | None:
    """torch's public variable-length attention where it can return the log-sum-exp, else None (older torch)."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None
    if not {"return_aux", "scale"} <= set(inspect.signature(varlen_attn).parameters):
        return None
    return functools.partial(varlen_attn, return_aux=AuxRequest(lse=True))


def set_attention(config: Any, name: str | None) -> str | None:
    """Set a config's attention implementation for one call and return what was set before.

    `set_attn_implementation` is the public way, but it validates and touches every sub-model, far too slow for each
    decoded token; the property underneath is what modeling files read at the call.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    return before


def text_config(model: PreTrainedModel) -> Any:
    """Config of the language model inside `model` (multimodal models nest it)."""
    return model.config.get_text_config(decoder=True)


def causal_model_of(model: Any) -> PreTrainedModel:
    """The model that `generate` belongs to, under PEFT's wrappers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> PreTrainedModel:
    """The module that runs the transformer layers, under PEFT wrappers and language-model heads."""
    model = causal_model_of(model)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return model if decoder is None else decoder


def layer_kinds(config: Any) -> list[str]:
    """`"full"` or `"sliding"` per layer, `"other"` for anything a KV cache of this kind cannot hold.

    Asked of the cache that transformers itself would build, since configs spell layer types in several ways.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    names: dict[type, str] = {DynamicLayer: "full", DynamicSlidingWindowLayer: "sliding"}
    return [names.get(type(layer), "other") for layer in DynamicCache(config=config).layers]


def lora_classes() -> tuple[Any, Any, Any]:
    """PEFT's LoRA linear layer, its base class, and the base of variants, which PEFT itself keeps in a submodule."""
    from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant

    return Linear, LoraLayer, LoraVariant


def peft_tables() -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]:
    """PEFT's tables from adapter type to config, tuner and parameter prefix.

    `peft.utils.register_peft_method` is the public way, but it takes members of PEFT's own enum only.
    """
    from peft import mapping

    return (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    )
