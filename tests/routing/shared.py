"""One tiny adapted model that serves compressed caches, compressed memories and plain calls, and what it should answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_dataopt import CompressedContextMemory, KVzipCache

from ..ccm.models import adapted
from ..models import byte_tokenizer, held, tiny_model

CONTEXTS = [
    "The key of room 12 is blue. The key of room 7 is red. " * 2,
    "Nobody has the key of room 3, says Anna. " * 3,
]
QUESTION = "Which key is blue?"
GREEDY = {"do_sample": False, "eos_token_id": None}


def compressed(family: str = "llama", keep_ratio: float = 0.5, **changes: Any) -> tuple[Any, KVzipCache]:
    """A tiny model and a cache on it."""
    model = tiny_model(family, **changes)
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXTS[0], keep_ratio=keep_ratio, progress=False)
    return model, cache


def question_ids(cache: KVzipCache, question: str = QUESTION) -> torch.Tensor:
    """Ids (1, q) of a question behind the context."""
    return cache.inputs(question)["input_ids"][:, cache.ids.shape[1] :]


def logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of new ids behind a cache, which goes on."""
    with torch.no_grad():
        return model(ids, **held(cache)).logits


class Served:
    """Requests of every kind on one model, by name; each takes a number and gives tokens."""

    def __init__(self) -> None:
        self.model = adapted(sink=True)
        tokenizer = byte_tokenizer()
        self.caches = [
            KVzipCache.from_context(self.model, tokenizer, context, keep_ratio=ratio, progress=False)
            for context, ratio in zip(CONTEXTS, (0.5, 0.3), strict=True)
        ]
        self.kinds: dict[str, Callable[[int], list[int]]] = {
            "first cache": lambda i: self._ask(self.caches[0], i),
            "second cache": lambda i: self._ask(self.caches[1], i),
            "memory": self._remember,
            "plain": self._plain,
        }

    def _ask(self, cache: KVzipCache, i: int) -> list[int]:
        return self.model.generate(**cache.inputs(f"Question {i}?"), max_new_tokens=4, **GREEDY)[0].tolist()

    def _remember(self, i: int) -> list[int]:
        memory = CompressedContextMemory(self.model)
        for turn in range(2):
            memory.append([5 + i, 7, 9, 11 + turn] * 3)
        return memory.generate([8, 9 + i], max_new_tokens=4, **GREEDY)[0].tolist()

    def _plain(self, i: int) -> list[int]:
        ids = torch.tensor([[5 + i, 6, 7, 8, 9, 10]])
        return self.model.generate(input_ids=ids, max_new_tokens=4, **GREEDY)[0].tolist()
