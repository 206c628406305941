"""Learned gates: what they learn, and a context evicted as it is read.

Invariants: reading in pieces with everything kept changes no logit; in one piece, reading with gates is the whole cache cut by
the same scores, bit for bit; in several, what is kept are the best of all pairs, counted exactly, in order, and what is held
stays below 1.5 budgets; gates of another model are refused; calls in other threads hear nothing.
"""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates
from hf_dataopt.errors import UnsupportedModelError
from hf_dataopt.kvzip import gate_fit, gate_reading, reading
from hf_dataopt.kvzip.eviction import keep_mask
from hf_dataopt.kvzip.gate_fit import GateConfig
from hf_dataopt.kvzip.gate_network import GateWeights
from hf_dataopt.kvzip.gate_reading import BUDGETS, read_texts
from hf_dataopt.kvzip.layers import KVzipLayer, compressed_layers
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import KVzipPrompt, build_prompt, question_ids
from hf_dataopt.kvzip.proof import prove
from hf_dataopt.kvzip.reading import check_supported
from hf_dataopt.kvzip.streaming import read_within_budget
from hf_dataopt.publishing.identity import identity
from hf_dataopt.routing.layer_inputs import listening

from ..families import Family, available
from ..families.plain import cache_keyword, logits
from ..hub.damage import without_list
from ..models import byte_tokenizer, held, tiny_model
from .conftest import CONTEXT
from .peak import PeakOfPairs

TEXTS = [CONTEXT + CONTEXT[i * 7 :] + f" Room {i} has {i * i} chairs." for i in range(4)]
SMALL = GateConfig(steps=40, hidden=8, tokens_per_step=128)
QUESTION = "Who has the key?"
# one of each kind of layer and of attention that reading in pieces has to get right
KINDS = ("llama", "gemma3_text", "gemma2", "qwen3_next", "deepseek_v3", "gpt_oss", "gemma4_text", "llama4_text", "lfm2")
FAMILIES = {name: family for name, family in available().items() if name in KINDS}


def random_gates(model: Any, seed: int = 0) -> KVzipGates:
    """Gates of the right sizes that were never fitted: any order of pairs will do where reading is tested."""
    proof, scored = prove(model), check_supported(model)
    width = model.config.get_text_config(decoder=True).hidden_size
    generator = torch.Generator().manual_seed(seed)
    weights = GateWeights.start(len(scored), width, 4, proof.shapes[scored[0]][0], generator)
    weights.linear += torch.randn(weights.linear.shape, generator=generator)
    return KVzipGates(weights, GateConfig(hidden=4), identity(model))


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Any, KVzipGates]:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    return model, tokenizer, KVzipGates.fit(model, tokenizer, TEXTS, SMALL, source="rooms", progress=False)


# -- fitting


def test_fit_learns_what_kvzip_keeps(fitted: tuple[Any, Any, KVzipGates]) -> None:
    model, tokenizer, gates = fitted
    before, after = gates.about["loss"]
    assert after < 0.9 * before
    assert all(share > 1.2 * float(ratio) for ratio, share in gates.about["agreement"].items())
    assert gates.about["texts"] == 3 and gates.about["held_texts"] == 1
    again = KVzipGates.fit(model, tokenizer, TEXTS, SMALL, progress=False)
    assert all(torch.equal(one, again.weights.tensors[name]) for name, one in gates.weights.tensors.items())


class _Stopped(Exception):
    pass


