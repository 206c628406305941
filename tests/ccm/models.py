"""Tiny adapted models and samples that the tests of this room share."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model

from hf_dataopt import CCMConfig

from ..models import tiny_model


def adapted(family: str = "llama", seed: int = 1, layers: int = 3, **settings: Any) -> PeftModel:
    """A tiny model with a CCM adapter whose B matrices are not zero."""
    changes = {"num_hidden_layers": layers} | ({"sliding_window": 6} if family in ("gemma3", "mistral") else {})
    model = get_peft_model(tiny_model(family, **changes), CCMConfig(**{"r": 4, "lora_dropout": 0.0, **settings}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def sample(lengths: tuple[int, ...] = (9, 4, 12, 7), seed: int = 0) -> dict[str, Any]:
    """A sample of random ids: contexts of the lengths given, the last one split into input and output of 3."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(4, 260, (n,), generator=generator).tolist() for n in lengths]
    return {"contexts": rows[:-1], "input": rows[-1][:-3], "output": rows[-1][-3:]}
