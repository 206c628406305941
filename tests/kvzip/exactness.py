"""How far KVzip is from the plain model on one family, with everything kept and with some of it evicted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_dataopt.errors import UnsupportedModelError
from hf_dataopt.kvzip.cache import KVzipCache
from hf_dataopt.kvzip.config import KVzipConfig
from hf_dataopt.kvzip.eviction import keep_mask
from hf_dataopt.kvzip.prompt import build_prompt, question_ids
from hf_dataopt.kvzip.scoring import prefill, score_context

from ..families import Family
from ..families.plain import answer, cache_keyword, generate, logits, prefilled
from ..models import byte_tokenizer
from .oracle import masked_logits, written_out_scores

CONTEXT = "The key of room 12 is blue. The key of room 7 is red. Nobody has the key of room 3."
QUESTION = "Which key is red?"
CONFIG = KVzipConfig(chunk_size=32)
_ANSWER = 4


@dataclass
class Exactness:
    """Largest absolute logit differences in float32, or why the model was refused.

    Args:
        refusal: message of the `UnsupportedModelError`.
        forward: a question behind a fork that keeps everything, against the plain model.
        generated: the same for the logits of `generate`; infinite where the tokens differ.
        plain: the model without a cache after compression, or after its refusal, against before.
        evicted: how much eviction changes; zero would mean a model that ignores its cache.
    """

    refusal: str | None = None
    forward: float = 0.0
    generated: float = 0.0
    plain: float = 0.0
    evicted: float = 0.0

    @property
    def difference(self) -> float:
        """The largest of what must be zero."""
        return max(self.forward, self.generated, self.plain)


def furthest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference, infinite where one is not a number."""
    difference = float((one - other).abs().max())
    return difference if difference == difference else float("inf")


def measure(family: Family) -> Exactness:
    """Compress a context with everything kept, ask, and compare."""
    model, tokenizer = family.model(), byte_tokenizer()
    prompt = build_prompt(tokenizer, CONTEXT, CONFIG)
    question = question_ids(tokenizer, prompt.suffix_ids, QUESTION)
    ids, n = torch.cat([prompt.ids, question]), prompt.ids.numel()
    try:
        full = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=1.0, config=CONFIG, progress=False)
    except UnsupportedModelError as error:
        with torch.no_grad():
            plain = furthest(model(ids[None]).logits, family.model()(ids[None]).logits)
        return Exactness(refusal=str(error), plain=plain)
    untouched = family.model()
    expected, told = logits(family, untouched, ids, n), answer(family, untouched, ids, n, _ANSWER)
    with torch.no_grad():
        forward = model(question[None], **{cache_keyword(model): full.fork()}).logits[0]
        plain = logits(family, model, ids, n)
    said = generate(model, _ANSWER, **full.inputs(QUESTION))
    same = torch.equal(said.sequences, told.sequences)
    less = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.3, config=CONFIG, progress=False)
    with torch.no_grad():
        evicted = model(question[None], **{cache_keyword(model): less.fork()}).logits[0]
    return Exactness(
        forward=furthest(forward, expected),
        generated=furthest(torch.cat(said.logits), torch.cat(told.logits)) if same else float("inf"),
        plain=furthest(plain, expected),
        evicted=furthest(evicted, expected),
    )


def measure_against_the_oracle(family: Family) -> tuple[float, float]:
    """Largest differences of the scores, and of the logits after evicting 70 %, from KVzip written out on a plain cache."""
    model, untouched, tokenizer = family.model(), family.model(), byte_tokenizer()
    prompt = build_prompt(tokenizer, CONTEXT, CONFIG)
    question = question_ids(tokenizer, prompt.suffix_ids, QUESTION)
    context = prefill(model, prompt, CONFIG, progress=False)
    scores = score_context(context, CONFIG, progress=False)
    plain = prefilled(untouched, prompt.ids)
    expected = written_out_scores(untouched, plain, prompt, CONFIG, context.scored_layers)
    config = KVzipConfig(keep_ratio=0.3)
    keep = keep_mask(scores, config, context.n_prefix)
    prefix = keep.new_ones(keep.shape[1], context.n_prefix)
    kept = {index: torch.cat([prefix, row], dim=1) for index, row in zip(context.scored_layers, keep, strict=True)}
    cache = KVzipCache.from_scores(context, scores, config, tokenizer=tokenizer)
    with torch.no_grad():
        found = model(question[None], **{cache_keyword(model): cache.fork()}).logits[0]
    return furthest(scores, expected), furthest(found, masked_logits(untouched, plain, question, kept))
