"""Every version check and every private or easily moved symbol of torch, transformers and peft that we touch.

Each with the reason why the public surface is not enough.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch's CPU flash attention. The public `scaled_dot_product_attention` calls it too, but drops the log-sum-exp that is
# needed to merge the attention over two sets of keys. Same signature from torch 2.3 to 2.15. Its name in `torch` is bound
# straight to C++; by way of `torch.ops.aten`, a call costs some 10 us more, once a head for every layer and token.
_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def has_cpu_flash() -> bool:
    """Whether this torch has the CPU kernel that returns the log-sum-exp."""
    return hasattr(torch, _CPU_FLASH)


def cpu_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output (B, H, q, d) and log-sum-exp (B, H, q), float32, of one fused CPU kernel; fewer KV heads are fine."""
    return getattr(torch, _CPU_FLASH)(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)


def gpu_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `cpu_flash` on a GPU, for as many KV heads as heads: flash attention in half precision, CUTLASS's kernel otherwise.

    `scaled_dot_product_attention` calls both, and drops the log-sum-exp here too.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if half and torch.cuda.get_device_capability(query.device) >= (8, 0):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        return found[0], found[1]
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, is_causal, scale=scale
    )
    return found[0], found[1][..., : query.shape[2]]  # the kernel fills up to a multiple of 32


def varlen_kernel() -> Any | None:
    """torch's public variable-length attention where it can return the log-sum-exp, else None (older torch)."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None
    if not {"return_aux", "scale"} <= set(inspect.signature(varlen_attn).parameters):
        return None
    return functools.partial(varlen_attn, return_aux=AuxRequest(lse=True))


def flash_varlen() -> Any | None:
    """flash-attn's variable-length attention (the extra `flash-attn`), else None."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def flex_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: Any, change: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's output and log-sum-exp; compiled on a GPU, where the plain function would hold all logits.

    Args:
        query, key, value: (1, 1, n, width).
        visible: its `mask_mod`. change: its `score_mod`, or None.
        scale: factor on the logits.
    """
    from torch.nn.attention import flex_attention as flex

    rows, keys = query.shape[2], key.shape[2]
    mask = flex.create_block_mask(visible, None, None, rows, keys, device=str(query.device))
    attention = _compiled_flex() if query.is_cuda else flex.flex_attention
    # `return_lse` became `return_aux` on the way from torch 2.8 to 2.14
    if hasattr(flex, "AuxRequest"):
        asked: dict[str, Any] = {"return_aux": flex.AuxRequest(lse=True)}
    else:
        asked = {"return_lse": True}
    output, more = attention(query, key, value, score_mod=change, block_mask=mask, scale=scale, **asked)
    return output, more if isinstance(more, torch.Tensor) else more.lse


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


# the keyword under which a cache is passed: 5.24 renamed it in every forward and in `generate`
CACHE_NAMES = ("past_key_values", "cache")


def cache_keyword(function: Any = None) -> str:
    """The keyword under which a forward takes its cache, read from its signature.

    Args:
        function: a model's `forward`; by default what the installed release's `generate` wants.
    """
    release = _release_cache_keyword()
    if function is None:
        return release
    names = inspect.signature(function).parameters
    return release if release in names else next((name for name in CACHE_NAMES if name in names), release)


def positions_of(config: Any) -> int | None:
    """Positions that a model was made for; None where its config does not say.

    Args:
        config: of the language model. A rotary embedding that was stretched (`factor` over
            `original_max_position_embeddings`) counts with its stretched length; llama3's limit is already that.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for part in (rope, *rope.values()) if isinstance(rope, dict) else ():
        if isinstance(part, dict) and part.get("rope_type") != "llama3":
            first, factor = part.get("original_max_position_embeddings"), part.get("factor")
            if isinstance(first, int) and isinstance(factor, int | float):
                limit = max(limit, int(first * factor))
    return limit


def takes_positions(module: Any) -> bool:
    """Whether a module's forward names `position_ids`."""
    return "position_ids" in _parameters(module)


