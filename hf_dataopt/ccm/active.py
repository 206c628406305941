"""The CCM adapter at work in a model: its name, its settings, and which weights tell it from others."""

from __future__ import annotations

from typing import Any

import torch

from .._compat import active_adapters, causal_model_of
from ..publishing.identity import check_identity, identity
from ..settings import check_kind
from .config import CCMConfig

_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
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


def base_identity(model: Any) -> dict[str, Any]:
    """What an adapter's file records of its base model: an `identity` of the weights under the adapters.

    Without `weights` where they cannot be compared: quantised, or offloaded.

    Cost: 64 values of each weight, one transfer from the device.
    """
    named = [(name.replace(".base_layer", ""), one) for name, one in causal_model_of(model).named_parameters()]
    weights = [(name, one) for name, one in named if ".lora_" not in name]
    plain = all(one.dtype in _PLAIN and one.device.type != "meta" for _, one in weights)
    found = identity(model, weights if plain else ())
    return found if plain else {name: value for name, value in found.items() if name != "weights"}


def check_base(wrote: Any, model: Any, source: Any) -> None:
    """Refuse a base model that an adapter was not trained on: another model, or another tuning of it.

    Weights are compared where both are known in one dtype; sizes always.

    Args:
        wrote: `base_identity`, as read from the adapter's record; None where an adapter has none.
        model: that the adapter is to be put on.
        source: of the adapter, for the message.

    Raises:
        ValueError: sizes or weights differ.
    """
    wrote, found = wrote if isinstance(wrote, dict) else {}, base_identity(model)
    name = wrote.get("tuned") or wrote.get("name")
    if wrote.get("dtype") != found["dtype"] or not wrote.get("weights") or "weights" not in found:
        wrote, found = wrote | {"dtype": found["dtype"], "weights": None}, found | {"weights": None}
    what = f"the adapter in {source} (trained on {name!r:.100})" if name else f"the adapter in {source}"
    check_identity(wrote, found, what, "train an adapter on this one")
