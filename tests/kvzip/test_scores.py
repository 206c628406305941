"""Every score of `scores/` is held to the same, and a file there without an entry here fails.

Invariants: equal to the slow version on the model's own eager attention; one finite number a pair, the same every time and on
every way to it; budgets kept to the pair; the answer after eviction is that of the full cache with the evicted pairs hidden;
permuting a batch of questions permutes the answers; model and full cache stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.distributed import Room
from hf_dataopt.kvzip import scores as package
from hf_dataopt.kvzip import scoring, weights
from hf_dataopt.kvzip.eviction import budget_ratio, keep_mask
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.reading import PrefilledContext, check_supported
from hf_dataopt.kvzip.rules import AttentionRules
from hf_dataopt.kvzip.score import Positions, ScoredLayer
from hf_dataopt.kvzip.scores import NAMES, score_of
from hf_dataopt.kvzip.scores.duo_attention import DuoAttention
from hf_dataopt.kvzip.scores.expected_attention import ExpectedAttention
from hf_dataopt.kvzip.scores.pyramidkv import PyramidKV
from hf_dataopt.kvzip.scores.random_eviction import RandomEviction
from hf_dataopt.kvzip.scores.snapkv import SnapKV
from hf_dataopt.kvzip.scores.streaming_llm import StreamingLLM
from hf_dataopt.kvzip.scoring import score_context

from ..families import available
from ..families.plain import prefilled as plain_cache
from ..models import FAMILIES, byte_tokenizer, held, tiny_model
from ..reference import kvzip_scores as slow
from .conftest import CONTEXT
from .oracle import masked_logits

Slow = Callable[[slow.Seen, int], torch.Tensor]
# sizes that fit a context of 83 tokens behind 92 of the prompt
SMALL: dict[str, Any] = {
    "snapkv": SnapKV(window=20, kernel=3),
    "pyramidkv": PyramidKV(window=10, kernel=5, beta=4),
    "streaming_llm": StreamingLLM(sinks=96),
    "duo_attention": DuoAttention(sinks=95, recent=12),
    "expected_attention": ExpectedAttention(ahead=7, sinks=94),
    "random_eviction": RandomEviction(seed=5),
}
# name -> the slow version of `SMALL` or of the defaults; None: random numbers have none
SLOW: dict[str, Slow | None] = {
    "kvzip": slow.kvzip,
    "kvzip_plus": slow.kvzip_plus,
    "kvzip_l2": slow.kvzip_l2,
    "kvgrad": slow.kvgrad,
    "kvgrad_l2": slow.kvgrad_l2,
    "h2o": slow.h2o,
    "snapkv": partial(slow.snapkv, window=20, kernel=3),
    "pyramidkv": partial(slow.pyramidkv, window=10, kernel=5, beta=4),
    "streaming_llm": partial(slow.streaming_llm, sinks=96),
    "expected_attention": slow.expected_attention,  # with model, index and `ahead`
    "duo_attention": partial(slow.duo_attention, sinks=95, recent=12),
    "random_eviction": None,
}
every_score = pytest.mark.parametrize("name", list(NAMES))
QUESTIONS = ["Which key is red?", "Who has the key of room 3?"]


@lru_cache(maxsize=8)
def context_on(family: str, kv_heads: int = 2) -> tuple[PreTrainedModel, PrefilledContext]:
    model = tiny_model(family, num_key_value_heads=kv_heads)
    return model, prefill(model, build_prompt(byte_tokenizer(), CONTEXT, KVzipConfig()), progress=False)


@lru_cache(maxsize=8)
def seen_on(family: str, kv_heads: int, repeated: bool) -> tuple[PreTrainedModel, slow.Seen]:
    model = tiny_model(family, num_key_value_heads=kv_heads)
    model.set_attn_implementation("eager")
    prompt = build_prompt(byte_tokenizer(), CONTEXT, KVzipConfig())
    [(_, _, ids)] = prompt.repeat_inputs(2000, 8)
    whole = torch.cat([prompt.ids, ids]) if repeated else prompt.ids
    n_prefix, n = prompt.prefix_ids.numel(), prompt.context_ids.numel()
    return model, slow.see(model, whole, n_prefix, n, check_supported(model))


def scored(context: PrefilledContext, score: Any, **changes: Any) -> torch.Tensor:
    return score_context(context, KVzipConfig(score=score, **changes), progress=False)


def test_every_file_has_a_name_a_class_and_an_entry_here() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(NAMES) == set(SLOW)
    for name in NAMES:
        assert type(score_of(name)).__module__.endswith(f"scores.{name}")
        assert score_of(name) == score_of(name) and hash(score_of(name)) == hash(score_of(name))
        documented = type(score_of(name)).__doc__ or ""
        assert all(heading in documented for heading in ("Returns:", "Source:", "Cost:")), name


@every_score
@pytest.mark.parametrize(("family", "kv_heads"), [*((family, 2) for family in FAMILIES), ("llama", 1), ("qwen3", 4)])
def test_equals_the_slow_version(name: str, family: str, kv_heads: int) -> None:
    _, context = context_on(family, kv_heads)
    score = SMALL.get(name, name)
    found = scored(context, score, chunk_size=2000)
    expected = SLOW[name]
    if expected is None:
        return
    repeats = getattr(score_of(score), "looks_at", "repeat") == "repeat"
    model, seen = seen_on(family, kv_heads, repeats)
    for place, index in enumerate(context.scored_layers):
        more = {"model": model, "index": index, "ahead": 7, "sinks": 94} if name == "expected_attention" else {}
        wanted = expected(seen, place, **more)
        if name in ("h2o", "pyramidkv"):  # ranks of sums that are almost equal may change places
            assert (found[place] != wanted).float().mean() <= 0.05
        else:
            torch.testing.assert_close(found[place], wanted, atol=1e-5, rtol=1e-4)


@every_score
@pytest.mark.parametrize("family", FAMILIES)
def test_one_finite_number_a_pair_the_same_every_time(name: str, family: str) -> None:
    model, context = context_on(family)
    keys = [layer.keys.clone() for layer in context.cache.layers]
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        before = model(ids).logits
    for score in {name, SMALL.get(name, name)}:
        found = scored(context, score, chunk_size=30, replay="local")
        assert found.shape == (len(context.scored_layers), 2, len(CONTEXT)) and found.dtype == torch.float32
        assert torch.isfinite(found).all() and not found.requires_grad
        assert torch.equal(found, scored(context, score, chunk_size=30, replay="local"))
        other = tiny_model(family)
        again = prefill(other, build_prompt(byte_tokenizer(), CONTEXT, KVzipConfig()), progress=False)
        assert torch.equal(found, scored(again, score, chunk_size=30, replay="local"))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(context.cache.layers, keys, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@every_score
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.37}, {"keep_ratio": 0.05}, {"max_kv_tokens": 120}])
@pytest.mark.parametrize("level", ["pair", "pair-uniform", "head"])
def test_budgets_are_kept_to_the_pair(name: str, level: str, budget: dict[str, Any]) -> None:
    model, context = context_on("llama")
    config = KVzipConfig(score=SMALL.get(name, name), level=level, head_sinks=2, head_recent=3, **budget)
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, config=config, progress=False)
    stored = torch.tensor(cache.stored_lengths) - context.n_prefix
    n, ratio = context.n_context, budget_ratio(config, context.n_context, context.n_prefix)
    if level == "pair":
        assert stored.sum() == int(6 * n * ratio)
    elif level == "pair-uniform":
        assert (stored == int(n * ratio)).all()
    else:
        windows = min(3, int(n * ratio))  # the prefix is longer than the sinks
        assert set(stored.flatten().tolist()) <= {windows, n}
        assert (stored == n).sum() == (int(6 * n * ratio) - 6 * windows) // (n - windows)


@every_score
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_answers_are_those_of_the_full_cache_with_evicted_pairs_hidden(name: str, family: str) -> None:
    model, context = context_on(family)
    config = KVzipConfig(score=SMALL.get(name, name), keep_ratio=0.3, chunk_size=40)
    found = score_context(context, config, progress=False)
    keep = keep_mask(found, config, context.n_prefix)
    prefix = keep.new_ones(keep.shape[1], context.n_prefix)
    kept = {index: torch.cat([prefix, row], dim=1) for index, row in zip(context.scored_layers, keep, strict=True)}
    cache = KVzipCache.from_scores(context, found, config, tokenizer=byte_tokenizer())
    untouched, ids = tiny_model(family), torch.arange(40, 60)
    with torch.no_grad():
        logits = model(ids[None], **held(cache.fork())).logits[0]
    expected = masked_logits(untouched, plain_cache(untouched, context.prompt.ids), ids, kept)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    with torch.no_grad():
        batch = [torch.cat([ids[None], ids.flip(0)[None]]), torch.cat([ids.flip(0)[None], ids[None]])]
        one, other = (model(rows, **held(cache.fork())).logits for rows in batch)
    torch.testing.assert_close(one, other.flip(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(one[0], logits, atol=1e-4, rtol=0)


@every_score
def test_all_ways_to_a_cache_agree(name: str) -> None:
    model, context = context_on("qwen2")
    config = KVzipConfig(score=name, keep_ratio=0.4, chunk_size=50)
    assert KVzipConfig.from_json_string(config.to_json_string()) == config
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, config=config, progress=False)
    other = KVzipCache.from_scores(context, score_context(context, config, progress=False), config)
    assert cache.stored_lengths == other.stored_lengths
    for one, two in zip(cache.pristine_layers, other.pristine_layers, strict=True):
        assert torch.equal(one.context.keys, two.context.keys)


@every_score
def test_nothing_stays_on_the_model(name: str) -> None:
    model = tiny_model("llama")

    def state() -> dict[str, Any]:
        hooks = {n: (len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()}
        return {"hooks": hooks, "vars": {n: set(vars(m)) for n, m in model.named_modules()}}

    before = state()
    KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, config=KVzipConfig(score=name), progress=False)
    KVzipCache.detach(model)
    assert state() == before


@pytest.mark.parametrize("name", ["kvzip", "kvzip_plus", "kvzip_l2", "kvgrad", "kvgrad_l2"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_chunks_of_the_first_layers_do_not_depend_on_replay(name: str, family: str) -> None:
    """One chunk is exact in both; in several, exact and local replays are near, and smaller ones see less."""
    _, context = context_on(family)
    exact, local = (scored(context, name, replay=replay, chunk_size=2000) for replay in ("exact", "local"))
    torch.testing.assert_close(exact, local, atol=1e-5, rtol=1e-4)
    exact, local = (scored(context, name, replay=replay, chunk_size=30) for replay in ("exact", "local"))
    assert not torch.equal(exact, local)
    assert torch.corrcoef(torch.stack([exact.flatten(), local.flatten()]))[0, 1] > 0.7


@every_score
@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_with_room_for_ten_tokens_gives_the_same(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, context = context_on(family)
    score = SMALL.get(name, name)
    expected = scored(context, score, chunk_size=60)
    monkeypatch.setattr(scoring, "Room", partial(Room, most=10))
    found = scored(context, score, chunk_size=60)
    if name in ("h2o", "pyramidkv"):  # ranks of what is almost equal may change places
        assert (found != expected).float().mean() <= 0.05
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["kvzip", "kvgrad", "kvgrad_l2"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_are_in_the_weights_and_in_what_gradients_go_through(name: str, family: str) -> None:
    if family not in available():
        pytest.skip(f"this transformers has no {family}")
    prompt = build_prompt(byte_tokenizer(), CONTEXT, KVzipConfig())
    context = prefill(available()[family].model(), prompt, progress=False)
    eager = available()[family].model()
    eager.set_attn_implementation("eager")
    [(_, _, ids)] = prompt.repeat_inputs(2000, 8)
    n_prefix, n = prompt.prefix_ids.numel(), prompt.context_ids.numel()
    seen = slow.see(eager, torch.cat([prompt.ids, ids]), n_prefix, n, check_supported(eager))
    found, expected = scored(context, name, chunk_size=2000), SLOW[name]
    assert expected is not None
    for place in range(len(context.scored_layers)):
        torch.testing.assert_close(found[place], expected(seen, place), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("block", [1, 60, 1 << 20])
def test_all_that_is_paid_to_a_key_up_to_the_queries_own_place(
    block: int, beyond: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 7, 8, generator=generator), torch.randn(2, 9, 8, generator=generator)
    positions = Positions(torch.arange(6, 13), torch.arange(4, 13))
    logits = queries @ keys.repeat_interleave(2, dim=0).mT * 0.4
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    apart = positions.queries[:, None] - positions.keys
    lse = logits.masked_fill(apart < 0, float("-inf")).logsumexp(-1)
    layer = ScoredLayer(0, 0, 1, AttentionRules(0.4, softcap), lse, None)  # type: ignore[arg-type]
    shares = (logits - lse[..., None]).exp().masked_fill(apart < beyond, 0)
    torch.testing.assert_close(weights.total(layer, queries, keys, positions, beyond=beyond), shares.sum(1))
    if not beyond:
        torch.testing.assert_close(shares.sum(-1), torch.ones(4, 7))


def test_gradients_do_not_need_weights_that_require_them() -> None:
    model, context = context_on("llama")
    expected = scored(context, "kvgrad", chunk_size=40)
    frozen = tiny_model("llama").requires_grad_(False)
    again = prefill(frozen, build_prompt(byte_tokenizer(), CONTEXT, KVzipConfig()), progress=False)
    torch.testing.assert_close(scored(again, "kvgrad", chunk_size=40), expected, atol=1e-6, rtol=1e-5)


def test_pyramids_get_narrower_from_layer_to_layer() -> None:
    _, context = context_on("llama")
    config = KVzipConfig(score=PyramidKV(window=10, beta=4), keep_ratio=0.4)
    keep = keep_mask(score_context(context, config, progress=False), config)
    assert keep[..., -10:].all()
    counts = keep[..., :-10].sum(-1)
    assert (counts.amax(1) - counts.amin(1) <= 1).all(), "heads of a layer share alike"
    mean = (0.4 * 83 - 10) * torch.tensor([1.75, 1.0, 0.25])
    assert (counts.float().mean(1) - mean).abs().max() <= 1


def test_h2o_halves_any_budget() -> None:
    _, context = context_on("llama")
    found = scored(context, "h2o")
    for ratio in (0.2, 0.5):
        keep = keep_mask(found, KVzipConfig(keep_ratio=ratio, level="pair-uniform"))
        half = int(83 * ratio) // 2
        assert keep[..., -half:].all() and not keep[..., -half - 4 : -half].all()


def test_a_function_of_ones_own() -> None:
    """Any function of the five arguments; it is shown the repeat input, or what its attributes ask for."""
    _, context = context_on("llama")
    shapes = []

    def lengths(layer: Any, queries: Any, keys: Any, values: Any, positions: Any) -> torch.Tensor:
        shapes.append((layer.index, tuple(queries.shape), tuple(keys.shape), len(positions.keys)))
        assert layer.lse.shape == queries.shape[:2] and len(positions.queries) == queries.shape[1]
        return keys.norm(dim=-1)

    found = scored(context, lengths, chunk_size=50)
    expected = [context.cache.layers[i].keys[0, :, context.n_prefix :].norm(dim=-1) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(expected))
    assert [index for index, *_ in shapes] == [0, 1, 2, 0, 1, 2]
    assert shapes[0][2] == (2, 50, 8) and shapes[3][2] == (2, 33, 8)
    lengths.looks_at = "context"  # type: ignore[attr-defined]
    lengths.last = 9  # type: ignore[attr-defined]
    shapes.clear()
    scored(context, lengths)
    assert shapes[0][1:] == ((4, 9, 8), (2, 83, 8), 83)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda *shown: None, "must give floats"),
        (lambda layer, q, k, v, p: k.norm(dim=-1)[:1], "must give floats"),
        (lambda layer, q, k, v, p: k.norm(dim=-1).long(), "must give floats"),
        (lambda layer, q, k, v, p: k.norm(dim=-1) * float("nan"), "NaN or infinity for layer 0"),
    ],
)
def test_functions_that_give_no_scores(function: Any, error: str) -> None:
    _, context = context_on("llama")
    with pytest.raises(ValueError, match=error):
        scored(context, function)


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score must be one of kvzip, "):
        KVzipConfig(score="kvzap")
    with pytest.raises(TypeError, match="score must be callable"):
        KVzipConfig(score=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="class SnapKV; call it"):
        KVzipConfig(score=SnapKV)
    with pytest.raises(ValueError, match="kernel must be odd"):
        SnapKV(kernel=4)
    for score in (SnapKV(window=4), SnapKV, RandomEviction(seed=2)):
        if not isinstance(score, type):
            assert replace(KVzipConfig(), score=score) == KVzipConfig(score=score)
    model, context = context_on("llama")
    config = KVzipConfig(score=SnapKV(window=4))
    with pytest.raises(ValueError, match=r"SnapKV\(window=4, kernel=5\) is a function, which cannot be saved"):
        config.to_json_string()
    cache = KVzipCache.from_scores(context, score_context(context, config, progress=False), config)
    with pytest.raises(ValueError, match="cannot be saved"):
        cache.save_pretrained(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    named = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, config=KVzipConfig(score="h2o"), progress=False)
    named.save_pretrained(tmp_path / "named")
    assert KVzipCache.from_pretrained(tmp_path / "named", model).config.score == "h2o"


def test_models_in_which_a_score_cannot_see_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dataopt.errors import UnsupportedModelError
    from hf_dataopt.kvzip import weights
    from hf_dataopt.kvzip.scores import expected_attention

    _, context = context_on("llama")
    with monkeypatch.context() as patch:
        patch.setattr(weights, "output_projection", lambda module, width: None)
        with pytest.raises(UnsupportedModelError, match="no output projection of 32 inputs"):
            scored(context, "kvzip_plus")
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "last_block", lambda decoder: None)
        with pytest.raises(UnsupportedModelError, match="cannot be differentiated here"):
            scored(context, "kvgrad")
    with monkeypatch.context() as patch:
        patch.setattr(expected_attention, "rotary_of", lambda *given: None)
        with pytest.raises(UnsupportedModelError, match="rotary embedding of layer 0 cannot be seen"):
            scored(context, "expected_attention")
