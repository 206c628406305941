"""KVzip: caches, scores, prompts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates, payback, plot_retention
from hf_dataopt.errors import HubError
from hf_dataopt.kvzip.eviction import budget_ratio, keep_mask
from hf_dataopt.kvzip.gate_fit import GateConfig
from hf_dataopt.kvzip.gate_network import GateWeights
from hf_dataopt.kvzip.head_scores import head_scores, load_head_scores, push_head_scores, save_head_scores
from hf_dataopt.kvzip.payback import Payback
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import KVzipPrompt, build_prompt
from hf_dataopt.kvzip.reading import PrefilledContext
from hf_dataopt.kvzip.scores.duo_attention import DuoAttention
from hf_dataopt.kvzip.scores.expected_attention import ExpectedAttention
from hf_dataopt.kvzip.scores.pyramidkv import PyramidKV
from hf_dataopt.kvzip.scores.random_eviction import RandomEviction
from hf_dataopt.kvzip.scores.snapkv import SnapKV
from hf_dataopt.kvzip.scores.streaming_llm import StreamingLLM
from hf_dataopt.kvzip.scoring import score_context

from ..models import byte_tokenizer, tiny_model
from .pool import FLAG, NONE, PATH, UNCALLED, WORDS, Argument, Case, Kind, count, instance, like, number, saved

NAN = float("nan")
CONTEXT = "The key of room 12 is blue."


@lru_cache(maxsize=1)
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=2)


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return byte_tokenizer()


@lru_cache(maxsize=1)
def prompt() -> KVzipPrompt:
    return build_prompt(tokenizer(), CONTEXT, KVzipConfig())


@lru_cache(maxsize=1)
def prefilled() -> PrefilledContext:
    return prefill(model(), prompt())


@lru_cache(maxsize=1)
def scores() -> torch.Tensor:
    return score_context(prefilled(), progress=False)


@lru_cache(maxsize=1)
def cache() -> KVzipCache:
    return KVzipCache.from_scores(prefilled(), scores(), tokenizer=tokenizer())


@lru_cache(maxsize=1)
def gates() -> KVzipGates:
    config = GateConfig(hidden=2, steps=2, tokens_per_step=8)
    return KVzipGates.fit(model(), tokenizer(), [CONTEXT, "Its lock is red."], config, progress=False)


def _of(**arguments: Argument) -> dict[str, Argument]:
    return arguments


def _messages(value: Any) -> bool | None:
    return None if isinstance(value, str | list | tuple | dict) else False


def _texts(value: Any) -> bool | None:
    return None if isinstance(value, str | list | tuple) else False


TALK = [
    *(
        lambda v=v: v
        for v in ({}, {"role": "user"}, {"role": 1, "content": "a"}, [{"role": "user", "content": 3}], "\ud800")
    ),
    lambda: [{"type": "image", "image": None}],
    lambda: [{"type": "image", "image": 3}],
    lambda: [{"type": "text"}],
    lambda: [{"type": "text", "text": None}],
    lambda: {"role": "assistant", "content": "a"},
    lambda: [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    lambda: ["a", {"role": "user", "content": "a"}],
    lambda: ["a", 3],
    lambda: [[], []],
    lambda: "",
]
_ASKED = (str, list, tuple, dict, torch.Tensor, np.ndarray, frozenset, range)
ASKED = [*TALK, *(lambda v=v: torch.tensor(v) for v in ([-1, 3], [[1], [2]], [[]]))]
MODEL = Argument(model, UNCALLED)
TOKENIZER = Argument(tokenizer, UNCALLED)
CONFIG = Argument(KVzipConfig, NONE | instance(KVzipConfig, near=[dict, lambda: KVzipConfig]))
STRICT = Argument(KVzipConfig, instance(KVzipConfig, near=[dict, lambda: KVzipConfig]))
PROMPT = Argument(prompt, instance(KVzipPrompt))
FULL = Argument(prefilled, instance(PrefilledContext, near=[model, cache]))
HEADS = like(lambda: scores().amax(-1), more=[lambda: scores().amax(-1) * NAN])
HUB = {
    "repo_id": Argument(lambda: "me/name", WORDS),
    "private": Argument(lambda: None, NONE | FLAG),
    "revision": Argument(lambda: None, NONE | WORDS),
    "token": Argument(lambda: "hf_none", NONE | WORDS | Kind(lambda value: None if isinstance(value, bool) else False)),
    "create_pr": Argument(lambda: False, FLAG),
    "commit_message": Argument(lambda: None, NONE | WORDS),
}
LOAD = {name: HUB[name] for name in ("revision", "token")}
ODD = Kind(lambda value: count(1).takes(value) and (None if int(value) % 2 else False), count(1).bad)
FOLDER = Argument(lambda: "saved", PATH)
LICENCE = Argument(lambda: None, NONE | WORDS)


def _ids(value: Any) -> bool | None:
    return None if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.ndim == 1 else False


def _saved(**arguments: Any) -> Any:
    saved("cache", cache().save_pretrained)
    return KVzipCache.from_pretrained(**arguments)


def _saved_heads(**arguments: Any) -> Any:
    saved("heads", lambda folder: save_head_scores(scores().amax(-1), folder, model_id="me/model"))
    return load_head_scores(**arguments)


def _saved_gates(**arguments: Any) -> Any:
    saved("gates", gates().save_pretrained)
    return KVzipGates.from_pretrained(**arguments)


def _gates() -> dict[str, Case]:
    config = Argument(GateConfig, instance(GateConfig, near=[dict, lambda: GateConfig, KVzipConfig]))
    texts = [lambda: [CONTEXT], lambda: [CONTEXT, 3], lambda: [CONTEXT, ""], lambda: CONTEXT]
    given = lambda: torch.zeros(3, gates().weights.width)  # noqa: E731
    quiet = Argument(lambda: False, FLAG)
    return {
        "KVzipGates": Case(
            KVzipGates,
            _of(
                weights=Argument(lambda: gates().weights, instance(GateWeights)),
                config=config,
                made_by=Argument(lambda: gates().made_by, instance(dict)),
                about=Argument(dict, NONE | instance(dict)),
            ),
        ),
        "KVzipGates.fit": Case(
            KVzipGates.fit,
            _of(
                model=MODEL,
                tokenizer=TOKENIZER,
                texts=Argument(
                    lambda: [CONTEXT, "Its lock is red."],
                    Kind(lambda value: None if isinstance(value, list | tuple) else False, texts),
                ),
                config=Argument(lambda: GateConfig(hidden=2, steps=1, tokens_per_step=8), NONE),
                scoring=CONFIG,
                checkpoints=Argument(lambda: None, NONE | PATH),
                source=Argument(lambda: "prose", WORDS),
                progress=quiet,
            ),
        ),
        "KVzipGates.check": Case(lambda model: gates().check(model), _of(model=MODEL)),
        "KVzipGates.score": Case(
            lambda **a: gates().score(**a),
            _of(layer=Argument(lambda: 1, count(0, 1)), given=Argument(given, like(given, loose=True))),
        ),
        "KVzipGates.prefill": Case(
            lambda **a: gates().prefill(**a),
            _of(model=MODEL, prompt=PROMPT, config=CONFIG, images=Argument(lambda: None, NONE), progress=quiet),
        ),
        "KVzipGates.read": Case(
            lambda **a: gates().read(**a), _of(model=MODEL, prompt=PROMPT, config=STRICT, progress=quiet)
        ),
        "KVzipGates.save_pretrained": Case(
            lambda **a: gates().save_pretrained(**a), _of(folder=FOLDER, license=LICENCE)
        ),
        "KVzipGates.from_pretrained": Case(_saved_gates, {"source": FOLDER, **LOAD}, (HubError,)),
        "KVzipGates.push_to_hub": Case(lambda **a: gates().push_to_hub(**a), {**HUB, "license": LICENCE}, (HubError,)),
    }


def _looked_at() -> dict[str, Case]:
    """What is measured or drawn of a compressed cache."""
    found = Payback(20, 2.0, 1.0, 0.2, 0.1, 0.3, 0.2, 0.1)
    clock = Argument(lambda: iter(range(999)).__next__, Kind(lambda value: None if callable(value) else False))
    return {
        "payback": Case(
            payback,
            _of(
                model=MODEL,
                tokenizer=TOKENIZER,
                context=Argument(lambda: CONTEXT, WORDS),
                config=CONFIG,
                gates=Argument(lambda: None, NONE | instance(KVzipGates)),
                question=Argument(lambda: "Which?", WORDS),
                steps=Argument(lambda: 1, count(1)),
                clock=clock,
                progress=Argument(lambda: False, FLAG),
            ),
        ),
        "Payback.saved": Case(
            found.saved, _of(questions=Argument(lambda: 2, count(0)), tokens=Argument(lambda: 3, count(0)))
        ),
        "Payback.break_even": Case(found.break_even, _of(tokens=Argument(lambda: 3, count(0)))),
        "plot_retention": Case(plot_retention, _of(cache=Argument(cache, instance(KVzipCache, near=[prefilled])))),
    }


def cases() -> dict[str, Case]:
    """All of the room."""
    ids = lambda: torch.arange(4, 9)  # noqa: E731
    mask = _of(scores=Argument(scores, like(scores, more=[lambda: scores() * NAN], loose=True)), config=STRICT)
    return {
        **_gates(),
        **_looked_at(),
        "KVzipCache": Case(
            KVzipCache,
            _of(
                layers=Argument(lambda: cache().pristine_layers, Kind(lambda value: False, [list, lambda: [None]])),
                prompt=PROMPT,
                config=STRICT,
                tokenizer=Argument(tokenizer, NONE | UNCALLED),
                made_by=Argument(dict, NONE | instance(dict)),
            ),
        ),
        "KVzipCache.from_context": Case(
            KVzipCache.from_context,
            _of(
                model=MODEL,
                tokenizer=TOKENIZER,
                context=Argument(lambda: CONTEXT, Kind(_messages, TALK)),
                keep_ratio=Argument(lambda: 0.5, NONE | number(0, 1, above=True)),
                config=CONFIG,
                head_scores=Argument(lambda: None, NONE | HEADS),
                gates=Argument(lambda: None, NONE | instance(KVzipGates)),
                progress=Argument(lambda: False, FLAG),
            ),
        ),
        "KVzipCache.from_contexts": Case(
            KVzipCache.from_contexts,
            _of(
                model=MODEL,
                tokenizer=TOKENIZER,
                contexts=Argument(
                    lambda: [CONTEXT, "Its lock is red."],
                    Kind(_texts, [lambda: [CONTEXT, 3], lambda: [""], list, lambda: CONTEXT]),
                ),
                keep_ratio=Argument(lambda: 0.5, NONE | number(0, 1, above=True)),
                config=CONFIG,
                gates=Argument(lambda: None, NONE | instance(KVzipGates)),
                progress=Argument(lambda: False, FLAG),
            ),
        ),
        "KVzipCache.from_scores": Case(
            KVzipCache.from_scores,
            _of(
                prefilled=Argument(lambda: prefill(model(), prompt()), FULL.kind),
                scores=Argument(scores, like(scores, more=[lambda: scores() * NAN])),
                config=CONFIG,
                tokenizer=Argument(tokenizer, NONE | UNCALLED),
                free=Argument(lambda: False, FLAG),
            ),
        ),
        "KVzipCache.inputs": Case(
            lambda question: cache().inputs(question),
            _of(question=Argument(lambda: "Which?", Kind(lambda v: None if isinstance(v, _ASKED) else False, ASKED))),
        ),
        "KVzipCache.compress_again": Case(
            lambda **a: cache().fork().compress_again(**a),
            _of(
                keep_ratio=Argument(lambda: None, NONE | number(0, 1, above=True)),
                max_kv_tokens=Argument(lambda: None, NONE | Kind(lambda v: count(1).takes(v) and None, count(1).bad)),
                model=Argument(model, NONE | UNCALLED),
                progress=Argument(lambda: False, FLAG),
            ),
        ),
        "KVzipCache.moved_to": Case(
            lambda where: cache().moved_to(where), _of(where=Argument(lambda: "cpu", WORDS | instance(torch.device)))
        ),
        "KVzipCache.attach": Case(lambda model: cache().attach(model), _of(model=MODEL)),
        "KVzipCache.save_pretrained": Case(
            lambda **a: cache().save_pretrained(**a), _of(folder=FOLDER, license=LICENCE)
        ),
        "KVzipCache.from_pretrained": Case(
            _saved,
            {"source": FOLDER, "model": MODEL, "tokenizer": Argument(tokenizer, NONE | UNCALLED), **LOAD},
            (HubError,),
        ),
        "KVzipCache.push_to_hub": Case(lambda **a: cache().push_to_hub(**a), HUB, (HubError,)),
        "KVzipPrompt": Case(
            KVzipPrompt,
            {
                name: Argument(ids, Kind(_ids, like(ids, more=[lambda: ids() - 9, lambda: ids().int()]).bad))
                for name in (
                    "prefix_ids",
                    "context_ids",
                    "suffix_ids",
                    "first_repeat_ids",
                    "next_repeat_ids",
                    "turn_ids",
                )
            },
        ),
        "KVzipPrompt.repeat_inputs": Case(
            prompt().repeat_inputs,
            _of(
                chunk_size=Argument(lambda: 8, count(1)),
                overlap=Argument(lambda: 2, count(0)),
                before=Argument(lambda: None, NONE | like(ids, more=[lambda: ids() - 9], loose=True)),
            ),
        ),
        "build_prompt": Case(
            build_prompt,
            _of(tokenizer=TOKENIZER, context=Argument(lambda: CONTEXT, Kind(_messages, TALK)), config=STRICT),
        ),
        "prefill": Case(
            prefill,
            _of(
                model=MODEL,
                prompt=PROMPT,
                config=CONFIG,
                images=Argument(lambda: None, NONE),
                progress=Argument(lambda: False, FLAG),
            ),
        ),
        "score_context": Case(
            score_context, _of(prefilled=FULL, config=CONFIG, progress=Argument(lambda: False, FLAG))
        ),
        "keep_mask": Case(keep_mask, {**mask, "n_prefix": Argument(lambda: 3, count(0))}),
        "budget_ratio": Case(
            budget_ratio,
            _of(config=STRICT, n_context=Argument(lambda: 9, count(1)), n_prefix=Argument(lambda: 3, count(0))),
        ),
        "head_scores": Case(
            head_scores,
            _of(
                model=MODEL,
                tokenizer=TOKENIZER,
                text=Argument(lambda: CONTEXT, Kind(_texts, [lambda: [CONTEXT, 3], lambda: [""], list])),
                config=CONFIG,
                progress=Argument(lambda: False, FLAG),
            ),
        ),
        "save_head_scores": Case(
            save_head_scores,
            _of(
                scores=Argument(
                    lambda: scores().amax(-1), like(lambda: scores().amax(-1), more=HEADS.bad[-1:], loose=True)
                ),
                folder=FOLDER,
                model_id=Argument(lambda: "me/model", WORDS),
                dtype=Argument(lambda: "auto", WORDS),
                source=Argument(lambda: "a book", WORDS),
                license=LICENCE,
            ),
        ),
        "load_head_scores": Case(_saved_heads, {"source": FOLDER, **LOAD}, (HubError,)),
        "push_head_scores": Case(
            push_head_scores,
            {
                "scores": Argument(lambda: scores().amax(-1), HEADS),
                "model_id": Argument(lambda: "me/model", WORDS),
                **HUB,
            },
            (HubError,),
        ),
        "SnapKV": Case(SnapKV, _of(window=Argument(lambda: 4, count(1)), kernel=Argument(lambda: 3, ODD))),
        "PyramidKV": Case(
            PyramidKV,
            _of(
                window=Argument(lambda: 4, count(1)),
                kernel=Argument(lambda: 3, ODD),
                beta=Argument(lambda: 20, count(1)),
            ),
        ),
        "StreamingLLM": Case(StreamingLLM, _of(sinks=Argument(lambda: 4, count(0)))),
        "ExpectedAttention": Case(
            ExpectedAttention, _of(ahead=Argument(lambda: 8, count(1)), sinks=Argument(lambda: 4, count(0)))
        ),
        "DuoAttention": Case(
            DuoAttention, _of(sinks=Argument(lambda: 4, count(0)), recent=Argument(lambda: 8, count(0)))
        ),
        "RandomEviction": Case(RandomEviction, _of(seed=Argument(lambda: 3, count(0, 2**63 - 1)))),
    }
