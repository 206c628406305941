"""What is said of an adapter that PEFT alone has written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from hf_dataopt.publishing.adapters import adapter_about, adapter_code, describe_adapter, write_settings
from hf_dataopt.publishing.artifacts import _records, about_of


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


@pytest.mark.parametrize("own_card", [False, True])
def test_a_folder_as_peft_writes_it_is_pushed_without_paths(own_card: bool, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    settings = {"peft_type": "CCM", "base_model_name_or_path": str(base), "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    (folder / "README.md").write_text(
        f"---\nbase_model: {base}\n---\n# {'Mine' if own_card else '[More Information Needed]'}\n"
    )
    found = _records(folder, "me/ours", about_of(folder), None)
    assert set(found) == {"hf_dataopt.json", "README.md", "adapter_config.json"}
    assert not any(str(tmp_path) in text.decode() for text in found.values())
    assert json.loads(found["adapter_config.json"]) == {**settings, "base_model_name_or_path": None}
    listed = json.loads(found["hf_dataopt.json"])["files"]["adapter_config.json"]
    assert listed["sha256"] == hashlib.sha256(found["adapter_config.json"]).hexdigest()
    assert ("# Mine" in found["README.md"].decode()) == own_card
    assert json.loads((folder / "adapter_config.json").read_text()) == settings  # the user's own folder stays as it is


def test_a_base_on_the_hub_stays_in_peft_s_settings(tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": "me/model", "r": 8}
    assert write_settings(tmp_path, settings) == settings == json.loads((tmp_path / "adapter_config.json").read_text())
