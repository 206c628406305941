"""Push -> load in a fresh process -> equal, for every artifact; cards run as written; one commit each."""

from __future__ import annotations

import re
from typing import Any

import pytest
from huggingface_hub import DatasetCardData, ModelCardData

from hf_dataopt.publishing.kinds import KINDS
from hf_dataopt.publishing.safe_files import read_yaml

from .conftest import SHOWN, Published

DATASETS = ["idc-uint8", "idc-float16", "idc-float32", "plain-uint8", "plain-float16", "plain-float32", "cleaned"]
MODELS = ["cache", "cache-logits", "heads", "gates", "adapter", "memory", "stream"]


@pytest.mark.parametrize("name", DATASETS + MODELS)
def test_loaded_equals_pushed(published: Published, name: str) -> None:
    assert published.loaded[name] == published.pushed[name]


def test_nothing_was_forgotten(published: Published) -> None:
    assert set(published.loaded) == set(published.pushed)
    assert {published.infos[name]["kind"] for name in SHOWN} == {name for name, kind in KINDS.items() if kind.repo_type}
    assert published.hub.unknown == []


def test_every_push_is_one_commit(published: Published) -> None:
    for (kind, name), repo in published.hub.repos.items():
        if name in SHOWN or name.removeprefix("me/") in DATASETS:
            assert len(repo.branches["main"]) == 2, published.hub.commits(kind, name)
    assert published.hub.commits("dataset", "me/cleaned")[-1] == "Four rows less"
    private = {name for (_, name), repo in published.hub.repos.items() if repo.private}
    assert private == {"me/idc-float16", "me/shell-cache"}


@pytest.mark.parametrize("name", SHOWN)
def test_first_code_block_of_a_card_runs(published: Published, name: str) -> None:
    assert published.cards[name].strip()


def test_the_recorded_answer_is_what_the_code_prints(published: Published) -> None:
    card = published.hub.files("model", "me/ccm")["README.md"].decode()
    answer = published.infos["me/ccm"]["facts"]["answer"]
    assert answer in card and published.cards["me/ccm"].strip() == answer.strip()


@pytest.mark.parametrize("name", SHOWN)
def test_metadata_is_what_the_hub_reads(published: Published, name: str) -> None:
    kind = published.infos[name]["repo_type"]
    card = published.hub.files(kind, name)["README.md"].decode()
    metadata = read_yaml(card.split("---")[1], name)
    assert "hf-dataopt" in metadata["tags"]
    assert name in card and "OWNER/NAME" not in card
    if kind == "dataset":
        assert metadata["dataset_info"]["features"] and metadata["configs"][0]["data_files"]
        assert metadata["task_categories"] == ["image-classification"] and metadata["size_categories"] == ["n<1K"]
    else:
        assert metadata["base_model"] == "me/tiny"
    assert metadata["library_name"] == ("peft" if name.endswith("ccm") else "hf-dataopt")
    # the Hub's own class reads it without complaint, and gives the same back
    data: Any = {"model": ModelCardData, "dataset": DatasetCardData}[kind]
    assert data(**metadata, ignore_metadata_errors=False).to_dict() == metadata


def test_licences_are_inherited_or_left_out(published: Published) -> None:
    licences = {name: published.infos[name]["licence"] for name in SHOWN}
    assert licences["me/cleaned"] == licences["me/shell-idc"] == "odc-by"  # of their source data
    assert licences["me/ccm"] == licences["me/plain-ccm"] == licences["me/heads"] == "cc-by-sa-4.0"  # of the base model
    assert licences["me/idc-uint8"] is licences["me/cache"] is licences["me/memory"] is None  # nobody said


def test_info_tells_what_it_is_and_how_to_use_it(published: Published) -> None:
    info = published.infos["me/cleaned"]
    assert info["facts"]["rows"] == 76 and info["source"] == {"type": "dataset", "id": "me/source"}
    assert all(name in info["usage"] for name in ("load_dataset", "me/cleaned"))
    assert published.infos["me/cache"]["facts"]["bytes"] < published.infos["me/cache"]["facts"]["full_bytes"]
    assert published.infos["me/cache"]["files"]["cache.safetensors"] > 40_000
    assert published.infos["bytes"] < 60_000  # records and cards, nothing heavy


def test_measured_figures_are_on_the_card_with_seed_hardware_and_versions(published: Published) -> None:
    card = published.hub.files("dataset", "me/shell-idc")["README.md"].decode()
    assert re.search(
        r"^\| condensed \| convnet \| 12 \| 1 \| [\d.]+ \| [\d.]+ \| 1 \|  \| [-\d.]+ \|$", card, re.MULTILINE
    ), card
    assert re.search(r"^\| random \| convnet \| 3 \|", card, re.MULTILINE)  # the baseline
    assert all(word in card for word in ("Hardware: ", "Seed 0", "torch "))
    assert "Nothing was measured" in published.hub.files("dataset", "me/idc-uint8")["README.md"].decode()


def test_no_file_names_a_path_of_this_machine(published: Published) -> None:
    for (kind, name), repo in published.hub.repos.items():
        if name in SHOWN:
            for path, body in repo.branches["main"][-1].files.items():
                assert not (path.endswith((".md", ".json")) and b"/tmp/" in body), (kind, name, path)