def named_arguments(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward's arguments with all but the first under their names, as far as its signature names them."""
    names = _parameters(module)[1 : len(args) + 1]  # without self
    if len(args) < 2 or len(names) < len(args) or set(names) & set(kwargs):
        return args, kwargs  # the forward itself says what is wrong
    return args[:1], {**dict(zip(names[1:], args[1:], strict=True)), **kwargs}


_PARAMETERS: dict[type, tuple[str, ...]] = {}  # not functools.cache: torch.compile warns about it


def _parameters(module: Any) -> tuple[str, ...]:
    kind: Any = type(module)
    if kind not in _PARAMETERS:
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        found = inspect.signature(kind.forward).parameters.values()
        _PARAMETERS[kind] = tuple(parameter.name for parameter in found if parameter.kind not in variadic)
    return _PARAMETERS[kind]


@functools.cache
def _release_cache_keyword() -> str:
    from transformers import GenerationMixin

    names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in names)


def set_attention(config: Any, name: str | None) -> None:
    """Set one config's attention implementation.

    `set_attn_implementation` is the public way, but it validates names and touches every sub-model, and so does the property
    `_attn_implementation`; this is what it stores, and what modeling files read at every call.
    """
    config._attn_implementation_internal = name


def attention_of(name: str, module: Any) -> Any:
    """transformers' attention function of an implementation for one attention module.

    Eager attention stands in no table: every modeling file has its own and passes it as the default of a look-up.
    """
    # the tables behind `ALL_ATTENTION_FUNCTIONS.get`, which takes three times as long, in every layer of every token
    local, shared = _attention_tables()
    kind: Any = type(module)
    found = local.get(name) or shared.get(name) or (_eager_of(kind) if name == "eager" else None)
    if found is None:
        raise ValueError(
            f"no attention function {name!r} for {type(module).__name__}; use set_attn_implementation('sdpa')"
        )
    return found


def _attention_tables() -> tuple[dict[str, Any], dict[str, Any]]:
    tables = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS  # an import takes 20 microseconds
    return tables._local_mapping, tables._global_mapping


@functools.cache
def _eager_of(kind: Any) -> Any:
    files = (sys.modules.get(parent.__module__) for parent in kind.__mro__)
    return next((found for file in files if (found := getattr(file, "eager_attention_forward", None))), None)


def mask_of(name: str) -> Any | None:
    """transformers' mask function of an implementation, None where it wants no masks."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS.get(name)


def plain_causal(mask_function: Any = None, local_size: int | None = None, **kwargs: Any) -> bool:
    """Whether mask arguments ask for causality alone: no window, no blocks, no bidirectional image tokens."""
    from transformers.masking_utils import causal_mask_function

    return local_size is None and mask_function is causal_mask_function


def copied_layer(layer: Any) -> Any:
    """A cache layer of its own over the same tensors; states that transformers writes into in place are copied."""
    other = object.__new__(type(layer))
    other.__dict__.update(layer.__dict__)
    for name in ("conv_states", "recurrent_states"):  # of linear-attention layers
        states = layer.__dict__.get(name)
        if isinstance(states, dict):
            other.__dict__[name] = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in states.items()}
    for name in (
        "is_conv_states_initialized",
        "is_recurrent_states_initialized",
        "has_previous_state",
        "conv_kernel_size",
    ):
        if isinstance(layer.__dict__.get(name), dict):
            other.__dict__[name] = dict(layer.__dict__[name])
    return other


def layer_tensors(layer: Any) -> list[torch.Tensor]:
    """What a cache layer holds: keys and values, or the states of a linear-attention layer; nothing for layers that share."""
    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)
        found += list(states.values()) if isinstance(states, dict) else []
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def last_logits(model: Any) -> dict[str, int]:
    """Keyword for a forward whose logits nobody reads but for the last; layers that share keys would leave tokens out too."""
    model = causal_model_of(model)
    shares = getattr(text_config(model), "num_kv_shared_layers", 0)
    return {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) and not shares else {}


def window_of(model: Any, index: int) -> int | None:
    """Sliding window of layer `index`, as the cache that transformers would build has it."""
    from transformers import DynamicCache

    return getattr(DynamicCache(config=text_config(model)).layers[index], "sliding_window", None)


def layer_device(model: Any, index: int) -> torch.device:
    """Where layer `index` of a model runs: accelerate may have spread layers over devices."""
    layers = getattr(decoder_of(model), "layers", None)
    if layers is None or index >= len(layers):
        return input_device(model)
    return _device_of(layers[index])


def has_states(layer: Any) -> bool:
    """Whether a cache layer carries states of linear attention, which every token changes."""
    return isinstance(getattr(layer, "conv_states", None), dict)


def expand_states(layer: Any, batch: int) -> None:
    """Repeat the states of one row for every row of a batch."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        for i, state in states.items():
            if isinstance(state, torch.Tensor) and state.shape[0] == 1 < batch:
                states[i] = state.repeat_interleave(batch, dim=0)


