"""Settings of KVzip, each with its range and the place it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from ..settings import Settings, check_callable, check_choice, check_config, check_number, settle
from ..text.chat import ChatFormat
from .quantised import BITS, Storage
from .scores import NAMES

if TYPE_CHECKING:
    from .fields import KVzipFields

TASK_LINE = "Given the context, answer to the following question or request without explanation.\n\n"
FIRST_REPEAT_PROMPT = "\n\nRepeat the previous context exactly."
NEXT_REPEAT_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with "

_CHOICES = {
    "level": ("pair", "pair-uniform", "head"),
    "replay": ("exact", "local"),
    "softmax_keys": ("chunk", "all"),
    "ties": ("position", "reference"),
    "storage": ("model", *BITS),
}
_COUNTS = {
    "chunk_size": 1,
    "overlap": 0,
    "prefill_chunk_size": 1,
    "max_kv_tokens": 1,
    "head_sinks": 0,
    "head_recent": 0,
}


@dataclass(frozen=True, kw_only=True)
class KVzipConfig(Settings):
    """How a context's cache is scored and evicted.

    Args:
        keep_ratio (`float`, in (0, 1], default 0.3): share of the *context's* key-value pairs that stays; system prompt
            and template tokens always stay on top (section 8.4.1; 0.3 is the reference's default).
        max_kv_tokens (`int`, >= 1, optional): budget instead of `keep_ratio`: mean number of stored tokens per layer and
            head, prefix included. A context that fits is kept whole.
        standing (`bool`, default `False`): `max_kv_tokens` holds for what comes after the context too: behind every forward,
            all pairs of context, questions and answers together are at most `max_kv_tokens` a head on average. Needs gates,
            which score each token as it is read, one request a fork, and a level of pairs; see `standing.py`.
        level (`str`, default `"pair"`): `"pair"` spreads the budget over all layers and heads (non-uniform, section
            8.4.1); `"pair-uniform"` gives every head the same number of pairs; `"head"` keeps or drops the context of a
            head as a whole, but for `head_sinks` and `head_recent` (section 8.4.2).
        head_sinks (`int`, tokens, >= 0, default 64): with `level="head"`, what a dropped head keeps at the start of the cache,
            the prompt before the context included; at most a sixteenth of the context, and DuoAttention's number.
        head_recent (`int`, tokens, >= 0, default 256): with `level="head"`, what a dropped head keeps at the context's end; as
            `head_sinks`.
        score (`str` or callable, default `"kvzip"`): how pairs are ranked: `"kvzip"` (Eq. 8.2), `"kvzip_plus"`, `"kvgrad"`,
            ours `"kvzip_l2"` and `"kvgrad_l2"` (better with small budgets), or query-agnostic ones of section 8.4.1: `"h2o"`,
            `"snapkv"`, `"pyramidkv"`, `"streaming_llm"`, `"expected_attention"`, `"duo_attention"`, `"random_eviction"`. One
            of their classes with other hyperparameters (`kvzip/scores/`) and any function `(layer, queries, keys, values,
            positions)` to (KV heads, n) will do too (see `score.Score`); such a config cannot be saved.
        chunk_size (`int`, tokens, >= 1, default 512): context tokens repeated at a time, `m` of section 8.3.4 (the text
            says 2K, the reference code 2000: `KVzipConfig.reference()`). Smaller chunks need less time and memory.
        overlap (`int`, tokens, >= 0, default 8): last tokens of the preceding chunk put into the repeat prompt (Figure 8.7).
        replay (`str`, default `"local"`): `"exact"` repeats with the whole cache in sight, as the text; `"local"` lets the
            repeat pass see prefix, chunk and itself only: linear time, answers as good (`benchmarks/README.md`).
        softmax_keys (`str`, default `"chunk"`): keys under the score's softmax: prefix, chunk and repeat input (reference
            code), or `"all"` keys (Eq. 8.2 read literally; needs `replay="exact"`).
        ties (`str`, default `"position"`): `"position"` keeps exactly floor(N * keep_ratio) pairs, earlier positions
            first among equals; `"reference"` is the reference code's strict threshold, which keeps fewer.
        storage (`str`, default `"model"`): how kept pairs are held: in the model's dtype, or in `"int8"` or `"int4"`, with
            scales 8.4 and 4.4 bits a number (`quantised.py`), opened head by head or layer by layer when a token looks at
            them. Pairs are scored before they are quantised; what comes after the context is not.
        prefill_chunk_size (`int`, tokens, >= 1, default 16000): context tokens per forward while prefilling;
            a context with images is read in one.
        task_line (`str`): instruction put before the context, as the reference code does.
        system (`str`, optional): system message before the user's turn; it stays whole in the cache, as all of the prompt.
        template_kwargs (`dict`, optional): for `tokenizer.apply_chat_template`: `enable_thinking`, `tools`, `documents`, ...
            JSON; a function among `tools` becomes its JSON schema, as transformers makes it.
        special_tokens_in_text (`bool`, default `False`): False encodes `<|im_end|>` written in context, question, system
            message, tools or documents as the signs it is written with; True as the token. Tokens that the tokenizer does
            not call special (`<think>`) are text with an id of its own and stay that.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field has the wrong type.

    Source: chapter 8; defaults from the reference code where it and the text differ.
    Differs: chunks of 512 and local replay by default, measured.

    Example:
        >>> KVzipConfig(keep_ratio=0.5).to_json_string()[:17]
        '{"keep_ratio": 0.'
    """

    METHOD: ClassVar[str] = "KVzip"
    keep_ratio: float = 0.3
    max_kv_tokens: int | None = None
    standing: bool = False
    level: Literal["pair", "pair-uniform", "head"] = "pair"
    head_sinks: int = 64
    head_recent: int = 256
    score: str | Callable[..., Any] = "kvzip"
    chunk_size: int = 512
    overlap: int = 8
    replay: Literal["exact", "local"] = "local"
    softmax_keys: Literal["chunk", "all"] = "chunk"
    ties: Literal["position", "reference"] = "position"
    storage: Storage = "model"
    prefill_chunk_size: int = 16_000
    task_line: str = TASK_LINE
    system: str | None = None
    template_kwargs: dict[str, Any] | None = field(default=None, hash=False)
    special_tokens_in_text: bool = False

    def __post_init__(self) -> None:
        todo = "it is the share that stays, not the share removed"
        ratio = check_number("keep_ratio", self.keep_ratio, 0, 1, above=True, todo=todo)
        object.__setattr__(self, "keep_ratio", ratio)
        settle(
            self,
            choices=_CHOICES,
            counts=_COUNTS,
            flags=("standing",),
            texts=("task_line",),
            optional=("max_kv_tokens",),
        )
        if self.standing and (self.max_kv_tokens is None or self.level == "head" or self.storage != "model"):
            raise ValueError(
                "standing=True needs max_kv_tokens, a level of pairs and storage='model' (numbers would be quantised again and "
                f"again), got max_kv_tokens={self.max_kv_tokens}, level={self.level!r}, storage={self.storage!r}"
            )
        if self.softmax_keys == "all" and self.replay == "local":
            raise ValueError("softmax_keys='all' needs the whole cache in sight: use replay='exact'")
        if isinstance(self.score, str):
            object.__setattr__(self, "score", check_choice("score", self.score, tuple(NAMES)))
        elif isinstance(self.score, type):
            raise TypeError(f"score must be a name or a score, got the class {self.score.__name__}; call it")
        else:
            check_callable("score", self.score, f"or one of {', '.join(NAMES)}")
        chat = self.chat
        object.__setattr__(self, "template_kwargs", chat.template_kwargs)  # JSON now
        object.__setattr__(self, "special_tokens_in_text", chat.special_tokens_in_text)

    @classmethod
    def reference(cls, **changes: Unpack[KVzipFields]) -> KVzipConfig:
        """The authors' code: chunks of 2000, the whole cache in sight, a strict threshold, heads dropped without windows."""
        theirs: KVzipFields = {
            "chunk_size": 2000,
            "replay": "exact",
            "ties": "reference",
            "head_sinks": 0,
            "head_recent": 0,
        }
        return cls(**(theirs | changes))

    def to_json_string(self) -> str:
        """As `Settings.to_json_string`.

        Raises:
            ValueError: the score is no name.
        """
        if not isinstance(self.score, str):
            name = getattr(self.score, "__name__", repr(self.score))
            raise ValueError(
                f"score={name:.80} is a function, which cannot be saved; score with it, then build the cache by "
                "KVzipCache.from_scores(prefilled, scores, config) with a config that names a score"
            )
        return super().to_json_string()

    @property
    def chat(self) -> ChatFormat:
        """How messages become text."""
        return ChatFormat(
            template_kwargs=self.template_kwargs,
            system=self.system,
            special_tokens_in_text=self.special_tokens_in_text,
        )


def with_ratio(config: KVzipConfig | None, keep_ratio: float | None) -> KVzipConfig:
    """Settings, None for their defaults, with a ratio beside them that counts if it is given."""
    config = check_config(config, KVzipConfig)
    return config if keep_ratio is None else replace(config, keep_ratio=keep_ratio)
