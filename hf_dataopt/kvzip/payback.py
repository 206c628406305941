"""When compressing has paid: what a context costs once, what every decoded token saves, measured on this model and machine."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from .._compat import cache_keyword
from ..settings import (
    check_callable,
    check_config,
    check_flag,
    check_int,
    check_kind,
    check_number,
    check_text,
    check_tokenizer,
    optional,
)
from .cache import KVzipCache
from .config import KVzipConfig
from .gates import KVzipGates
from .prefill import prefill
from .prompt import build_prompt, question_ids
from .proof import prove
from .reading import PrefilledContext, check_supported
from .scoring import score_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .prompt import KVzipPrompt

QUESTION = "What does the text say about this?"


@dataclass(frozen=True)
class Payback:
    """What one context took, in seconds; a token's and a question's are medians.

    Args:
        tokens: of the context, prompt included.
        prefill: reading it once; both sides need that.
        compress: scoring and evicting, on top of `prefill`.
        ask_full, ask_compressed: reading one question behind the plain cache and behind the compressed one.
        token_full: one decoded token behind the plain cache of transformers.
        token_whole: behind our own cache with nothing evicted; what is left of the saving then is eviction's.
        token_compressed: behind the compressed cache.
    """

    tokens: int
    prefill: float
    compress: float
    ask_full: float
    ask_compressed: float
    token_full: float
    token_whole: float
    token_compressed: float

    def saved(self, questions: int, tokens: int) -> float:
        """Seconds that compressing saves, with `questions` questions of `tokens` decoded tokens each; below 0 it costs.

        Raises:
            ValueError: a negative number.
        """
        questions, tokens = check_int("questions", questions, 0), check_int("tokens", tokens, 0)
        return questions * self._saved_by_one(tokens) - self.compress

    def break_even(self, tokens: int) -> float:
        """Questions of `tokens` decoded tokens each after which compressing has paid; `math.inf` where it never does.

        Raises:
            ValueError: a negative number.
        """
        one = self._saved_by_one(check_int("tokens", tokens, 0))
        if self.compress <= 0:
            return 0
        return math.ceil(self.compress / one) if one > 0 else math.inf

    def line(self, tokens: int = 32) -> str:
        """One line for people: when it pays with answers of `tokens` tokens, and what a token takes."""
        after = self.break_even(tokens)
        pays = (
            f"pays after {after:.0f} questions"
            if after < math.inf
            else "does not pay in time, only in memory, with any number of questions"
        )
        return (
            f"compressing takes {self.compress / self.prefill:.2f} of a prefill and {pays} of {tokens} tokens: a token takes "
            f"{1e3 * self.token_compressed:.1f} ms, {self.token_compressed / self.token_full:.2f} of the full cache's and "
            f"{self.token_compressed / self.token_whole:.2f} of an uncompressed cache's of ours"
        )

    def _saved_by_one(self, tokens: int) -> float:
        return self.ask_full - self.ask_compressed + tokens * (self.token_full - self.token_compressed)


def payback(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    config: KVzipConfig | None = None,
    *,
    gates: KVzipGates | None = None,
    question: str = QUESTION,
    steps: int = 8,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> Payback:
    """Time a prefill, a compression and a few decoded tokens, with the plain, the whole and the compressed cache in turn.

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): as for `KVzipCache.from_context`.
        context (`str`): a text as long as those that will be compressed; what it says does not matter.
        config (`KVzipConfig`, optional): how it will be compressed.
        gates (`KVzipGates`, optional): measure compression by gates.
        question (`str`): a question of typical length.
        steps (`int`, >= 1, default 8): decoded tokens of each cache; the first of each is not counted where there are more.
        clock (callable): seconds; `time.process_time` where other jobs share the machine.
        progress (`bool`, default `True`): show bars.

    Returns:
        The seconds, with `saved(questions, tokens)` and `break_even(tokens)`.

    Raises:
        UnsupportedModelError: see `KVzipCache.from_context`.
        TypeError, ValueError: a bad argument.

    Source: section 8.4 (Figure 8.8 compares times of a token).
    Cost: one or two prefills, one compression, `3 * steps` decoded tokens; full, whole and compressed keys and values are in
        memory at once.

    Example:
        >>> found = payback(model, tokenizer, context, KVzipConfig(keep_ratio=0.3), steps=2, progress=False)
        >>> "of a prefill" in found.line(tokens=32)
        True
    """
    config, progress = check_config(config, KVzipConfig), check_flag("progress", progress)
    check_supported(model)
    check_tokenizer("tokenizer", tokenizer)
    check_text("context", context)
    optional(check_kind, "gates", gates, KVzipGates)
    check_text("question", question)
    steps = check_int("steps", steps, 1)
    _check_clock(clock)
    if gates is not None:
        gates.check(model)
    prove(model)  # once per class, no part of compressing
    watch = _Watch(model, clock)
    prompt = build_prompt(tokenizer, context, config)
    read, prefilled = watch(lambda: prefill(model, prompt, config, progress=progress))
    compress, cache = _compressed(watch, model, prompt, config, prefilled, gates, read, progress)
    whole = KVzipCache.from_scores(
        prefilled,
        torch.zeros(len(prefilled.scored_layers), len(cache.stored_lengths[0]), prefilled.n_context),
        replace(config, keep_ratio=1.0, max_kv_tokens=None, storage="model"),
    )
    plain = copy.deepcopy(prefilled.cache)
    asked = question_ids(tokenizer, prompt.suffix_ids, question, config)
    asks, tokens = _in_turn(watch, {"plain": plain, "whole": whole.fork(), "compressed": cache.fork()}, asked, steps)
    return Payback(
        tokens=prompt.ids.numel(),
        prefill=read,
        compress=compress,
        ask_full=asks["plain"],
        ask_compressed=asks["compressed"],
        token_full=tokens["plain"],
        token_whole=tokens["whole"],
        token_compressed=tokens["compressed"],
    )


def _check_clock(clock: Any) -> None:
    todo = "give one without arguments that gives seconds, such as time.process_time"
    check_callable("clock", clock, todo)
    try:
        now = clock()
    except TypeError as error:
        raise TypeError(f"clock cannot be called without arguments ({error!s:.100}); {todo}") from error
    check_number("what clock gives", now, todo=todo)


class _Watch:
    """Seconds of a call, the device's work included."""

    def __init__(self, model: Any, clock: Callable[[], float]) -> None:
        self.model, self.clock = model, clock

    def __call__(self, call: Callable[[], Any]) -> tuple[float, Any]:
        start = self._now()
        result = call()
        return self._now() - start, result

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return self.clock()


