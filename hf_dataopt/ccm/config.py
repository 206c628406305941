"""Settings of Compressed Context Memory, as a PEFT type of our own."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig

from .._plugin import install

MEMORIES = ("concat", "merge", "concat_apart", "merge_apart", "gist")


class CCMPeftType(enum.StrEnum):
    """Our names in PEFT's tables. Not `"LORA"`: a reader without this package must fail, not load an unconditional LoRA.

    PEFT looks the name in a saved adapter up in a dict and says no more than `KeyError: <name>`, so what is saved says
    what to do; a plain "CCM" is read as well.
    """

    CCM = "CCM"
    SAVED = "CCM: run `import hf_dataopt` (pip install hf-dataopt) before loading this adapter"


@dataclass
class CCMConfig(LoraConfig):
    """Settings of the conditional LoRA and of the memory it writes; all other fields as `LoraConfig`.

    Args:
        r (`int`, >= 1, default 8), lora_alpha (`int`, default 16), lora_dropout (`float`, default 0.05): as the reference code.
        target_modules (default q, k, v and o projections): linear layers that the conditional LoRA adapts.
        num_comp_tokens (`int`, >= 1, default 2): length of one compression-token group.
        memory (`str`, default `"concat"`): `"concat"` and `"merge"` are the text's update functions (section 7.3.1);
            `"concat_apart"` and `"merge_apart"` compress c(t) without a look at Mem(t-1) (the former is Gisting-online);
            `"gist"` compresses everything in one group (Gisting).
        merge_weight (`float`, in (0, 1], optional): a_t for t >= 2 of the text's recurrence; default a_t = 1/t.
        comp_init_token_ids (`list[int]`, optional): vocabulary ids whose embeddings the compression tokens start from, in
            turn; default means over the vocabulary, as the reference code. The id of a line break is kinder to short runs.
        sink (`bool`, default `False`): the first token stays visible to every block (attention sink).
        conditional (`bool`, default `True`): False is a plain LoRA on every token, the ablation of Table 7.5.

    Raises:
        ValueError: a field is out of its range.

    Source: sections 7.3.1 and 7.4 (defaults of the reference code where the text names none).
    Differs: compression-token embeddings are trained too, as in the reference code; the text names the LoRA alone.
    """

    lora_alpha: int = field(default=16, metadata={"help": "scale of the LoRA, divided by r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the LoRA"})
    num_comp_tokens: int = field(default=2, metadata={"help": "compression tokens per group"})
    memory: str = field(default="concat", metadata={"help": f"one of {', '.join(MEMORIES)}"})
    merge_weight: float | None = field(default=None, metadata={"help": "a_t for t >= 2; default 1/t"})
    sink: bool = field(default=False, metadata={"help": "first token visible to all blocks"})
    conditional: bool = field(default=True, metadata={"help": "adapt compression tokens only"})
    comp_init_token_ids: list[int] | None = field(
        default=None, metadata={"help": "vocabulary ids whose embeddings compression tokens start from"}
    )
    comp_token_ids: list[int] | None = field(
        default=None, metadata={"help": "ids past the vocabulary that stand for compression tokens; set on injection"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = CCMPeftType.CCM
        if self.task_type is None:
            self.task_type = "CAUSAL_LM"
        if self.target_modules is None:
            self.target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if self.memory not in MEMORIES:
            raise ValueError(f"memory must be one of {', '.join(MEMORIES)}, got {self.memory!r}")
        if isinstance(self.num_comp_tokens, bool) or self.num_comp_tokens < 1:
            raise ValueError(f"num_comp_tokens must be at least 1, got {self.num_comp_tokens}")
        if self.merge_weight is not None and not 0 < self.merge_weight <= 1:
            raise ValueError(f"merge_weight must be in (0, 1], got {self.merge_weight}; None is the running mean")
        if self.merge_weight is not None and not self.merges:
            raise ValueError(f"merge_weight belongs to the merge memories, not to {self.memory!r}")
        start = self.comp_init_token_ids
        if start is not None and (not start or any(isinstance(i, bool) or not isinstance(i, int) for i in start)):
            raise ValueError(f"comp_init_token_ids must be a list of token ids, got {start!r}; None starts at means")
        if self.use_dora or self.bias != "none":
            raise ValueError("a conditional LoRA takes neither DoRA nor a trained bias: both act on every token")

    def to_dict(self) -> dict[str, Any]:
        """Fields for `adapter_config.json`; the type's name tells a reader without this package what to do."""
        return {**super().to_dict(), "peft_type": CCMPeftType.SAVED.value}

    @property
    def merges(self) -> bool:
        """Whether the memory has a fixed size."""
        return self.memory.startswith("merge")

    @property
    def recurrent(self) -> bool:
        """Whether c(t) sees Mem(t-1) (Eq. 7.1)."""
        return self.memory in ("concat", "merge")

    def update_weight(self, step: int) -> float:
        """a_t of step `step` (from 1): the share of h(t) in Mem(t)."""
        return 1.0 if step == 1 else (1.0 / step if self.merge_weight is None else self.merge_weight)


install()
