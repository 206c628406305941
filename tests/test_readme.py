"""The README keeps its promises: its code runs as written, and the functions of its equation map are documented."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from .conftest import REPO
from .models import byte_tokenizer, tiny_model

README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MAPPED = re.findall(r"\| `(hf_dataopt\.[\w.]+)` \|", README)


def _kvzip(folder: Path) -> dict[str, Any]:
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return {"name": str(folder), "context": "The sky is green here.", "questions": ["What colour?", "Where?"]}


def _relation(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (32, 32, 3), np.uint8) for _ in range(40)]
    kinds = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]))
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    return {
        "ds": Dataset.from_dict({"image": pictures, "label": rng.integers(0, 2, 40)}, features=kinds),
        "model": ViTForImageClassification(config),
        "processor": ViTImageProcessor(size={"height": 32, "width": 32}),
    }


def _mixup(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = [{"pixel_values": rng.normal(size=(3, 16, 16)).astype(np.float32), "label": k % 3} for k in range(16)]
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.num_labels = 3
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=8, report_to=[], use_cpu=True
    )
    return {"model": ResNetForImageClassification(config), "args": args, "train": rows, "test": rows}


def _ccm(folder: Path) -> dict[str, Any]:
    return {"base": tiny_model("llama"), "tokenizer": byte_tokenizer()}


# what CI runs instead of hours
SMALLER = {
    "max_new_tokens=64": "max_new_tokens=3",
}
# the names a quick start uses without making them
GIVEN = {
    "KVzipCache": _kvzip,
    "RelationCleaner": _relation,
    "DataCollatorForPuzzleMix": _mixup,
    "CompressedContextMemory": _ccm,
}


# tests/hub/test_quick_start.py runs those that push
OFFLINE = [block for block in BLOCKS if "push" not in block]


@pytest.mark.parametrize("block", OFFLINE, ids=lambda block: re.findall(r"import (.*)", block)[-1])
def test_python_block_runs_as_written(
    block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = next(make for name, make in GIVEN.items() if name in block)(tmp_path)
    for written, smaller in SMALLER.items():
        block = block.replace(written, smaller)
    exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 1


def test_every_method_has_a_quick_start() -> None:
    assert len(OFFLINE) == len(GIVEN) == len(BLOCKS) - 1


def test_quick_start_is_at_most_ten_lines() -> None:
    assert all(len(block.strip().splitlines()) <= 10 for block in BLOCKS)


@pytest.mark.parametrize("path", MAPPED)
def test_equation_map_names_documented_functions(path: str) -> None:
    module, name = path.rsplit(".", 1)
    assert (getattr(import_module(module), name).__doc__ or "").strip()


def test_the_two_commands_exist() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert "make test" in (REPO / ".ci" / "run").read_text(encoding="utf-8")
