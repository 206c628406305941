"""The CCM adapter at work in a model: its name, its settings, and which weights tell it from others."""

from __future__ import annotations

from typing import Any

import torch

from .._compat import active_adapters, causal_model_of
from ..publishing.identity import identity
from ..settings import check_kind
from .config import CCMConfig

_SETTINGS = ("memory", "num_comp_tokens", "merge_weight", "sink", "r", "lora_alpha", "conditional")


def active_adapter(model: Any) -> str | None:
    """Name of the adapter at work, for PEFT models and for models that transformers itself put an adapter on."""
    if not getattr(model, "peft_config", None):
        return None
    name = getattr(model, "active_adapter", None)
    if isinstance(name, str):
        return name
    # asked of a layer: transformers' own `active_adapters()` wants newer peft releases than there are
    names = active_adapters(model)
    return names[0] if len(names) == 1 else None


def ccm_config(model: Any) -> CCMConfig:
    """Settings of the model's active CCM adapter.

    Raises:
        ValueError: there is none.
    """
    check_kind("model", model, torch.nn.Module, "make one with get_peft_model(base, CCMConfig(...))")
    configs = getattr(model, "peft_config", None)
    config = configs.get(active_adapter(model)) if isinstance(configs, dict) else None
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


def written_by(model: Any) -> dict[str, Any]:
    """What a memory file records of its model and of the active adapter: an `identity` with the adapter's settings.

    Its weights are the embedding table and the adapter's own, whatever the adapter is called.

    Cost: 64 values of each of them, one transfer from the device.
    """
    config, base, adapter = ccm_config(model), causal_model_of(model), str(active_adapter(model))
    own: dict[str, Any] = {}
    for name, weight in base.named_parameters():
        steps = name.split(".")
        if ".lora_" in name and adapter in steps:
            own[".".join(step for step in steps if step != adapter)] = weight
    weights: list[tuple[str, Any]] = [("embeddings", base.get_input_embeddings().weight), *sorted(own.items())]
    return identity(model, weights, {name: getattr(config, name) for name in _SETTINGS})
