"""A compressed context on a tiny model of each family."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from hf_dataopt.kvzip.cache import KVzipCache
from hf_dataopt.kvzip.config import KVzipConfig
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.reading import PrefilledContext
from hf_dataopt.kvzip.scoring import score_context

from ..models import FAMILIES, byte_tokenizer, held, tiny_model

CONTEXT = "The key of room 12 is blue. The key of room 7 is red. Nobody has the key of room 3."


class Compressed:
    """Model, full cache and scores of one family; `cache(ratio)` evicts."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model: PreTrainedModel = tiny_model(family)
        self.tokenizer = byte_tokenizer()
        self.config = KVzipConfig(chunk_size=32)
        self.prefilled: PrefilledContext = prefill(self.model, build_prompt(self.tokenizer, CONTEXT, self.config))
        self.scores = score_context(self.prefilled, self.config, progress=False)

    def cache(self, keep_ratio: float) -> KVzipCache:
        config = KVzipConfig(keep_ratio=keep_ratio)
        return KVzipCache.from_scores(self.prefilled, self.scores, config, tokenizer=self.tokenizer)

    def logits(self, cache: KVzipCache, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.model(ids, **held(cache)).logits


_MADE: dict[str, Compressed] = {}


def _made(family: str) -> Compressed:
    if family not in _MADE:
        _MADE[family] = Compressed(family)
    return _MADE[family]


@pytest.fixture(params=list(FAMILIES))
def compressed(request: pytest.FixtureRequest) -> Compressed:
    return _made(request.param)


@pytest.fixture
def llama() -> Compressed:
    return _made("llama")
