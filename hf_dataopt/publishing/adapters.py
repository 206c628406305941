"""An adapter's folder as PEFT writes it: known by its `adapter_config.json`, described by what stands there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .kinds import MODEL
from .names import on_hub
from .safe_files import CARD, read_json
from .writer import finish

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_FORM = "[More Information Needed]"  # in the empty form that PEFT writes as a card
_SHOWN = (
    "memory", "num_comp_tokens", "merge_weight", "sink", "stream", "conditional", "r", "lora_alpha", "target_modules",
)  # fmt: skip


def adapter_about(folder: Path) -> dict[str, Any] | None:
    """What `hf_dataopt.json` would say of an adapter that PEFT alone has written; None where there is none of ours."""
    if not (folder / SETTINGS).is_file():
        return None
    settings = read_json(folder / SETTINGS)
    if not str(settings.get("peft_type")).startswith("CCM"):
        return None
    return {"format_version": 1, "kind": "ccm_adapter", "code": adapter_code(settings)}


def replace_form(folder: Path) -> None:
    """Put our card in place of PEFT's empty form, as PEFT's own `save_pretrained` and `push_to_hub` leave it.

    A card that a user has written stays. Without a record: what the folder holds beside the adapter is not ours to list.
    """
    if not holds_form(folder):
        return
    with TemporaryDirectory() as scratch:
        made = describe_plain(Path(scratch), read_json(folder / SETTINGS))
        (folder / CARD).write_text((made / CARD).read_text(encoding="utf-8"), encoding="utf-8")


def holds_form(folder: Path) -> bool:
    """Whether the card of a folder is PEFT's empty form."""
    card = folder / CARD
    return card.is_file() and _PEFT_FORM in card.read_text(encoding="utf-8")


def known_base(settings: Mapping[str, Any]) -> str | None:
    """Hub name of the base model that PEFT has entered; None for a folder: paths of this machine go into no file."""
    return on_hub(settings.get("base_model_name_or_path"))


def write_settings(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings in PEFT's own form, without the base model's path where it was loaded from a folder.

    Args:
        folder: to write `adapter_config.json` into.
        settings: as PEFT has written them.

    Returns:
        What was written.
    """
    kept = {**settings, "base_model_name_or_path": known_base(settings)}
    (folder / SETTINGS).write_text(json.dumps(kept, indent=2, sort_keys=True), encoding="utf-8")
    return kept


def adapter_code(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an adapter card's first code block, where no example was recorded."""
    return {
        "model": known_base(settings) or MODEL,
        "dtype": "auto",
        "contexts": ["My cat is called Otto.", "He is grey."],
        "question": "What is my cat called?",
        "new_tokens": 16,
    }


def describe_plain(folder: Path, settings: Mapping[str, Any], **card: Any) -> Path:
    """`describe_adapter` from PEFT's settings alone."""
    return describe_adapter(folder, settings, adapter_code(settings), base=known_base(settings), **card)


def describe_adapter(
    folder: Path,
    settings: Mapping[str, Any],
    code: Mapping[str, Any],
    *,
    base: str | None = None,
    made_on: Mapping[str, Any] | None = None,
    **card: Any,
) -> Path:
    """Write record and card of an adapter's folder.

    Args:
        folder: what PEFT wrote, or an empty one.
        settings: PEFT's, read from its `adapter_config.json`.
        code: values of the card's first code block.
        base: Hub name of the base model.
        made_on: `identity` of the base model, which tells another tuning of it, and `tuned`, in words, where that was said.
        card: `name`, `answer`, `results`, `license`, where there are some.

    Returns:
        The folder.
    """
    from huggingface_hub import EvalResult

    results, answer = list(card.get("results", ())), card.get("answer")
    index = [
        EvalResult(
            task_type="text-generation",
            task_name=str(row["task"]),
            dataset_type=str(row["dataset"]),
            dataset_name=str(row["dataset"]),
            metric_type=str(row["metric"]),
            metric_name=str(row["metric"]),
            metric_value=row["value"],
        )
        for row in results
    ]
    title, tuned = card.get("name") or "CCM adapter", (made_on or {}).get("tuned")
    kept = {key: settings.get(key) for key in _SHOWN}
    return finish(
        folder,
        "ccm_adapter",
        about={"config": kept, "base": made_on, "answer": answer, "results": [dict(row) for row in results]},
        metadata={
            "license": card.get("license"),
            "library_name": "peft",
            "base_model": base,
            "base_model_relation": "adapter" if base else None,
            "tags": ["compressed-context-memory", "peft"],
            "pipeline_tag": "text-generation",
            "model_name": title,
            "eval_results": index or None,
        },
        code=code,
        origin=("model", base) if base else None,
        name=title,
        base=base or tuned or "a model of its author's",
        tuned=tuned if base else None,
        comp_tokens=kept["num_comp_tokens"],
        memory=kept["memory"],
        stream=kept["stream"],
        answer=answer,
        results=results,
        settings=json.dumps(kept, indent=1, default=str),
    )