def linear_states(layer: Any) -> dict[str, torch.Tensor]:
    """States of a linear-attention layer by name, for a file; none for layers that share keys."""
    return {
        f"{kind}.{i}": state
        for kind in ("conv_states", "recurrent_states")
        for i, state in (getattr(layer, kind, None) or {}).items()
        if isinstance(state, torch.Tensor)
    }


def linear_layer(model: Any, index: int, states: dict[str, torch.Tensor]) -> Any:
    """The cache layer that transformers makes for layer `index` of a model, with `linear_states` put back.

    Raises:
        ValueError: states that such a layer does not have.
    """
    from transformers import DynamicCache

    layer: Any = DynamicCache(config=text_config(model)).layers[index]
    for name, state in states.items():
        kind, _, number = name.partition(".")
        if kind not in ("conv_states", "recurrent_states") or not number.isdecimal() or not hasattr(layer, kind):
            raise ValueError(f"layer {index} has no state {name!r:.80}")
        i = int(number)
        if i not in getattr(layer, kind):
            raise ValueError(f"layer {index} has no state {name!r:.80}")
        layer.lazy_initialization(**{kind: state, "state_idx": i})
        getattr(layer, kind)[i].copy_(state)
        layer.has_previous_state[i] = True
    return layer


def text_config(model: Any) -> Any:
    """Config of the language model inside `model` (multimodal models nest it)."""
    return model.config.get_text_config(decoder=True)


def causal_model_of(model: Any) -> PreTrainedModel:
    """The model that `generate` belongs to, under PEFT's and `torch.compile`'s wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def decoder_of(model: Any) -> PreTrainedModel:
    """The module that runs the transformer layers, under wrappers and language-model heads."""
    model = causal_model_of(model)
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not hasattr(decoder, "config"):  # some classes call their head a decoder
        decoder = getattr(model, "base_model", model)
    return decoder


def input_device(model: Any) -> torch.device:
    """Where ids of a call belong: with weights spread by accelerate, the first parameter may be on disk ("meta")."""
    return _device_of(causal_model_of(model).get_input_embeddings())


def _device_of(module: Any) -> torch.device:
    """Where a module computes: accelerate's hook knows, on it or on the first part of it, else its first weight."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            where = getattr(one, "execution_device", None)
            if where is not None:
                return torch.device(f"cuda:{where}" if isinstance(where, int) else where)
    weight = next(module.parameters(), None)
    return torch.device("cpu") if weight is None or weight.device.type == "meta" else weight.device


@contextmanager
def loaded(module: Any) -> Iterator[None]:
    """Weights of one module that accelerate keeps on disk or another device: its own forward would load them, we read them."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def is_spread(model: Any) -> bool:
    """Whether accelerate brings weights of the model where they are needed: those on "meta" are somewhere else."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def last_block(decoder: Any) -> Any | None:
    """The last transformer layer of a decoder: what it gives has not passed the final norm, unlike all that models return."""
    blocks = next((getattr(decoder, name) for name in ("layers", "h", "blocks") if hasattr(decoder, name)), None)
    return blocks[-1] if isinstance(blocks, torch.nn.ModuleList) and len(blocks) else None


