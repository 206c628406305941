"""Settings validate and round-trip; prompts are those of section 8.3.4; head scores survive a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt.kvzip.config import FIRST_REPEAT_PROMPT, NEXT_REPEAT_PROMPT, TASK_LINE
from hf_dataopt.kvzip.head_scores import head_scores, load_head_scores, save_head_scores
from hf_dataopt.kvzip.prompt import KVzipPrompt, build_prompt

from ..models import byte_tokenizer, tiny_model

CONTEXT = "alpha beta gamma delta"


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("keep_ratio", 0, ValueError),
        ("keep_ratio", 1.01, ValueError),
        ("keep_ratio", float("nan"), ValueError),
        ("keep_ratio", "0.3", TypeError),
        ("keep_ratio", True, TypeError),
        ("chunk_size", 0, ValueError),
        ("chunk_size", 2.5, TypeError),
        ("overlap", -1, ValueError),
        ("max_kv_tokens", 0, ValueError),
        ("level", "layer", ValueError),
        ("replay", "fast", ValueError),
        ("ties", "random", ValueError),
    ],
)
def test_bad_settings(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        KVzipConfig(**{field: value})


def test_local_replay_cannot_have_all_keys() -> None:
    with pytest.raises(ValueError, match="replay='exact'"):
        KVzipConfig(replay="local", softmax_keys="all")


def test_json_round_trip() -> None:
    config = KVzipConfig(keep_ratio=0.4, max_kv_tokens=12, replay="local")
    assert KVzipConfig.from_json_string(config.to_json_string()) == config
    with pytest.raises(ValueError, match="newer version"):
        KVzipConfig.from_json_string('{"keep_ratio": 0.5, "colour": 1}')


def test_prompt_follows_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    prompt = build_prompt(tokenizer, CONTEXT, KVzipConfig())
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": TASK_LINE + CONTEXT}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert torch.cat([prompt.ids, prompt.suffix_ids]).tolist() == ids
    assert tokenizer.decode(prompt.context_ids) == CONTEXT


def test_prompt_without_chat_template() -> None:
    prompt = build_prompt(byte_tokenizer(chat=False), CONTEXT, KVzipConfig(task_line="Read: "))
    assert byte_tokenizer().decode(prompt.prefix_ids) == "<bos>Read: "


def test_repeat_inputs() -> None:
    tokenizer = byte_tokenizer()
    prompt = build_prompt(tokenizer, CONTEXT, KVzipConfig())
    pieces = prompt.repeat_inputs(chunk_size=9, overlap=4)
    assert [(start, end) for start, end, _ in pieces] == [(0, 9), (9, 18), (18, 22)]
    suffix = tokenizer.decode(prompt.suffix_ids)
    texts = [tokenizer.decode(ids) for *_, ids in pieces]
    assert texts[0] == FIRST_REPEAT_PROMPT + suffix + CONTEXT[:9]
    assert texts[1] == NEXT_REPEAT_PROMPT + CONTEXT[5:9] + suffix + CONTEXT[9:18]
    assert texts[2] == NEXT_REPEAT_PROMPT + CONTEXT[14:18] + suffix + CONTEXT[18:]
    # an overlap longer than a chunk is the whole preceding chunk
    assert tokenizer.decode(prompt.repeat_inputs(3, 8)[2][2]).startswith(NEXT_REPEAT_PROMPT + CONTEXT[3:6] + suffix)


def test_prompt_refuses_wrong_ids() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(TypeError, match="prefix_ids must be a 1-D int64"):
        KVzipPrompt(ids[None], ids, ids, ids, ids)
    with pytest.raises(ValueError, match="no tokens"):
        KVzipPrompt(ids, ids[:0], ids, ids, ids)


def test_head_scores_file(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("qwen3"), byte_tokenizer()
    scores = head_scores(model, tokenizer, CONTEXT * 4, KVzipConfig(chunk_size=30))
    assert scores.shape == (3, 2)
    pieces = [CONTEXT, CONTEXT[::-1]]
    each = [head_scores(model, tokenizer, piece, progress=False) for piece in pieces]
    assert torch.equal(head_scores(model, tokenizer, pieces, progress=False), torch.maximum(*each))
    save_head_scores(scores, tmp_path / "heads", model_id="tiny/qwen3")
    loaded, model_id = load_head_scores(tmp_path / "heads")
    assert torch.equal(loaded, scores) and model_id == "tiny/qwen3"
    config = KVzipConfig(keep_ratio=0.5, head_sinks=0, head_recent=1)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, head_scores=loaded, progress=False)
    kept = torch.tensor(cache.stored_lengths) - cache.prompt.prefix_ids.numel()
    assert sorted(kept.flatten().tolist()) == [1, 1, 1, 1, 22, 22]
    assert (kept.flatten()[scores.flatten().topk(2).indices] == 22).all()


def test_wrong_head_score_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder nor a Hub name"):
        load_head_scores(tmp_path / "missing")
    with pytest.raises(ValueError, match="finite"):
        save_head_scores(torch.full((2, 2), float("nan")), tmp_path / "heads", model_id="a/b")
    save_head_scores(torch.ones(2, 2), tmp_path / "heads", model_id="a/b")
    file = tmp_path / "heads" / "head_scores.safetensors"
    save_file({"other": torch.ones(2, 2)}, file)
    with pytest.raises(ValueError, match="no whole head scores"):
        load_head_scores(tmp_path / "heads")
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_head_scores(tmp_path / "heads")
