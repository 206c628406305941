"""How far KVzip is from the plain model on one family, with everything kept and with some of it evicted."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_dataopt.errors import UnsupportedModelError
from hf_dataopt.kvzip.cache import KVzipCache
from hf_dataopt.kvzip.config import KVzipConfig
from hf_dataopt.kvzip.eviction import keep_mask
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt, question_ids
from hf_dataopt.kvzip.scoring import score_context

from ..families import Family
from ..families.plain import answer, cache_keyword, generate, logits, prefilled
from ..models import byte_tokenizer
from .oracle import masked_logits, written_out_scores

CONTEXT = "The key of room 12 is blue. The key of room 7 is red. Nobody has the key of room 3."
QUESTION = "Which key is red?"
CONFIG = KVzipConfig(chunk_size=32, replay="exact")
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


def measure_call_shapes(family: Family, folder: Path) -> dict[str, float]:
    """Largest differences between one question in one call, and the same asked of forks in other ways; all must be zero.

    Args:
        family: one that is exact.
        folder: where a cache is saved and read back.
    """
    model, tokenizer = family.model(), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.5, config=CONFIG, progress=False)
    question = question_ids(tokenizer, cache.prompt.suffix_ids, QUESTION)[None]
    name = cache_keyword(model)
    cache.save_pretrained(folder)
    saved = KVzipCache.from_pretrained(folder, model, tokenizer)

    def asked(fork: KVzipCache, ids: torch.Tensor = question) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, **{name: fork}).logits

    once, half = asked(cache.fork()), cache.fork()
    begun = asked(half, question[:, :5])
    forks = copy.copy(half), copy.deepcopy(half)
    rest = [asked(fork, question[:, 5:]) for fork in (half, *forks)]
    half.reset()
    return {
        "two calls": furthest(torch.cat([begun, rest[0]], dim=1), once),
        "copy": furthest(rest[1], rest[0]),
        "deepcopy": furthest(rest[2], rest[0]),
        "reset": furthest(asked(half), once),
        "another fork": furthest(asked(cache.fork()), once),
        "saved": furthest(asked(saved.fork()), once),
    }


def measure_batch(family: Family) -> float:
    """Largest difference between two equal rows on one fork, and one row; infinite where beams find other tokens."""
    model, untouched, tokenizer = family.model(), family.model(), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=1.0, config=CONFIG, progress=False)
    inputs = cache.inputs(QUESTION)
    question = inputs["input_ids"][:, cache.ids.shape[1] :]
    with torch.no_grad():
        one = model(question, **{cache_keyword(model): cache.fork()}).logits
        two = model(question.expand(2, -1), **{cache_keyword(model): cache.fork()}).logits
    beams = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    same = torch.equal(model.generate(**inputs, **beams), untouched.generate(**plain, **beams))
    return furthest(two, one.expand_as(two)) if same else float("inf")


def measure_padded_batch(family: Family) -> float:
    """Largest difference between questions of two lengths in one `generate`, and one by one."""
    model, tokenizer = family.model(), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=1.0, config=CONFIG, progress=False)
    questions = [QUESTION, "Is it?"]
    together = torch.stack(generate(model, _ANSWER, **cache.inputs(questions)).logits, dim=1)
    alone = [torch.cat(generate(model, _ANSWER, **cache.inputs(question)).logits) for question in questions]
    return furthest(together, torch.stack(alone))


def measure_after_an_image(family: Family) -> float:
    """Largest difference in `generate` that a request with an image, answered by the same model before, makes."""
    model, tokenizer = family.model(), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.5, config=CONFIG, progress=False)
    before = generate(model, _ANSWER, **cache.inputs(QUESTION))
    model.model.rope_deltas = torch.tensor([[-7]])  # what such a request leaves on the model
    after = generate(model, _ANSWER, **cache.inputs(QUESTION))
    return furthest(torch.cat(after.logits), torch.cat(before.logits))