def output_projection(module: Any, width: int) -> Any | None:
    """The part of an attention module that maps all heads' outputs, `width` values, back to hidden states; None if unseen."""
    for name in ("o_proj", "out_proj", "dense", "c_proj", "wo"):
        found = getattr(module, name, None)
        weight = getattr(getattr(found, "base_layer", found), "weight", None)
        if isinstance(weight, torch.Tensor) and (weight.ndim != 2 or width in weight.shape):
            return found
    return None


# (x (heads, n, d), positions (n,) int64, back) -> x turned to these positions, or back from them
Turn = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def rotary_of(decoder: Any, module: Any, index: int) -> Turn | None:
    """The rotary embedding of one layer as a function of any vectors; None where it cannot be seen.

    transformers hands attention ready cosines and sines, and has how they are applied in every modeling file.
    """
    embedding = getattr(decoder, "rotary_emb", None)
    files = (sys.modules.get(parent.__module__) for parent in type(module).__mro__)
    apply = next((found for file in files if (found := getattr(file, "apply_rotary_pos_emb", None))), None)
    if getattr(module, "use_rope", True) is False:
        return lambda x, positions, back: x
    if embedding is None or apply is None or hasattr(module, "qk_rope_head_dim"):
        return None
    named = "layer_type" in inspect.signature(embedding.forward).parameters
    kind = {"layer_type": decoder.config.layer_types[index]} if named else {}

    def turn(x: torch.Tensor, positions: torch.Tensor, back: bool) -> torch.Tensor:
        cos, sin = embedding(x, positions[None], **kind)
        if back:  # some embeddings scale too
            size = cos.square() + sin.square()
            cos, sin = cos / size, -sin / size
        front, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat([apply(front[None], front[None], cos, sin)[0][0], rest], dim=-1)

    return turn


def layer_kinds(config: Any) -> list[str]:
    """`"full"`, `"sliding"`, `"linear"` or `"shared"` (keys of another layer) per layer, else the cache layer's class name.

    Asked of the cache that transformers itself would build, since configs spell layer types in several ways.
    """
    from transformers import cache_utils
    from transformers.cache_utils import DynamicCache

    kinds = {"DynamicLayer": "full", "DynamicSlidingWindowLayer": "sliding", "LinearAttentionLayer": "linear"}
    names = {getattr(cache_utils, name, None): kind for name, kind in (kinds | {"DummyLayer": "shared"}).items()}
    return [names.get(type(layer), type(layer).__name__) for layer in DynamicCache(config=config).layers]


def chunked_attention(config: Any) -> bool:
    """Whether what looks like sliding-window layers attends in fixed chunks: caches of both are alike, masks are not."""
    types = getattr(config, "layer_types", None) or []
    return bool(getattr(config, "attention_chunk_size", None)) and (not types or "chunked_attention" in types)


def lora_classes() -> tuple[Any, Any, Any]:
    """PEFT's LoRA linear layer, its base class, and the base of variants, which PEFT itself keeps in a submodule."""
    from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant

    return Linear, LoraLayer, LoraVariant


def active_adapters(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the LoRA adapters that are active in a module, switched off for the moment or not.

    Asked of a layer: a decoder inside a PEFT model has no such property, and transformers' own `active_adapters()` wants
    newer peft releases than there are.
    """
    _, layer_class, _ = lora_classes()
    layer = next((one for one in module.modules() if isinstance(one, layer_class)), None)
    return () if layer is None else tuple(layer.active_adapters)


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


def give_every_trainer(callback: type) -> None:
    """Put a callback class among those that every Trainer made from now on has.

    A data collator is all that a user hands over, and Trainer tells a collator nothing: neither which model it trains, nor
    when training begins. A callback is told both, and the loader.
    """
    from transformers import trainer

    defaults: list[Any] = trainer.DEFAULT_CALLBACKS
    if callback not in defaults:
        defaults.append(callback)