def test_a_stopped_fit_goes_on_where_it_was(
    fitted: tuple[Any, Any, KVzipGates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, gates = fitted
    scored, steps, plain_score, plain_loss = [], [], gate_reading.score_context, gate_fit.LOSSES["squared"]
    stop = {"scores": 3, "steps": 25}

    def score(*args: Any, **kwargs: Any) -> torch.Tensor:
        scored.append(1)
        if len(scored) == stop["scores"]:
            raise _Stopped
        return plain_score(*args, **kwargs)

    def loss(*args: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == stop["steps"]:
            raise _Stopped
        return plain_loss(*args)

    monkeypatch.setattr(gate_reading, "score_context", score)
    monkeypatch.setitem(gate_fit.LOSSES, "squared", loss)
    monkeypatch.setattr(gate_fit, "_SECONDS", 0.0)  # every step is saved

    def fit() -> KVzipGates:
        return KVzipGates.fit(model, tokenizer, TEXTS, SMALL, checkpoints=tmp_path, progress=False)

    with pytest.raises(_Stopped):
        fit()
    with pytest.raises(_Stopped):
        fit()
    assert len(scored) == len(TEXTS) + 1  # the two texts that were finished are not scored again
    found = fit()
    assert len(scored) == len(TEXTS) + 1 and len(steps) == SMALL.steps + 1
    assert all(torch.equal(one, found.weights.tensors[name]) for name, one in gates.weights.tensors.items())
    assert found.about["loss"] == gates.about["loss"]
    # another text at the same place is scored anew
    KVzipGates.fit(model, tokenizer, [*TEXTS[:3], "Nothing of that."], SMALL, checkpoints=tmp_path, progress=False)
    assert len(scored) == len(TEXTS) + 2


def test_of_too_many_tokens_every_text_gives_its_share(fitted: tuple[Any, Any, KVzipGates]) -> None:
    model, tokenizer, gates = fitted
    given: Any = {"held_share": 0.15, "seed": 0, "made_by": "", "progress": False}
    texts = [CONTEXT, CONTEXT[::-1], CONTEXT.upper(), CONTEXT[::2]]
    whole = read_texts(model, tokenizer, texts, KVzipConfig(), most_tokens=10**6, **given)
    some = read_texts(model, tokenizer, texts, KVzipConfig(), most_tokens=whole.fitted.count // 3, **given)
    assert abs(some.fitted.count - whole.fitted.count / 3) <= 3
    assert torch.equal(some.held[0].inputs, whole.held[0].inputs)
    # the same tokens of the same texts, with what was given and found of each
    places = {tuple(row): at for at, row in enumerate(whole.fitted.inputs[-1].tolist())}
    at = torch.tensor([places[tuple(row)] for row in some.fitted.inputs[-1].tolist()])
    assert len(set(at.tolist())) == len(at) and torch.equal(at, at.sort().values)
    for name in ("inputs", "scores"):
        assert torch.equal(getattr(some.fitted, name), getattr(whole.fitted, name)[:, at])
    assert torch.equal(some.fitted.cuts, whole.fitted.cuts[at])
    # each text's cuts are its own
    _, lengths = torch.unique_consecutive(whole.fitted.cuts, dim=0, return_counts=True)
    _, given_by = torch.unique_consecutive(some.fitted.cuts, dim=0, return_counts=True)
    assert len(lengths) == 3 and ((given_by - lengths / 3).abs() <= 1).all()
    first = some.fitted.some(50)
    step, again = first.batch(0, 50), some.fitted.batch(0, 50)
    assert all(torch.equal(one, other) for one, other in zip(step, again, strict=True))
    small = KVzipGates.fit(model, tokenizer, TEXTS, replace(SMALL, most_tokens=100), progress=False)
    assert small.about["tokens"] in range(97, 104) and small.about["held_tokens"] == gates.about["held_tokens"]


def test_the_cut_of_a_text_is_what_kvzip_keeps(fitted: tuple[Any, Any, KVzipGates]) -> None:
    model, tokenizer, _ = fitted
    read = read_texts(
        model, tokenizer, TEXTS, KVzipConfig(), most_tokens=10**6, held_share=0.15, seed=0, made_by="", progress=False
    )
    [held] = read.held
    for budget, cut in zip(BUDGETS, held.cuts, strict=True):
        kept = keep_mask(held.scores, KVzipConfig(keep_ratio=budget))
        assert held.scores[kept].min() == cut


def test_a_pair_on_the_wrong_side_of_a_cut_costs_its_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    found, scores = (torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    cuts = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    total = 0.0
    for layer in range(2):
        for token in range(5):
            for head in range(3):
                for cut in cuts[token].tolist():
                    score, said = float(scores[layer, token, head]), float(found[layer, token, head])
                    wrong = (cut - said) if score > cut else (said - cut)
                    total += abs(score - cut) * 0.25 * math.log1p(math.exp(wrong / 0.25))
    assert float(gate_fit.LOSSES["cut"](found, scores, cuts)) == pytest.approx(total / (2 * 5 * 3 * 4), rel=1e-6)


def test_gates_learn_from_cuts_too(fitted: tuple[Any, Any, KVzipGates]) -> None:
    model, tokenizer, gates = fitted
    found = KVzipGates.fit(model, tokenizer, TEXTS, replace(SMALL, loss="cut"), progress=False)
    assert all(share > 1.2 * float(ratio) for ratio, share in found.about["agreement"].items())
    assert not torch.equal(found.weights.linear, gates.weights.linear)


def test_any_score_with_a_name_is_learned(fitted: tuple[Any, Any, KVzipGates], tmp_path: Path) -> None:
    model, tokenizer, gates = fitted
    found = KVzipGates.fit(model, tokenizer, TEXTS, SMALL, scoring=KVzipConfig(score="kvzip_l2"), progress=False)
    assert gates.about["score"] == "kvzip" and found.about["score"] == "kvzip_l2"
    # a length over queries and heads is at least their largest, whatever the order it gives
    given = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    assert found.score(0, given).mean() > gates.score(0, given).mean()
    assert (
        r"Fitted to the scores of kvzip\_l2 on 3 texts" in (found.save_pretrained(tmp_path) / "README.md").read_text()
    )
    with pytest.raises(ValueError, match="is a function, which cannot be saved"):
        unnamed = KVzipConfig(score=lambda layer, queries, keys, values, where: keys[..., 0])
        KVzipGates.fit(model, tokenizer, TEXTS, SMALL, scoring=unnamed, progress=False)


def test_what_cannot_be_fitted_on_is_refused(fitted: tuple[Any, Any, KVzipGates]) -> None:
    model, tokenizer, _ = fitted
    for texts, error, words in (
        ("one text", TypeError, "texts must be a list or tuple, got 'one text'"),
        (["one text"], ValueError, "texts needs at least 2 entries, got 1"),
        (["one text", 7], TypeError, r"texts\[1\] must be a str, got 7"),
        (["one text", ""], ValueError, "text 1: the context has no tokens"),
    ):
        with pytest.raises(error, match=words):
            KVzipGates.fit(model, tokenizer, texts, SMALL, progress=False)  # type: ignore[arg-type]
    for wrong, error, words in (
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"hidden": 2.5}, TypeError, "hidden must be an int"),
        ({"held_share": 1}, ValueError, r"held_share must be in \(0, 1\), got 1"),
        ({"held_share": 0}, ValueError, r"held_share must be in \(0, 1\), got 0"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate must be in \(0, 1\], got 0"),
    ):
        with pytest.raises(error, match=words):
            GateConfig(**wrong)  # type: ignore[arg-type]
    assert GateConfig(learning_rate=1, weight_decay=0).weight_decay == 0
    sliding = available()["mistral_sliding"].model()
    with pytest.raises(UnsupportedModelError, match="global attention"):
        KVzipGates.fit(sliding, tokenizer, TEXTS, SMALL, progress=False)


# -- the artifact


def test_loaded_gates_read_as_the_saved_ones(fitted: tuple[Any, Any, KVzipGates], tmp_path: Path) -> None:
    model, tokenizer, gates = fitted
    gates.save_pretrained(tmp_path / "g")
    loaded = KVzipGates.from_pretrained(tmp_path / "g")
    assert loaded.config == SMALL and loaded.about == gates.about and loaded.made_by == gates.made_by
    caches = [
        KVzipCache.from_context(tiny_model("llama"), tokenizer, CONTEXT, 0.4, gates=one, progress=False)
        for one in (gates, loaded)
    ]
    assert caches[0].stored_lengths == caches[1].stored_lengths
    assert torch.equal(caches[0].pristine_layers[2].context.keys, caches[1].pristine_layers[2].context.keys)
    card = (tmp_path / "g" / "README.md").read_text()
    assert "rooms" in card and f"| 0.3 | {gates.about['agreement']['0.3']} |" in card
    loaded.save_pretrained(tmp_path / "twice")
    for name in ("gates.safetensors", "hf_dataopt.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "g" / name).read_bytes()


def test_gates_of_another_model_are_refused(fitted: tuple[Any, Any, KVzipGates]) -> None:
    _, tokenizer, gates = fitted
    for other, words in (
        (tiny_model("qwen3"), "another model"),
        (tiny_model("llama", seed=1), "other weights"),
        (tiny_model("llama").bfloat16(), "dtype"),
    ):
        with pytest.raises(ValueError, match=words):
            KVzipCache.from_context(other, tokenizer, CONTEXT, gates=gates, progress=False)
    with pytest.raises(ValueError, match="give one of them"):
        KVzipCache.from_context(
            tiny_model("llama"), tokenizer, CONTEXT, gates=gates, head_scores=torch.ones(3, 2), progress=False
        )


def test_tensors_that_do_not_fit_are_refused(fitted: tuple[Any, Any, KVzipGates], tmp_path: Path) -> None:
    fitted[2].save_pretrained(tmp_path)
    without_list(tmp_path)
    tensors = load_file(tmp_path / "gates.safetensors")
    for name, value in (
        ("linear", tensors["linear"][:2]),
        ("inner", tensors["inner"][..., 1:]),
        ("outer", tensors["outer"][0]),
        ("bias", tensors["bias"] * float("nan")),
        ("more", tensors["bias"].clone()),
        ("outer", tensors["outer"].to(torch.int64)),
    ):
        save_file({**tensors, name: value.contiguous()}, tmp_path / "gates.safetensors")
        with pytest.raises(ValueError, match="no whole gates"):
            KVzipGates.from_pretrained(tmp_path)


def test_what_a_later_minor_format_adds_is_left_out(fitted: tuple[Any, Any, KVzipGates], tmp_path: Path) -> None:
    fitted[2].save_pretrained(tmp_path)
    without_list(tmp_path)
    tensors = load_file(tmp_path / "gates.safetensors")
    save_file({**tensors, "later": torch.ones(1)}, tmp_path / "gates.safetensors")
    record = tmp_path / "hf_dataopt.json"
    about = json.loads(record.read_text())
    about["config"]["later"] = 1
    record.write_text(json.dumps({**about, "format_minor": about["format_minor"] + 1}))
    loaded = KVzipGates.from_pretrained(tmp_path)
    assert loaded.config == SMALL and torch.equal(loaded.weights.outer, tensors["outer"].float())
    record.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="no whole gates"):
        KVzipGates.from_pretrained(tmp_path)


def test_gates_that_could_not_be_read_again_are_not_written(
    fitted: tuple[Any, Any, KVzipGates], tmp_path: Path
) -> None:
    gates = fitted[2]
    weights = GateWeights(**{**gates.weights.tensors, "bias": gates.weights.bias * float("nan")})
    for one, words in (
        (KVzipGates(weights, gates.config, gates.made_by), "NaN"),
        (KVzipGates(gates.weights, gates.config, {}), "do not know their model"),
    ):
        with pytest.raises(ValueError, match=words):
            one.save_pretrained(tmp_path / "g")
    assert not (tmp_path / "g").exists()


# -- reading


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_in_pieces_with_everything_kept_changes_nothing(name: str) -> None:
    family: Family = FAMILIES[name]
    model, tokenizer = family.model(), byte_tokenizer()
    config = KVzipConfig(keep_ratio=1.0, prefill_chunk_size=37)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, gates=random_gates(model), progress=False)
    question = question_ids(tokenizer, cache.prompt.suffix_ids, QUESTION)
    expected = logits(family, family.model(), torch.cat([cache.ids[0], question]), cache.ids.shape[1])
    with torch.no_grad():
        found = model(question[None], **{cache_keyword(model): cache.fork()}).logits[0]
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_in_one_piece_it_is_the_whole_cache_cut_by_the_same_scores(name: str) -> None:
    model, tokenizer = FAMILIES[name].model(), byte_tokenizer()
    gates, config = random_gates(model), KVzipConfig(keep_ratio=0.3)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, gates=gates, progress=False)
    prefilled, scores = gates.prefill(model, cache.prompt, config, progress=False)
    whole = KVzipCache.from_scores(prefilled, scores, config, tokenizer=tokenizer)
    assert cache.stored_lengths == whole.stored_lengths and cache.nbytes == whole.nbytes
    for one, other in zip(cache.pristine_layers, whole.pristine_layers, strict=True):
        assert type(one) is type(other)
        if isinstance(one, KVzipLayer):
            assert torch.equal(one.context.keys, other.context.keys)
            assert torch.equal(one.context.values, other.context.values)
    answers = [model.generate(**made.inputs(QUESTION), max_new_tokens=4, do_sample=False) for made in (cache, whole)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("level", ["pair", "pair-uniform"])
@pytest.mark.parametrize("ties", ["position", "reference"])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.35}, {"max_kv_tokens": 120}, {"keep_ratio": 0.001}])
def test_cutting_piece_by_piece_is_cutting_once(level: Any, ties: Any, budget: dict[str, Any]) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    config = KVzipConfig(level=level, ties=ties, prefill_chunk_size=11, **budget)
    prompt = build_prompt(tokenizer, CONTEXT, config)
    prefilled = prefill(model, prompt, config, progress=False)
    n, n_prefix = prompt.ids.numel(), prompt.prefix_ids.numel()
    # many equal ones, so that ties are cut too
    scores = torch.randint(12, (3, 2, n), generator=torch.Generator().manual_seed(0)).float()
    place = [0, 0, 0]

    def score(layer: int, given: torch.Tensor) -> torch.Tensor:
        place[layer] += given.shape[0]
        return scores[layer, :, place[layer] - given.shape[0] : place[layer]].clone()

    layers = read_within_budget(model, prompt, config, prove(model), score, progress=False)
    keep = keep_mask(scores[:, :, n_prefix:], config, n_prefix)
    keep = torch.cat([keep.new_ones(3, 2, n_prefix), keep], dim=2)
    once = compressed_layers(prefilled, keep)
    assert place == [n] * 3
    assert [layer.context.lengths for layer in layers] == [layer.context.lengths for layer in once]
    assert all(layer.context.n_tokens == n for layer in layers)
    # the first layer's pairs do not depend on what was out of sight
    torch.testing.assert_close(layers[0].context.keys, once[0].context.keys, rtol=0, atol=1e-6)
    torch.testing.assert_close(layers[0].context.values, once[0].context.values, rtol=0, atol=1e-6)


