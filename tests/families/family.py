"""What a family is, and the settings that several of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 264
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,  # embeddings are not scaled up, so tied logits would be flat
}
WINDOW = {"sliding_window": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
LINEAR_LAYERS = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

EXACT, REFUSED, EITHER = "exact", "refused", "exact or refused"


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        config_class: name of the transformers class of its configuration.
        settings: of the configuration, on top of the common ones.
        kvzip, ccm: `EXACT`: the method must be exact on it. `REFUSED`: it must raise `UnsupportedModelError`. `EITHER`: one
            of the two; attention code of its own, or layers that are not plain attention.
        notes: what is special about its attention or its layers.
        model_class: name of the transformers class of the model, where `AutoModelForCausalLM` picks another one.
        gain: factor on the weights; less where random weights overflow.
        continues: whether transformers itself goes on exactly from a cache with several tokens at once. Where it does not
            (Mamba 1 restarts its state), the reference is the plain cache, not the full forward.
        broken: releases on which the model itself fails.
        bare: leave the common settings out (multimodal models, whose `settings` hold those of their parts).
        targets: what a CCM adapter adapts.
    """

    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)
    kvzip: str = EXACT
    ccm: str = EXACT
    notes: str = ""
    model_class: str | None = None
    gain: float = 6.0
    continues: bool = True
    broken: tuple[str, ...] = ()
    bare: bool = False
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def available(self) -> bool:
        """Whether the installed transformers has it, and runs it."""
        return (
            hasattr(transformers, self.config_class)
            and hasattr(transformers, self.model_class or "PreTrainedModel")
            and not transformers.__version__.startswith(tuple(f"{release}." for release in self.broken))
        )

    def model(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """A random model in eval mode; the experts of mixtures run one by one, which is exact for any batch."""
        common = {"tie_word_embeddings": False} if self.bare else DECODER
        config = getattr(transformers, self.config_class)(**{**common, **self.settings, **changes})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.model_class is None:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = getattr(transformers, self.model_class)(config)
        if getattr(config.get_text_config(decoder=True), "_experts_implementation", None):
            model.set_experts_implementation("eager")
        if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # sdpa, the default up to 5.20, leaves the cap out without a word
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("sinks"):  # equal sinks would hide one that is read for another head
                    weight.copy_(torch.randn(weight.shape, generator=generator))
                elif weight.ndim >= 2 and not any(part in name for part in ("embed", "vision", "conv")):
                    weight.mul_(self.gain)
        return model.eval()
