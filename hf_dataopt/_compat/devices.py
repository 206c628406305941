"""Where a model computes: accelerate may have spread its weights over devices, the disk too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .models import causal_model_of, decoder_of


def input_device(model: Any) -> torch.device:
    """Where ids of a call belong: with weights spread by accelerate, the first parameter may be on disk ("meta")."""
    return _device_of(causal_model_of(model).get_input_embeddings())


def layer_device(model: Any, index: int) -> torch.device:
    """Where layer `index` of a model runs: accelerate may have spread layers over devices."""
    layers = getattr(decoder_of(model), "layers", None)
    if layers is None or index >= len(layers):
        return input_device(model)
    return _device_of(layers[index])


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


def is_quantised(model: Any) -> bool:
    """Whether transformers holds layers of the model in another form than plain weights (bitsandbytes, GPTQ, torchao, ...)."""
    return bool(getattr(model, "is_quantized", False))
