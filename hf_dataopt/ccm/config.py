"""Settings of Compressed Context Memory, as a PEFT type of our own."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..settings import brief, check_each, check_int, check_number, settle

_BASE = "would change the base model's weights"
_EVERY = "would act on every token"
_INITS = (True, False, "gaussian", "orthogonal")  # those that leave the base weights alone
# LoraConfig's fields whose effect Eq. 7.4 forbids: the update acts on compression tokens, the base model stays as it is
_FORBIDDEN = {
    "bias": f"a trained bias {_EVERY}",
    "lora_bias": f"a bias on the LoRA {_EVERY}",
    "use_dora": f"DoRA rescales the base weights, which {_EVERY}",
    "modules_to_save": f"fully trained modules {_EVERY}",
    "trainable_token_indices": "trained vocabulary embeddings would change plain text (compression tokens have their own)",
    "target_parameters": f"a LoRA on bare parameters {_EVERY}",
    "layer_replication": _BASE.replace("weights", "layers"),
    "alora_invocation_tokens": "an activated LoRA would act on all tokens after its own invocation tokens",
    "use_qalora": "QALoRA pools the input features in a layer of its own, without the mask",
    "megatron_config": "Megatron's parallel layers compute the update themselves, without the mask",
    "velora_config": "VeLoRA computes the update in a layer of its own, without the mask",
    "monteclora_config": "MonteCLoRA computes the update in a layer of its own, without the mask",
    "use_bdlora": "BD-LoRA computes the update in a layer of its own, without the mask",
    "arrow_config": f"Arrow mixes other adapters in, which {_EVERY}",
    "kasa_config": f"KaSA cuts the base weights, which {_EVERY}",
    "loftq_config": f"LoftQ {_BASE}",
    "corda_config": f"CorDA {_BASE}",
    "lora_ga_config": f"LoRA-GA {_BASE}",
    "eva_config": "EVA starts from statistics of all tokens, not of compression tokens",
}
# fields that say where, how strongly or in what dtype the update acts, or nothing about it
_ALLOWED = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
STREAM = {
    "max_kv": 160,
    "compress_tokens": 64,
    "memory_size": 8,
    "sink": 1,
}  # section 7.4, "Streaming with sliding window"
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

    Fields of `LoraConfig` that change the base weights or act on other tokens than compression tokens are refused, and so are
    fields of later PEFT releases that are not at their default.

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
        stream (`dict`, optional): sizes of the stream that `DataCollatorForCCM(layout="stream")` trains the adapter for:
            `max_kv`, `compress_tokens`, `memory_size`, `sink`. Those left out are section 7.4's, as with `{}`;
            `StreamingContextMemory` takes them over. Concat memories only.
        conditional (`bool`, default `True`): False is a plain LoRA on every token, the ablation of Table 7.5.

    Raises:
        ValueError: a field is out of its range, or has an effect that Eq. 7.4 forbids.

    Source: sections 7.3.1 and 7.4 (defaults of the reference code where the text names none).
    Differs: compression-token embeddings are trained too, as in the reference code; the text names the LoRA alone.

    Example:
        >>> CCMConfig(r=8, num_comp_tokens=2, memory="merge").merges
        True
    """

    lora_alpha: int = field(default=16, metadata={"help": "scale of the LoRA, divided by r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the LoRA"})
    num_comp_tokens: int = field(default=2, metadata={"help": "compression tokens per group"})
    memory: str = field(default="concat", metadata={"help": f"one of {', '.join(MEMORIES)}"})
    merge_weight: float | None = field(default=None, metadata={"help": "a_t for t >= 2; default 1/t"})
    sink: bool = field(default=False, metadata={"help": "first token visible to all blocks"})
    conditional: bool = field(default=True, metadata={"help": "adapt compression tokens only"})
    stream: dict[str, int] | None = field(default=None, metadata={"help": "sizes of the stream that is trained for"})
    comp_init_token_ids: list[int] | None = field(
        default=None, metadata={"help": "vocabulary ids whose embeddings compression tokens start from"}
    )
    comp_token_ids: list[int] | None = field(
        default=None, metadata={"help": "ids past the vocabulary that stand for compression tokens; set on injection"}
    )

    def __post_init__(self) -> None:
        self._check_fields()
        check_conditional(self)
        super().__post_init__()
        self.peft_type = CCMPeftType.CCM
        if self.task_type is None:
            self.task_type = "CAUSAL_LM"
        if self.target_modules is None:
            self.target_modules = ["q_proj", "k_proj", "v_proj", "o_proj"]

    def _check_fields(self) -> None:
        settle(
            self,
            choices={"memory": MEMORIES},
            counts={"r": (1, 2**16), "num_comp_tokens": (1, 2**16)},
            numbers={"lora_alpha": (-1e9, 1e9), "lora_dropout": (0.0, 1.0)},
            flags=("sink", "conditional"),
        )
        if self.merge_weight is not None:
            todo = "None is the running mean"
            self.merge_weight = check_number("merge_weight", self.merge_weight, 0, 1, above=True, todo=todo)
            if not self.merges:
                raise ValueError(f"merge_weight belongs to the merge memories, not to {self.memory!r}")
        if self.stream is not None:
            if self.memory != "concat":
                raise ValueError(f"a stream is trained for with memory='concat', not {self.memory!r}")
            self.stream = stream_sizes(self.stream, self.num_comp_tokens)
        for name in ("comp_init_token_ids", "comp_token_ids"):
            if getattr(self, name) is not None:
                setattr(self, name, list(check_each(name, getattr(self, name), check_int, 0)))
        targets = self.target_modules
        names = isinstance(targets, list | tuple | set) and targets and all(isinstance(one, str) for one in targets)
        if targets is not None and not isinstance(targets, str) and not names:
            raise TypeError(
                f"target_modules must be names of linear layers, got {brief(targets)}; None takes q, k, v, o"
            )

    def to_dict(self) -> dict[str, Any]:
        """Fields for `adapter_config.json`; the type's name tells a reader without this package what to do."""
        return {**super().to_dict(), "peft_type": CCMPeftType.SAVED.value}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT; the last file that PEFT's own saves and pushes write, so its empty card becomes ours here."""
        from ..publishing.adapters import replace_form

        super().save_pretrained(save_directory, **kwargs)
        replace_form(Path(save_directory))

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
        step = check_int("step", step, 1)
        return 1.0 if step == 1 else (1.0 / step if self.merge_weight is None else self.merge_weight)


