"""Reading and repeating a context: no masks, and positions that the model knows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.errors import UnsupportedModelError
from hf_dataopt.kvzip import proof
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt
from hf_dataopt.kvzip.scoring import fitting_chunk, score_context

from ..models import FAMILIES, byte_tokenizer, tiny_model

CONTEXT = "The key of room 12 is blue. " * 20


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_mask_grows_with_the_context(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, max_position_embeddings=4096)
    model.set_attn_implementation(attention)
    plain = ALL_MASK_ATTENTION_FUNCTIONS[attention]
    masks: list[tuple[int, ...]] = []

    def spy(**kwargs: Any) -> Any:
        mask = plain(**kwargs)
        if mask is not None:
            masks.append(tuple(mask.shape))
        return mask

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention, spy)
    proof.prove(model)
    masks.clear()
    prefilled = prefill(
        model, build_prompt(byte_tokenizer(), CONTEXT, KVzipConfig()), KVzipConfig(prefill_chunk_size=64)
    )
    score_context(prefilled, KVzipConfig(chunk_size=100), progress=False)
    windowed = 15 + 64 if family == "gemma3" else 0  # sliding layers see their window and the piece
    replayed = 15 + 250 if family == "gemma3" else 0
    assert max((shape[-1] for shape in masks), default=0) <= max(windowed, replayed)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_pieces_scores_and_both_attentions_agree(family: str) -> None:
    found = []
    for attention, piece in (("sdpa", 16_000), ("sdpa", 37), ("eager", 64)):
        model = tiny_model(family)
        model.set_attn_implementation(attention)
        config = KVzipConfig(chunk_size=100, prefill_chunk_size=piece)
        prefilled = prefill(model, build_prompt(byte_tokenizer(), CONTEXT, config), config)
        found.append(score_context(prefilled, config, progress=False))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=0)


def room_for(tokens: int, **changes: Any) -> tuple[Any, Any]:
    """A context on a model with so many positions behind it."""
    tokenizer, config = byte_tokenizer(), KVzipConfig()
    prompt = build_prompt(tokenizer, CONTEXT, config)
    changes = {"max_position_embeddings": prompt.ids.numel() + tokens, **changes}
    return prefill(tiny_model("llama", **changes), prompt, config), prompt


def test_replays_stay_inside_the_positions_of_the_model() -> None:
    config = KVzipConfig(overlap=0)
    words = build_prompt(byte_tokenizer(), CONTEXT, config).repeat_inputs(1, 0)[1][2].numel() - 1
    prefilled, prompt = room_for(words + 100)
    assert fitting_chunk(prefilled, config) == 100
    assert fitting_chunk(prefilled, KVzipConfig(overlap=0, chunk_size=80)) == 80
    seen: list[int] = []
    handle = prefilled.model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    score_context(prefilled, config, progress=False)
    handle.remove()
    assert max(seen) == prompt.ids.numel() + words + 100 - 1 and len(seen) > prompt.context_ids.numel() // 100
    roomy, _ = room_for(10_000)
    assert fitting_chunk(roomy, config) == config.chunk_size


def test_replays_that_cannot_stay_inside_warn_once() -> None:
    prefilled, _ = room_for(20)
    with pytest.warns(UserWarning, match=r"leave 0 of the model's \d+ positions for repeating") as caught:
        score_context(prefilled, KVzipConfig(chunk_size=100), progress=False)
    assert len(caught) == 1


def test_rotary_embeddings_that_change_with_the_length_bound_the_replay() -> None:
    prompt = build_prompt(byte_tokenizer(), CONTEXT, KVzipConfig())
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": prompt.ids.numel() + 200,
    }
    prefilled, _ = room_for(10_000, rope_parameters=rope)
    assert fitting_chunk(prefilled, KVzipConfig()) < 200


def test_a_context_beyond_the_positions_warns() -> None:
    with pytest.warns(UserWarning, match="the context with its prompt needs"):
        KVzipCache.from_context(
            tiny_model("llama", max_position_embeddings=100), byte_tokenizer(), CONTEXT, progress=False
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KVzipCache.from_context(tiny_model("llama"), byte_tokenizer(), "short", progress=False)


class TestProof:
    """A verdict per class and settings, with what differed."""

    @pytest.fixture(autouse=True)
    def nothing_known(self) -> Iterator[None]:
        proof.VERDICTS.forget()
        yield
        proof.VERDICTS.forget()

    def test_the_probe_runs_once_for_equal_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[Any] = []
        plain = proof._probe
        monkeypatch.setattr(proof, "_probe", lambda *args: calls.append(args) or plain(*args))
        for _ in range(2):
            assert proof.prove(tiny_model("qwen2")).refusal is None
        assert len(calls) == 1
        proof.prove(tiny_model("qwen2", num_hidden_layers=2))
        proof.prove(tiny_model("qwen2").bfloat16())
        assert len(calls) >= 3

    def test_what_differs_is_told_and_the_model_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hf_dataopt.kvzip.layers import KVzipLayer

        plain = KVzipLayer.attend
        monkeypatch.setattr(KVzipLayer, "attend", lambda self, *a, **k: plain(self, *a, **k) * 1.01)
        model = tiny_model("llama")
        before = dict(vars(model))
        with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM \(llama\) would not be exact: .* move"):
            KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, progress=False)
        assert dict(vars(model)) == before

    def test_what_fails_once_is_no_verdict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for error, seen in (
            (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
            (RuntimeError("?"), UnsupportedModelError),
        ):

            def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(proof, "_compressed", fail)
                with pytest.raises(seen):
                    proof.prove(tiny_model("llama"))
            assert proof.prove(tiny_model("llama")).refusal is None
            proof.VERDICTS.forget()
        broken = tiny_model("llama")
        with torch.no_grad():
            broken.lm_head.weight.fill_(float("nan"))
        with pytest.raises(UnsupportedModelError, match="nan"):
            proof.prove(broken)
        assert proof.prove(tiny_model("llama")).refusal is None

    def test_dropout_is_off_while_a_context_is_read_and_on_again_after(self) -> None:
        model = tiny_model("llama", attention_dropout=0.5).train()
        modes = {name: module.training for name, module in model.named_modules()}
        config = KVzipConfig(chunk_size=100)
        found = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, config=config, progress=False)
        assert {name: module.training for name, module in model.named_modules()} == modes
        expected = KVzipCache.from_context(model.eval(), byte_tokenizer(), CONTEXT, config=config, progress=False)
        assert found.stored_lengths == expected.stored_lengths

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_precisions_pass(self, dtype: torch.dtype) -> None:
        for family in FAMILIES:
            assert proof.prove(tiny_model(family).to(dtype)).refusal is None

    def test_rounding_is_known_where_token_by_token_gives_the_same_bits(self) -> None:
        # on a GPU it does: what another order of sums moves must show all the same
        model = tiny_model("llama", num_hidden_layers=24)
        for dtype, least, most in ((torch.bfloat16, 5e-3, 0.2), (torch.float32, 1e-8, 1e-5)):
            ids = proof._ids(model.to(dtype), 0)
            with torch.no_grad():
                expected = model(ids).logits
                with proof._rounded_otherwise(model, 0):
                    moved = model(ids).logits
                assert torch.equal(model(ids).logits, expected)
            assert least < proof._mean(moved - expected) / proof._mean(expected) < most

    def test_no_language_model(self) -> None:
        for other in (torch.nn.Linear(2, 2), None, "llama"):
            with pytest.raises(TypeError, match="causal language model of transformers"):
                KVzipCache.from_context(other, byte_tokenizer(), CONTEXT)  # type: ignore[arg-type]