def _compressed(
    watch: _Watch,
    model: Any,
    prompt: KVzipPrompt,
    config: KVzipConfig,
    prefilled: PrefilledContext,
    gates: KVzipGates | None,
    read: float,
    progress: bool,
) -> tuple[float, KVzipCache]:
    """Seconds of scoring and evicting beyond a prefill, and the compressed cache."""
    if gates is None:
        scoring, scores = watch(lambda: score_context(prefilled, config, progress=progress))
    else:
        both, (_, scores) = watch(lambda: gates.prefill(model, prompt, config, progress=progress))
        scoring = max(both - read, 0.0)
    evicting, cache = watch(lambda: KVzipCache.from_scores(prefilled, scores, config))
    return scoring + evicting, cache


@torch.no_grad()
def _in_turn(
    watch: _Watch, caches: dict[str, Any], asked: torch.Tensor, steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of reading a question and of a decoded token, token by token in turn, so that all see the same machine."""
    model = watch.model
    row, token = asked[None].to(model.device), asked[None, -1:].to(model.device)

    def read(cache: Any, ids: torch.Tensor) -> float:
        return watch(lambda: model(ids, logits_to_keep=1, **{cache_keyword(): cache}))[0]

    asks = {name: read(cache, row) for name, cache in caches.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(steps):
        for name, cache in caches.items():
            times[name].append(read(cache, token))
    return asks, {name: statistics.median(found[1:] or found) for name, found in times.items()}