def stream_sizes(given: Any, n_tok: int) -> dict[str, int]:
    """Sizes of a stream, those that are not given as in section 7.4.

    Args:
        given: `max_kv`, `compress_tokens` (tokens), `memory_size` (slots), `sink` (tokens), any of them.
        n_tok: compression tokens in a group.

    Raises:
        TypeError: no mapping.
        ValueError: other names, or sizes that do not fit together.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"stream must be a dict of {', '.join(STREAM)}, got {brief(given)}; {{}} takes section 7.4's")
    if set(given) - set(STREAM):
        raise ValueError(f"stream has sizes {', '.join(STREAM)}; got {sorted(map(str, given))}")
    least = {"max_kv": 1, "compress_tokens": n_tok, "memory_size": n_tok, "sink": 0}
    sizes = {name: check_int(name, given.get(name, size), least[name]) for name, size in STREAM.items()}
    if sizes["sink"] + sizes["memory_size"] + sizes["compress_tokens"] > sizes["max_kv"]:
        raise ValueError(
            f"max_kv {sizes['max_kv']} cannot hold sink {sizes['sink']} + memory {sizes['memory_size']} + "
            f"{sizes['compress_tokens']} tokens to compress"
        )
    return sizes


def check_conditional(config: CCMConfig) -> None:
    """Refuse settings whose effect Eq. 7.4 forbids.

    Raises:
        ValueError: which field, why, and what to do.
    """
    if isinstance(config.init_lora_weights, str | bool) and config.init_lora_weights not in _INITS:
        raise ValueError(
            f"init_lora_weights={brief(config.init_lora_weights)} is refused: it {_BASE}, or starts from statistics of all "
            "tokens, and a conditional LoRA leaves plain text as it is (Eq. 7.4); use one of "
            f"{', '.join(map(repr, _INITS))}"
        )
    own = set(CCMConfig.__annotations__)
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name in own | _ALLOWED or value == _default(one):
            continue
        why = _FORBIDDEN.get(one.name)
        if why is None:
            why = "this field of a newer peft has not been compared with Eq. 7.4"
        elif not value and not isinstance(
            value, dict
        ):  # an empty list says the same as None; {} is a config of defaults
            continue
        raise ValueError(
            f"{one.name}={brief(value)} is refused: {why}, and a conditional LoRA changes compression tokens alone (Eq. 7.4); "
            f"leave {one.name} at {_default(one)!r}, or train such an adapter apart and merge it into the base model first"
        )


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def check_alone(model: Any, adapter_name: str, configs: dict[str, Any]) -> None:
    """Refuse to put a conditional LoRA on a model with adapters of another kind: they would silently stop acting.

    Args:
        model: on its way to an adapter; nothing has been done to it yet.
        adapter_name: of the new adapter.
        configs: by adapter name, the new one included.

    Raises:
        ValueError: another adapter is there, or settings that Eq. 7.4 forbids.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_conditional(configs[adapter_name])
    ours = {name for name, one in configs.items() if isinstance(one, CCMConfig) and name != adapter_name}
    found = {name for name, one in configs.items() if not isinstance(one, CCMConfig)}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            named = (getattr(module, kind, ()) for kind in module.adapter_layer_names)
            found |= {str(name) for names in named for name in getattr(names, "keys", tuple)()} - ours
    if isinstance(model, PeftModel):
        found |= set(model.peft_config)
    if found:
        raise ValueError(
            f"the model already has the adapter {', '.join(map(repr, sorted(found)))}, which would stop acting beside a "
            "conditional LoRA; merge it into the model (`merge_and_unload()`) or take it off (`unload()`) first; a further CCM "
            "adapter is added with `model.add_adapter(name, CCMConfig(...))`"
        )
