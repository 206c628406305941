"""What is said of an adapter that PEFT alone has written."""

from __future__ import annotations

import json
from pathlib import Path

from hf_dataopt.publishing.adapters import adapter_about, adapter_code, describe_adapter


def test_only_adapters_of_ours_are_known(tmp_path: Path) -> None:
    assert adapter_about(tmp_path) is None
    settings = {"peft_type": "CCM", "base_model_name_or_path": "me/model"}
    for given, known in ((settings, True), (settings | {"peft_type": "LORA"}, False), ({}, False)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(given))
        code = adapter_code(settings)
        expected = {"format_version": 1, "kind": "ccm_adapter", "code": code} if known else None
        assert adapter_about(tmp_path) == expected
    assert code["model"] == "me/model" and code["new_tokens"] == 16
    for base in (None, "/a/folder/of/mine", 3):
        assert adapter_code({"base_model_name_or_path": base})["model"] == adapter_code({})["model"] != base


def test_a_card_shows_the_stream_that_an_adapter_was_trained_for(tmp_path: Path) -> None:
    sizes = {"max_kv": 160, "compress_tokens": 64, "memory_size": 8, "sink": 1}
    for name, stream in (("turns", None), ("stream", sizes)):
        settings = {"peft_type": "CCM", "memory": "concat", "num_comp_tokens": 2, "stream": stream}
        (tmp_path / name).mkdir()
        card = (describe_adapter(tmp_path / name, settings, adapter_code(settings)) / "README.md").read_text()
        assert (f"`{sizes}`" in card) == (stream is not None)
        assert ("StreamingContextMemory(model, tokenizer).perplexity" in card) == (stream is not None)