def test_a_long_context_is_read_within_its_budget() -> None:
    model = tiny_model("qwen3", head_dim=24, num_hidden_layers=8, max_position_embeddings=8192)
    tokenizer, gates, budget = byte_tokenizer(), random_gates(model), 180
    context = "".join(f"Room {i} has {i * 7 % 13} chairs. " for i in range(36))
    with PeakOfPairs(24, 2) as peak:
        cache = KVzipCache.from_context(
            model, tokenizer, context, config=KVzipConfig(max_kv_tokens=budget), gates=gates, progress=False
        )
    assert cache.ids.shape[1] > 4 * budget
    assert sum(map(sum, cache.stored_lengths)) == budget * 8 * 2
    assert peak.bytes > cache.context_nbytes  # it is seen
    assert peak.bytes <= 1.5 * cache.context_nbytes
    assert cache.get_seq_length() == cache.ids.shape[1]
    assert model.generate(**cache.inputs(QUESTION), max_new_tokens=3, do_sample=False).shape[1] > cache.ids.shape[1]


def test_a_context_that_fits_is_kept_whole_and_a_prefix_that_does_not_is_refused() -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    gates = random_gates(model)

    def read(budget: int) -> KVzipCache:
        config = KVzipConfig(max_kv_tokens=budget)
        return KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, gates=gates, progress=False)

    assert read(500).stored_lengths == [[read(500).ids.shape[1]] * 2] * 3
    with pytest.raises(ValueError, match="leaves no room"):
        read(5)


