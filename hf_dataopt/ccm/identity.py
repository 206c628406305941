"""Which model and adapter wrote a memory: settings to compare by name, and a short hash over samples of the weights."""

from __future__ import annotations

from typing import Any

from .._compat import causal_model_of, lora_classes, text_config
from ..weight_digest import weight_digest
from .config import CCMConfig

_, LoraLayer, _ = lora_classes()
_SETTINGS = ("memory", "num_comp_tokens", "merge_weight", "sink", "r", "lora_alpha", "conditional")
_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads")


def active_adapter(model: Any) -> str | None:
    """Name of the adapter at work, for PEFT models and for models that transformers itself put an adapter on."""
    if not getattr(model, "peft_config", None):
        return None
    name = getattr(model, "active_adapter", None)
    if isinstance(name, str):
        return name
    # asked of a layer: transformers' own `active_adapters()` wants newer peft releases than there are
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    names = [] if layer is None else layer.active_adapters
    return names[0] if len(names) == 1 else None


def ccm_config(model: Any) -> CCMConfig:
    """Settings of the model's active CCM adapter.

    Raises:
        ValueError: there is none.
    """
    config = getattr(model, "peft_config", {}).get(active_adapter(model))
    if not isinstance(config, CCMConfig):
        raise ValueError(
            f"{type(causal_model_of(model)).__name__} has no active CCM adapter; make one with "
            "`get_peft_model(base, CCMConfig(...))` or load one with `PeftModel.from_pretrained`"
        )
    return config


def check_still_active(model: Any, config: CCMConfig) -> None:
    """Refuse to go on with a memory after another adapter was made active.

    Raises:
        ValueError: the active adapter is not the one whose settings these are.
    """
    if ccm_config(model) is not config:
        raise ValueError(
            f"adapter {active_adapter(model)!r} is active now, this memory was begun with another; call model.set_adapter(...)"
        )


def identity(model: Any) -> dict[str, Any]:
    """What a memory file records of its model and of the active adapter.

    Returns:
        `model` and `adapter` (settings by name), `weights` (hex digest).

    Cost: 64 values of each adapter weight and of the embedding table, one transfer from the device.
    """
    config, base = ccm_config(model), causal_model_of(model)
    sizes = text_config(base)
    return {
        "model": {name: getattr(sizes, name, None) for name in _SIZES},
        "adapter": {name: getattr(config, name) for name in _SETTINGS},
        "weights": _digest(base, str(active_adapter(model))),
    }


def check_identity(saved: dict[str, Any], model: Any, folder: Any) -> None:
    """Refuse a memory that another model or another adapter wrote.

    Raises:
        ValueError: settings or weights differ.
    """
    found = identity(model)
    for part in ("model", "adapter"):
        wrote, has = saved.get(part, {}), found[part]
        different = [name for name in has if wrote.get(name) != has[name]]
        if different:
            pairs = ", ".join(f"{name} {wrote.get(name)!r}, here {has[name]!r}" for name in different)
            raise ValueError(f"the memory in {folder} belongs to another {part} ({pairs}); load that one")
    if saved.get("weights") != found["weights"]:
        raise ValueError(
            f"the memory in {folder} was written with other weights of the same sizes (another adapter, more training, "
            "another base model or dtype); load those, or append the contexts again"
        )


def _digest(base: Any, adapter: str) -> str:
    """Of the embedding table and the adapter's weights, whatever the adapter is called."""
    own = {}
    for name, weight in base.named_parameters():
        steps = name.split(".")
        if ".lora_" in name and adapter in steps:
            own[".".join(step for step in steps if step != adapter)] = weight
    table = base.get_input_embeddings().weight
    return weight_digest([("embeddings", table), *sorted(own.items())])
