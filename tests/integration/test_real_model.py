"""KVzip, and the shipped CCM adapter, on SmolLM2-135M-Instruct, the real model that comes in a package."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates, load_ccm
from hf_dataopt.ccm.command import DEMO_QUESTIONS, DEMO_TURNS, answers
from hf_dataopt.kvzip.eviction import keep_mask
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.reading import PrefilledContext
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.text.demo_model import INSTALL, load_demo_model, packaged_model_file

from ..conftest import REPO
from ..models import held
from ..pages import README, blocks, text_of

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(packaged_model_file() is None, reason=f"no packaged model: {INSTALL}"),
    # one worker loads the model once
    pytest.mark.xdist_group("real_model"),
]
RATIO = 0.3


def records(n: int) -> str:
    """Records of made-up packages; a version cannot be guessed."""
    rng = random.Random(0)
    words = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "kelp", "lotus", "otter"]
    names = rng.sample(
        [f"{word}-{kind}" for word in words for kind in ("tools", "viewer", "daemon", "utils", "mapper")], n
    )
    return "\n\n".join(
        f"Package: {name}\nVersion: {rng.randrange(9)}.{rng.randrange(20)}.{rng.randrange(9)}-{rng.randrange(9)}\n"
        f"Installed-Size: {rng.randrange(100, 9999)}\nSection: {rng.choice(words)}"
        for name in names
    )


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    yield load_demo_model()


@pytest.fixture(scope="module")
def gated(loaded: tuple[Any, Any]) -> tuple[PrefilledContext, torch.Tensor]:
    """A context of 2,000 tokens, and what the shipped gates say of it."""
    model, tokenizer = loaded
    prompt = build_prompt(tokenizer, records(60), KVzipConfig())
    assert prompt.context_ids.numel() > 2000
    prompt = dataclasses.replace(prompt, context_ids=prompt.context_ids[:2000])
    return KVzipGates.from_pretrained(REPO / "examples" / "gates").prefill(model, prompt, progress=False)


@pytest.fixture(scope="module")
def prefilled(gated: tuple[PrefilledContext, torch.Tensor]) -> PrefilledContext:
    return gated[0]


def test_nothing_evicted_is_the_plain_cache(loaded: tuple[Any, Any], prefilled: PrefilledContext) -> None:
    model, tokenizer = loaded
    scores = torch.rand(30, 3, 2000)
    cache = KVzipCache.from_scores(prefilled, scores, KVzipConfig(keep_ratio=1.0), tokenizer=tokenizer)
    inputs = cache.inputs("Which package is the largest?")
    with torch.no_grad():
        new = inputs["input_ids"][:, 2000 + prefilled.n_prefix :]
        ours = model(new, **held(cache.fork())).logits
        plain = model(inputs["input_ids"]).logits[:, -new.shape[1] :]
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = model.generate(inputs["input_ids"], max_new_tokens=8, do_sample=False)
    assert generated.tolist() == expected.tolist()


def test_scores_find_what_answers_need_and_bytes_are_freed(
    loaded: tuple[Any, Any], gated: tuple[PrefilledContext, torch.Tensor]
) -> None:
    """At 0.3 a version number in the context stays far more likely than after random eviction; so by the shipped gates."""
    model, tokenizer = loaded
    prefilled, foretold = gated
    config = KVzipConfig(keep_ratio=RATIO, replay="local", chunk_size=512)
    scores = score_context(prefilled, config, progress=False)
    context = tokenizer.decode(prefilled.prompt.context_ids)
    asked_of = [record.split("\n") for record in context.split("\n\n")[2:-2:12]]

    def nll(cache: KVzipCache) -> float:
        total = 0.0
        for name, version, *_ in asked_of:
            answer = " " + version.removeprefix("Version: ")
            question = f"What is the Version of {name.removeprefix('Package: ')}?"
            asked = cache.inputs(question)["input_ids"][:, cache.get_seq_length() :]
            target = torch.tensor([tokenizer("The Version is" + answer)["input_ids"]])
            n = len(tokenizer(answer)["input_ids"])
            with torch.no_grad():
                logits = model(torch.cat([asked, target], 1), **held(cache.fork())).logits[0, -n - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, target[0, -n:]).item()
        return total / len(asked_of)

    def evicted(values: torch.Tensor, ratio: float) -> KVzipCache:
        return KVzipCache.from_scores(prefilled, values, KVzipConfig(keep_ratio=ratio), tokenizer=tokenizer)

    kvzip = evicted(scores, RATIO)
    share = kvzip.context_nbytes / kvzip.full_context_nbytes
    assert share <= 0.32, f"{share:.3f} of the full cache is held"
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    full, ours, random = nll(evicted(scores, 1.0)), nll(kvzip), nll(evicted(noise, RATIO))
    assert ours - full < 0.2 * (random - full), f"full {full:.2f}, KVzip {ours:.2f}, random {random:.2f}"
    gates = nll(evicted(foretold, RATIO))
    assert gates - full < 0.2 * (random - full), f"full {full:.2f}, gates {gates:.2f}, random {random:.2f}"
    kept = [keep_mask(values, KVzipConfig(keep_ratio=RATIO)) for values in (scores, foretold)]
    assert (kept[0] & kept[1]).sum() > 0.65 * kept[0].sum()


def test_readme_block_answers_as_it_says(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_dataopt.text.demo_model.load_demo_model", lambda: loaded)
    (block,) = [block for block in blocks(README) if "KVzipCache" in block]
    exec(compile(block, README, "exec"), {})
    printer, founder, sizes = capsys.readouterr().out.splitlines()
    assert "Gutenberg" in printer and "Greta Lindqvist" in founder
    kept, full = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", sizes))
    assert 0.3 < kept / full < 0.45  # the prompt's own pairs stay


def test_readme_block_answers_from_memory(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_dataopt.text.demo_model.load_demo_model", lambda: loaded)
    monkeypatch.chdir(REPO)
    (block,) = [block for block in blocks(README) if "load_ccm" in block]
    names: dict[str, Any] = {}
    try:
        exec(compile(block, README, "exec"), names)
    finally:
        names["model"].unload()
    *sizes, answer = capsys.readouterr().out.splitlines()
    said = re.findall(r"print\(memory\.generate.*  # (.*)", block)
    assert [answer] == said
    told = [[int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", line)] for line in sizes]
    table = re.findall(r"^\| (?:tokens seen|full cache|memory, bytes).*", text_of(README), re.MULTILINE)
    shown = [[int(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")[1:]] for line in table]
    assert [list(row) for row in zip(*told, strict=True)] == [shown[0], shown[2], shown[1]]


def test_the_shipped_merging_adapter_keeps_its_size_and_what_it_was_told(loaded: tuple[Any, Any]) -> None:
    folder = REPO / "examples" / "adapters" / "facts-merge"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 * 2**20
    model, tokenizer, memory = load_ccm(folder, *loaded)
    other = memory.fork()
    try:
        for turn in DEMO_TURNS[:3]:
            memory.append({"role": "user", "content": turn})
        for turn in ("My name is Bruno.", "I live in Oslo.", "My cat is called Simba."):
            other.append({"role": "user", "content": turn})
        assert memory.layers[0][0].shape[2] == other.layers[0][0].shape[2] == 8
        said = ("Your name is Clara.", "You live in Lisbon.", "Your cat is called Pepper.")
        for question, answer in zip(DEMO_QUESTIONS, said, strict=False):
            ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
            asked = memory.inputs({"role": "user", "content": question})["input_ids"][0].tolist()
            logits = (one.logits([*asked, *ids])[0, len(asked) - 1 : -1] for one in (memory, other))
            mine, theirs = (float(functional.cross_entropy(found, torch.tensor(ids))) for found in logits)
            assert mine < theirs - 1
    finally:
        model.unload()


def test_the_shipped_adapter_answers_from_memory(loaded: tuple[Any, Any]) -> None:
    folder = REPO / "examples" / "adapters" / "facts"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 * 2**20
    model, tokenizer, memory = load_ccm(folder, *loaded)
    try:
        for turn in DEMO_TURNS:
            memory.append({"role": "user", "content": turn})
        asked = [{"role": "user", "content": question} for question in DEMO_QUESTIONS]
        rows = answers(model, tokenizer, [], asked, memory)
        assert sum(row["needed"].lower() in row["memory"].lower() for row in rows) >= 6
        assert not any(row["needed"].lower() in row["none"].lower() for row in rows)
    finally:
        model.unload()