def test_heads_are_dropped_whole_by_what_the_gates_say(fitted: tuple[Any, Any, KVzipGates]) -> None:
    model, tokenizer, gates = fitted
    config = KVzipConfig(level="head", keep_ratio=0.5, head_sinks=0, head_recent=0)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, gates=gates, progress=False)
    prefix, whole = cache.prompt.prefix_ids.numel(), cache.ids.shape[1]
    assert sorted(length for layer in cache.stored_lengths for length in layer) == [prefix] * 3 + [whole] * 3


def test_inputs_that_cannot_be_seen_are_refused(
    fitted: tuple[Any, Any, KVzipGates], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    monkeypatch.setattr(reading, "watch", lambda decoder: None)  # as where no module carries a layer's number
    with pytest.raises(UnsupportedModelError, match="what layer 0 of this model is given cannot be seen"):
        KVzipCache.from_context(model, tokenizer, CONTEXT, gates=fitted[2], progress=False)


# -- nothing of a call is on the model


def test_threads_hear_nothing_of_each_other(fitted: tuple[Any, Any, KVzipGates]) -> None:
    model, tokenizer, gates = fitted
    texts = [CONTEXT + f" Room {i} is empty." * (i + 1) for i in range(4)]
    config = KVzipConfig(keep_ratio=0.4, prefill_chunk_size=40)

    def read(text: str) -> KVzipCache:
        return KVzipCache.from_context(model, tokenizer, text, config=config, gates=gates, progress=False)

    alone = [read(text) for text in texts]
    found: dict[int, KVzipCache] = {}
    plain: list[torch.Tensor] = []
    ids = torch.arange(10, 30)[None]
    expected = model(ids).logits
    start = threading.Barrier(5)

    def work(index: int) -> None:
        start.wait()
        for _ in range(3):
            found[index] = read(texts[index])

    def ask() -> None:
        start.wait()
        with torch.no_grad(), listening() as heard:
            for _ in range(6):
                plain.append(model(ids).logits)
                taken = heard.take(2)
                assert taken is not None and taken.shape[1] == ids.shape[1]  # its own call's

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)] + [threading.Thread(target=ask)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and len(plain) == 6 and all(torch.equal(one, expected) for one in plain)
    for index, cache in enumerate(alone):
        assert found[index].stored_lengths == cache.stored_lengths
        for one, other in zip(found[index].pristine_layers, cache.pristine_layers, strict=True):
            assert torch.equal(one.context.keys, other.context.keys)


def test_detach_takes_everything_off_the_model() -> None:
    model, tokenizer = tiny_model("gemma3"), byte_tokenizer()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, 0.4, gates=random_gates(model), progress=False)
    assert any(len(module._forward_pre_hooks) > hooks[name] for name, module in model.named_modules())
    cache.detach(model)
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {n: set(v) for n, v in before.items()}
    with torch.no_grad():
        ids = torch.arange(10, 30)[None]
        assert torch.equal(model(ids).logits, tiny_model("gemma3")(ids).logits)


def test_without_gates_nothing_is_heard(llama: Any) -> None:
    with listening() as heard:
        cache = KVzipCache.from_context(tiny_model("llama"), llama.tokenizer, CONTEXT, 0.4, progress=False)
    assert heard.take(2) is None
    whole = llama.cache(0.4)
    assert isinstance(whole.prompt, KVzipPrompt)
    assert len(cache.stored_lengths) == len(whole.stored_lengths)
    assert held(cache)
