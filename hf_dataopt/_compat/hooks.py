"""Where PEFT, Trainer and the reader of GGUF files let others in: tables, lists and names that they keep for themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def lora_classes() -> tuple[Any, Any]:
    """The base classes of PEFT's LoRA layers and of their variants, which PEFT itself keeps in a submodule."""
    from peft.tuners.lora.layer import LoraLayer, LoraVariant

    return LoraLayer, LoraVariant


def adapts_tokens(layer: Any, adapter: str) -> bool:
    """Whether a LoRA layer of PEFT is a linear one that leaves its update to a variant, which may then act on some tokens only.

    PEFT has a class for each kind of quantised layer, with no base class for those that do (bitsandbytes, GPTQ, HQQ) beside
    those that compute the update themselves (AWQ, AQLM, EETQ): the code of the forward tells them apart.
    """
    matrix = getattr(layer, "lora_A", {})
    if adapter not in matrix or not isinstance(matrix[adapter], torch.nn.Linear):
        return False
    code = getattr(inspect.unwrap(type(layer).forward), "__code__", None)
    return code is not None and "lora_variant" in code.co_names


def active_adapters(module: torch.nn.Module) -> tuple[str, ...]:
    """Names of the LoRA adapters that are active in a module, switched off for the moment or not.

    Asked of a layer: a decoder inside a PEFT model has no such property, and transformers' own `active_adapters()` wants
    newer peft releases than there are.
    """
    layer_class, _ = lora_classes()
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


def checkpointing(module: torch.nn.Module) -> Any:
    """What transformers recomputes a layer with, where it is to be recomputed; None elsewhere.

    `gradient_checkpointing_enable` takes no function, and a recomputed layer runs outside the forward's hooks.
    """
    return module.__dict__.get("_gradient_checkpointing_func")


def set_checkpointing(module: torch.nn.Module, function: Any) -> None:
    """Have a layer recomputed with another function, see `checkpointing`."""
    module._gradient_checkpointing_func = function


def give_every_trainer(callback: type) -> None:
    """Put a callback class among those that every Trainer made from now on has.

    A data collator is all that a user hands over, and Trainer tells a collator nothing: neither which model it trains, nor
    when training begins. A callback is told both, and the loader.
    """
    from transformers import trainer

    defaults: list[Any] = trainer.DEFAULT_CALLBACKS
    if callback not in defaults:
        defaults.append(callback)


@contextmanager
def gguf_bar_as_others() -> Iterator[None]:
    """While a GGUF file is read: its bar obeys the switches that all other bars of transformers do.

    transformers draws this one with plain tqdm, into log files and past `disable_progress_bar` too.
    """
    from huggingface_hub.utils.tqdm import tqdm
    from transformers import modeling_gguf_pytorch_utils as reader

    plain = getattr(reader, "tqdm", None)
    if plain is None:  # drawn in another way
        yield
        return
    reader.tqdm = tqdm  # type: ignore[attr-defined]
    try:
        yield
    finally:
        reader.tqdm = plain  # type: ignore[attr-defined]
