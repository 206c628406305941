"""The recipe goes where the rows go, a bound is one of a class, and nothing is formed twice.

Invariants: rows decode to the same images in any batch, order, name, file and company; a formed row is refused.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_dataset

from hf_dataopt import DatasetCondenser, IDCConfig, MultiFormation
from hf_dataopt.condensation.columns import to_dataset
from hf_dataopt.condensation.decoded import decode
from hf_dataopt.condensation.formation import Formation, cells, form, form_rows
from hf_dataopt.condensation.multi_formation import stack, to_images
from hf_dataopt.condensation.recipe import read_recipe, recipe_text
from hf_dataopt.condensation.saved import load_condensed, save_condensed

from .conftest import as_dataset, synthetic_images
from .test_loop import SMALL

BOUND = Formation(factor=3, kind="bound", bound=20)
MOSAIC = replace(SMALL, storage="uint8", images_per_class=4)


def bound_set(per_class: int = 5, storage: str = "uint8") -> Dataset:
    """Three classes of stored images, each with its own grey."""
    own = torch.Generator().manual_seed(0)
    images = (torch.rand(3 * per_class, 1, 12, 12, generator=own) * 255).round() / 255
    labels = torch.arange(3).repeat_interleave(per_class)
    recipe = recipe_text(BOUND, "image", label_column="label", mean=[0.5], std=[0.2])
    return to_dataset(images, labels, ["a", "b", "c"], storage, ("image", "label"), recipe)


def formed(dataset: Dataset, **options: Any) -> list[tuple[bytes, str]]:
    """Formed images and names of their classes in no order."""
    formation = MultiFormation.from_dataset(dataset)
    image, label = formation.column, read_recipe(dataset)["label_column"]
    rows = dataset.map(formation, batched=True, keep_in_memory=True, **options)
    names = dataset.features[label].names
    return sorted((np.asarray(row[image]).tobytes(), names[row[label]]) for row in rows)


def test_a_bound_is_one_of_a_class() -> None:
    stored = bound_set()
    assert BOUND.plan(5) == [(3, 0, 1), (2, 1, 2), (1, 2, 5)]
    per_class = BOUND.count(5)
    expected = []
    for label in range(3):
        images = stack(stored["image"][5 * label : 5 * label + 5])
        expected += [(np.asarray(image).tobytes(), "abc"[label]) for image in to_images(form(images, BOUND))]
    assert len(expected) == 3 * per_class
    assert formed(stored) == sorted(expected)
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"num_proc": 2}):
        assert formed(stored, **options) == sorted(expected)
    assert formed(stored.shuffle(seed=1)) == sorted(expected)
    assert len(decode(stored).formed.labels) == 3 * per_class
    assert decode(stored).formed.labels.bincount().tolist() == [per_class] * 3


def test_the_imagenet_preset_decodes_and_scores_what_it_condensed() -> None:
    images, labels = synthetic_images(3 * 20 * 9, size=16, channels=3)
    train = as_dataset(images, labels)
    config = IDCConfig.imagenet_subset(
        images_per_class=20,
        outer_iterations=0,
        evaluation_epochs=1,
        network="convnet",
        width=2,
        depth=1,
        storage="uint8",
    )
    condenser = DatasetCondenser(config)
    condensed = condenser.condense(train)
    count = MultiFormation.from_dataset(condensed).formation.count(20)
    assert 60 < count <= 128
    for size in (7, 20, 1000):
        assert len(condensed.map(MultiFormation.from_dataset(condensed), batched=True, batch_size=size)) == 3 * count
    assert condenser.evaluate(condensed, train.select(range(6)), seeds=1)["condensed"][0].images == 3 * count


def test_the_recipe_survives_new_names_company_order_and_files(train: Dataset, tmp_path: Path) -> None:
    condensed = DatasetCondenser(MOSAIC, method="mosaic").condense(train)
    expected = formed(condensed)
    assert len(expected) == 48
    names = {"image": "picture", "label": "kind", "formation": "how"}
    for renamed in ({"image": "picture"}, {"label": "kind"}, {"formation": "how"}, names):
        assert formed(condensed.rename_columns(renamed)) == expected
    assert read_recipe(condensed.rename_columns(names))["column"] == "picture"

    single = DatasetCondenser(MOSAIC, method="herding").condense(train)
    both = concatenate_datasets([single, condensed]).shuffle(seed=3)
    assert formed(both) == sorted(expected + formed(single)) and len(formed(both)) == 60
    assert decode(both).stored == [8, 8, 8]

    both.to_parquet(tmp_path / "both.parquet")
    assert formed(Dataset.from_parquet(str(tmp_path / "both.parquet"), cache_dir=str(tmp_path))) == formed(both)

    raw = condensed.cast_column("image", Image(decode=False))
    for row, cell in enumerate(raw):
        folder = tmp_path / "png" / condensed.features["label"].int2str(cell["label"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:03d}.png").write_bytes(cell["image"]["bytes"])
    exported = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "png"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert formed(exported) == expected
    condenser = DatasetCondenser(replace(MOSAIC, evaluation_epochs=1))
    assert condenser.evaluate(exported, train, seeds=1)["condensed"][0].images == 48


def test_nothing_is_formed_twice(train: Dataset) -> None:
    condensed = DatasetCondenser(MOSAIC, method="mosaic").condense(train)
    formation = MultiFormation.from_dataset(condensed)
    once = condensed.map(formation, batched=True)
    with pytest.raises(ValueError, match="formed already, which is done once"):
        once.map(formation, batched=True)
    with pytest.raises(ValueError, match="was formed already"):
        MultiFormation.from_dataset(once)
    with pytest.raises(ValueError, match="row 12 of the batch carries no recipe: it was formed already"):
        concatenate_datasets([condensed, once]).map(formation, batched=True)
    with pytest.raises(ValueError, match="or the column was dropped"):
        formation({"image": [np.zeros((4, 4))]})
    lost = condensed.remove_columns("formation")  # the marks in the files are left
    assert formed(lost) == formed(condensed)


def test_a_bound_by_hand_is_refused_and_other_formations_are_not() -> None:
    rows = {"image": [np.zeros((1, 12, 12), np.float32)] * 4, "label": [0, 0, 1, 1]}
    with pytest.raises(ValueError, match="'bound' formation counts the elements of a class"):
        MultiFormation(BOUND)(dict(rows))
    assert len(MultiFormation(Formation(factor=3))(dict(rows))["label"]) == 36
    stored = bound_set(storage="float32")
    damaged = json.loads(stored["formation"][0])
    for factors in (None, "3", [4], [True], [0]):
        text = json.dumps({**damaged, "factors": factors})
        with pytest.raises(ValueError, match="a row alone does not tell its factors"):
            MultiFormation(BOUND)({**rows, "formation": [text] * 4})


def test_rows_formed_each_in_its_own_way_equal_form() -> None:
    images = torch.rand(5, 2, 9, 8)
    for formation in (Formation(factor=2), Formation(factor=3, kind="multi"), BOUND, Formation(factor=4, axis="time")):
        found, rows, places = form_rows(images, formation.ways(5))
        assert torch.equal(found, form(images, formation)) and len(rows) == len(places) == formation.count(5)
        for row in range(5):
            count = rows.count(row)
            assert sorted(place for place, one in zip(places, rows, strict=True) if one == row) == list(range(count))


@pytest.mark.parametrize("even", [False, True])
def test_cells_cover_the_image_without_overlap(even: bool) -> None:
    for side, factor in ((28, 3), (12, 5), (7, 7), (32, 2)):
        seen = np.zeros((side + factor, side + factor), int)
        for rows, columns in cells(side, side, factor, even=even):
            seen[rows, columns] += 1
        assert (seen[:side, :side] == 1).all()
        assert (seen.sum() == side**2) or not even


def test_a_column_that_could_be_two_is_asked_for(train: Dataset) -> None:
    condensed = DatasetCondenser(MOSAIC, method="mosaic").condense(train)
    other = train.select(range(12)).select_columns(["image"]).rename_column("image", "second")
    two = concatenate_datasets([condensed, other], axis=1).rename_column("image", "first")
    with pytest.raises(ValueError, match="speaks of a column 'image', which is not there; columns that could be it: "):
        MultiFormation.from_dataset(two)


def test_classes_with_few_rows_give_all_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, labels = synthetic_images(60)
    kept = torch.cat([(labels == 0).nonzero()[:6, 0], (labels == 1).nonzero()[:1, 0], (labels == 2).nonzero()[:, 0]])
    train = as_dataset(images[kept], labels[kept])
    caplog.set_level(logging.WARNING)
    for method, counts in (("mosaic", [2, 1, 3]), ("random", [3, 1, 3]), ("idc", [2, 1, 3]), ("dsa", [3, 1, 3])):
        condenser = DatasetCondenser(replace(MOSAIC, images_per_class=3, outer_iterations=1), method=method)
        condensed = condenser.condense(train)
        assert torch.tensor(condensed["label"][:]).bincount().tolist() == counts
        short = {"across": (6, 2), "down": (1, 1)} if counts[0] == 2 else {"down": (1, 1)}
        assert condenser.short == short
        assert condenser.evaluate(condensed, train, seeds=1)["random"][0].images == 7
        if method == "mosaic":
            assert "class 'across' has 6 images, all are used: 2 elements are stored of it" in caplog.text
            cut = [stack(condensed["image"][:])[row, :, :6, :6] for row in (0, 1)]
            own = [image[:, ::2, ::2] for image in stack(train["image"][:6])]
            assert all(any(torch.allclose(one, image, atol=1e-6) for image in own) for one in cut)
            save_condensed(condensed, tmp_path / "few")
            assert len(load_condensed(tmp_path / "few")) == 6


def test_the_text_of_the_recipe_is_in_the_rows_the_card_and_the_record(train: Dataset, tmp_path: Path) -> None:
    condensed = DatasetCondenser(MOSAIC, method="mosaic").condense(train)
    assert condensed.features["formation"] == Value("string") and len(set(condensed["formation"])) == 1
    folder = save_condensed(condensed, tmp_path / "set")
    record = json.loads((folder / "hf_dataopt.json").read_text())
    text = json.dumps(record)
    assert '"factor": 2' in text and '"method": "mosaic"' in text
    assert '"factor": 2' in (folder / "README.md").read_text()
    old = Features({**condensed.features, "formation": ClassLabel(names=["{}"])})
    rows = Dataset.from_dict({**condensed.remove_columns("formation").to_dict(), "formation": [0] * 12}, features=old)
    with pytest.raises(ValueError, match="no column 'formation' with a recipe"):
        MultiFormation.from_dataset(rows.remove_columns("image").add_column("image", [[[0.0]]] * 12))
