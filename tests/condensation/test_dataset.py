"""Multi-formation as map callable and transform, round trips of condensed data sets, config, evaluation, bad input.

Invariants: mosaic then form shows the images again; what is loaded decodes to what was condensed; equal configs hash equal.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dataopt.condensation.augment import Draws, augment, cutmix, draw, draw_cutmix
from hf_dataopt.condensation.columns import read_images, to_dataset
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.config import IDCConfig
from hf_dataopt.condensation.initialise import herding, initial_images, mosaic
from hf_dataopt.condensation.multi_formation import (
    Formation,
    MultiFormation,
    form,
    form_labels,
    read_recipe,
    recipe_text,
    stack,
)
from hf_dataopt.condensation.networks import ConvNet
from hf_dataopt.condensation.preview import preview
from hf_dataopt.condensation.saved import load_condensed
from hf_dataopt.errors import BadRowError

from ..conftest import REPO
from ..reference import condensation as reference
from .conftest import as_dataset, synthetic_images
from .test_loop import SMALL


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(5, 17), st.integers(5, 17), st.sampled_from([1, 3]))
def test_form_equals_the_transcription_and_is_linear(
    n: int, factor: int, height: int, width: int, channels: int
) -> None:
    own = torch.Generator().manual_seed(n * factor + height)
    images = torch.rand(n, channels, height, width, generator=own)
    formation = Formation(factor=factor)
    formed = form(images, formation)
    assert formed.shape == (n * factor**2, channels, height, width) == (formation.count(n), *images.shape[1:])
    torch.testing.assert_close(formed, reference.decode(images, factor))
    assert torch.equal(formed, form(images, formation)), "deterministic"
    assert form_labels(torch.arange(n), formation).tolist() == list(range(n)) * factor**2
    if factor == 1:
        assert torch.equal(formed, images)


@pytest.mark.parametrize("size, factor", [(12, 2), (12, 3), (28, 3), (28, 5), (14, 3), (10, 4)])
def test_mosaic_cells_agree_with_the_decoder(size: int, factor: int) -> None:
    """Images of one value each come back as that value, away from the padded edge."""
    values = torch.linspace(0.1, 0.9, factor**2)
    flat = values[:, None, None, None].expand(-1, 1, size, size).contiguous()
    formed = form(mosaic(flat, Formation(factor=factor)), Formation(factor=factor))
    assert torch.allclose(formed[:, 0, :2, :2], flat[:, 0, :2, :2], atol=1e-6)


@pytest.mark.parametrize("storage", ["uint8", "float16", "float32"])
@pytest.mark.parametrize("way", ["parquet", "disk"])
def test_what_is_loaded_decodes_to_what_was_condensed(train: Dataset, tmp_path: Path, storage: Any, way: str) -> None:
    condensed = DatasetCondenser(replace(SMALL, storage=storage, outer_iterations=1)).condense(train)
    expected = form(stack(condensed["image"][:]), Formation(factor=2))
    if way == "parquet":
        condensed.to_parquet(tmp_path / "c.parquet")
        loaded = Dataset.from_parquet(str(tmp_path / "c.parquet"), cache_dir=str(tmp_path))
    else:
        condensed.save_to_disk(tmp_path / "c")
        loaded = Dataset.load_from_disk(str(tmp_path / "c"))
    assert loaded.features == condensed.features and read_recipe(loaded) == read_recipe(condensed)
    formation = MultiFormation.from_dataset(loaded, output="tensor")
    loaded.set_transform(formation)
    assert torch.equal(torch.stack(loaded[:]["image"]), expected)
    loaded.reset_format()
    mapped = loaded.map(MultiFormation.from_dataset(loaded), batched=True)
    assert mapped.column_names == ["image", "label"] and len(mapped) == 24
    assert mapped.features["image"] == condensed.features["image"]
    assert mapped["label"][:] == form_labels(torch.tensor(condensed["label"][:]), Formation(factor=2)).tolist()
    tolerance = {"uint8": 0.5 / 255 + 1e-6, "float16": 1e-3, "float32": 0}[storage]
    torch.testing.assert_close(stack(mapped["image"][:]), expected, rtol=0, atol=tolerance)


def test_a_fresh_process_without_the_package_reads_the_pixels(train: Dataset, tmp_path: Path) -> None:
    condensed = DatasetCondenser(replace(SMALL, storage="uint8", outer_iterations=0)).condense(train)
    condensed.to_parquet(tmp_path / "c.parquet")
    code = (
        "import sys, json, numpy as np, datasets; ds = datasets.Dataset.from_parquet(sys.argv[1], cache_dir=sys.argv[2]);"
        "print(json.dumps([np.asarray(image).tolist() for image in ds['image'][:]]));"
        "assert 'hf_dataopt' not in sys.modules"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "c.parquet"), str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == [np.asarray(image).tolist() for image in condensed["image"][:]]


def test_map_over_processes_and_small_batches_keep_labels_with_images(train: Dataset) -> None:
    condensed = DatasetCondenser(replace(SMALL, storage="uint8", outer_iterations=0)).condense(train)
    formation = MultiFormation.from_dataset(condensed)
    two = condensed.map(formation, batched=True, num_proc=2)
    parts = condensed.map(formation, batched=True, batch_size=1)

    def rows(dataset: Dataset) -> list[Any]:
        return sorted((np.asarray(row["image"]).tolist(), row["label"]) for row in dataset)

    assert rows(two) == rows(parts) == rows(condensed.map(formation, batched=True))


def test_equal_callables_hash_equal_and_changed_ones_do_not() -> None:
    first, same = (MultiFormation(Formation(factor=2)) for _ in range(2))
    assert Hasher.hash(first) == Hasher.hash(same) != Hasher.hash(MultiFormation(Formation(factor=3)))


def test_colour_images_and_the_preview(tmp_path: Path) -> None:
    images, labels = synthetic_images(90, channels=3)
    train = as_dataset(images, labels)
    condenser = DatasetCondenser(replace(SMALL, storage="uint8", outer_iterations=1))
    condensed = condenser.condense(train, output_dir=tmp_path)
    assert condensed[0]["image"].mode == "RGB"
    sheet = preview(stack(condensed["image"][:]), 2)
    assert sheet.mode == "RGB" and sheet.height > sheet.width
    several = preview(torch.arange(10.0)[:, None, None, None].expand(10, 1, 6, 5) / 10, 1)
    zoom = several.width // (3 * 7 - 2)
    assert several.size == ((3 * 7 - 2) * zoom, (4 * 8 - 2) * zoom)  # ten classes of one image: four rows of three
    cell = np.asarray(several)[8 * zoom, 7 * zoom]  # second row, second column
    assert cell == round(0.4 * 255)


def test_evaluation_ranks_and_repeats(train: Dataset, test_split: Dataset) -> None:
    config = replace(SMALL, storage="uint8", outer_iterations=2, evaluation_epochs=30, width=8)
    condenser = DatasetCondenser(config)
    condensed = condenser.condense(train)
    networks = {
        "small": lambda channels, classes, size: ConvNet(channels, classes, size=size, width=4, depth=1),
        "larger": lambda channels, classes, size: ConvNet(channels, classes, size=size, width=8, depth=2),
    }
    scores = condenser.evaluate(condensed, test_split, networks=networks, seeds=2)
    assert set(scores) == {"condensed", "random"}
    assert [one.network for one in scores["condensed"]] == ["small", "larger"]
    assert scores["condensed"][1].images == 24 and scores["random"][1].images == 6
    assert scores["condensed"][1].mean > 60
    again = DatasetCondenser(config).evaluate(condensed, test_split, train=train, networks=networks, seeds=2)
    assert again == scores


@pytest.mark.parametrize("way", ["random", "herding", "mix", "mix_herding", "noise"])
def test_initialisations_are_seeded_and_of_their_class(train: Dataset, way: Any) -> None:
    data, config = read_images(train), replace(SMALL, initialisation=way)
    first, second = (
        initial_images(data, config, Formation(factor=2), torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    assert first.shape == (6, 1, 12, 12) and float(first.min()) >= 0 and float(first.max()) <= 1
    assert torch.equal(first, second) == way.endswith("herding")
    if way == "random":
        of_class = data.pixels(data.rows_of_class[2])
        assert all(bool((of_class == image).all(dim=(1, 2, 3)).any()) for image in first[4:])


def test_herding_keeps_the_mean_closer_than_the_first_rows() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    chosen = herding(features, 10)
    assert len(set(chosen.tolist())) == 10
    gap = (features[chosen].mean(0) - features.mean(0)).norm()
    assert gap < 0.3 * (features[:10].mean(0) - features.mean(0)).norm()


@pytest.mark.parametrize("strategy", ["color_crop_cutout", "color_crop_flip_scale_rotate", "none", "cutout"])
def test_augmentation_of_one_draw_equals_the_same_draw_per_image(strategy: str) -> None:
    images = torch.rand(5, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    for pick in range(3 if "scale" in strategy else 1):
        shared = draw(strategy, (12, 10), torch.Generator().manual_seed(pick), pick=pick)
        each = Draws.joined([shared, shared], [2, 3])
        torch.testing.assert_close(augment(images, shared), augment(images, each))


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_every_shift_of_a_crop_moves_pixels_and_brings_in_zeros(size: tuple[int, int]) -> None:
    images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)) + 1
    reach = [side // 8 for side in size]
    for down, right in itertools.product(*(range(-most, most + 1) for most in reach)):
        moved = augment(images, Draws(picked="crop", first=torch.tensor([down]), second=torch.tensor([right])))
        assert moved.shape == images.shape
        for row, column in itertools.product(*map(range, size)):
            inside = 0 <= row + down < size[0] and 0 <= column + right < size[1]
            expected = images[:, :, row + down, column + right] if inside else torch.zeros(2, 1)
            assert torch.equal(moved[:, :, row, column], expected), (down, right, row, column)


def test_cutmix_ratio_is_the_area_kept() -> None:
    own = torch.Generator().manual_seed(0)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 1, 9, 7).contiguous()
    for _ in range(20):
        partner, box = draw_cutmix(4, (9, 7), own)
        mixed, ratio = cutmix(images, partner, box)
        expected = ratio * torch.arange(4.0) + (1 - ratio) * partner
        torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)


def test_config_round_trip_and_presets() -> None:
    for config in (
        IDCConfig(),
        IDCConfig.cifar10(),
        IDCConfig.speech(),
        IDCConfig.imagenet_subset(images_per_class=20),
    ):
        restored = IDCConfig.from_json_string(config.to_json_string())
        assert restored == config and Hasher.hash(restored) == Hasher.hash(config)
    assert IDCConfig.imagenet_subset(images_per_class=20).formation == "bound"
    with pytest.raises(ValueError, match="unknown IDC settings"):
        IDCConfig.from_json_string('{"ipc": 1}')


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"images_per_class": 0}, ValueError, "images_per_class must be at least 1"),
        ({"factor": 1.5}, TypeError, "factor must be an int"),
        ({"metric": "l2"}, ValueError, "metric must be one of"),
        ({"momentum": 2.0}, ValueError, "momentum must be in"),
        ({"augmentation": "colour"}, ValueError, "unknown augmentation"),
        ({"clamp_low": None}, ValueError, "storage='uint8'"),
        ({"std": (0.0,)}, ValueError, r"std\[0\] must be"),
        ({"compile": 1}, TypeError, "compile must be a bool or a backend"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        IDCConfig(**changes)


def test_bad_data_is_refused(train: Dataset) -> None:
    images, labels = synthetic_images(6)
    condenser = DatasetCondenser(SMALL)
    with pytest.raises(ValueError, match="no column 'picture'"):
        condenser.condense(train, image_column="picture")
    with pytest.raises(ValueError, match="is empty"):
        condenser.condense(train.select([]))
    with pytest.raises(ValueError, match="no images of the classes"):
        condenser.condense(as_dataset(images[:2], labels[:2]))
    arrays = Dataset.from_dict({"image": [[[0.0, float("nan")]]] * 4, "label": [0, 1, 0, 1]})
    with pytest.raises(ValueError, match="NaN"):
        condenser.condense(arrays)
    unlabelled = Dataset.from_dict({"image": [[[0.0, 1.0]]] * 3, "label": [0, 1, -1]})
    with pytest.raises(ValueError, match="labels must be among"):
        condenser.condense(unlabelled)
    mixed = as_dataset(images, labels)["image"][:2] + as_dataset(synthetic_images(6, size=8)[0], labels)["image"][:1]
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    with pytest.raises(ValueError, match="different sizes"):
        condenser.condense(Dataset.from_dict({"image": mixed, "label": [0, 0, 0]}, features=features))
    with pytest.raises(ValueError, match="no column 'formation'"):
        MultiFormation.from_dataset(train)
    with pytest.raises(ValueError, match="cannot cut"):
        form(torch.rand(1, 1, 2, 2), Formation(factor=3))
    with pytest.raises(ValueError, match="found one class only"):
        condenser.condense(Dataset.from_dict({"image": [[[0.0, 1.0]]] * 3, "label": [0, 0, 0]}))
    with pytest.raises(ValueError, match="images of 12 x 12 cannot be cut into 13 cells"):
        DatasetCondenser(replace(SMALL, factor=13)).condense(train)
    with pytest.raises(TypeError, match="got DatasetDict; pick one split"):
        condenser.condense(DatasetDict(train=train))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels of 'label' must be integers, strings or bools, got float"):
        condenser.condense(Dataset.from_dict({"image": [[[0.0, 1.0]]] * 2, "label": [0.5, 1.0]}))
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        DatasetCondenser(replace(SMALL, compile="fast")).condense(train)
    with pytest.raises(ValueError, match="channels"):
        DatasetCondenser(replace(SMALL, mean=(0.5, 0.5, 0.5))).condense(train)


def test_recipe_says_how_to_decode() -> None:
    formation = Formation(factor=3, axis="time", pad_value=0.0)
    recipe = recipe_text(formation, "audio", label_column="word")
    dataset = to_dataset(
        torch.zeros(2, 1, 4, 6), torch.tensor([0, 1]), ["a", "b"], "float32", ("audio", "word"), recipe
    )
    found = MultiFormation.from_dataset(dataset)
    assert found.formation == formation and found.column == "audio"
    assert dataset["formation"][:] == [recipe] * 2
    assert len(dataset.map(found, batched=True)) == 6


def test_estimate_names_time_and_memory(train: Dataset) -> None:
    cost = DatasetCondenser(SMALL).estimate(train)
    assert cost.total_seconds == pytest.approx(cost.start_seconds + 3 * cost.outer_seconds) and cost.outer_seconds > 0
    assert cost.data_bytes == 90 * 12 * 12 and "MiB" in str(cost)


@pytest.mark.parametrize("words", ["a good film", "it ends at 3.5 stars", "no.", "x" * 5000, "nul\0"])
def test_text_is_refused_by_name_and_paths_are_read(tmp_path: Path, words: str) -> None:
    texts = Dataset.from_dict({"text": [None, words, "b", "c"], "label": [0, 1, 0, 1]})
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match="'text' holds text .* a text data set cannot be condensed"):
            read_images(texts, "text", on_error=on_error)  # type: ignore[arg-type]
    pictures = as_dataset(*synthetic_images(6))["image"][:]
    paths = [str(tmp_path / f"{row}{'.png' if row else ''}") for row in range(6)]  # the first has no ending
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path, format="png")
    found = read_images(Dataset.from_dict({"image": paths, "label": [0, 1] * 3}))
    assert torch.equal(found.images, read_images(as_dataset(*synthetic_images(6))).images)
    missing = Dataset.from_dict({"image": [str(tmp_path / "none.png")] * 2, "label": [0, 1]})
    with pytest.raises(BadRowError, match="row 0"):
        read_images(missing)


def test_whole_numbers_that_start_elsewhere_are_classes() -> None:
    images, labels = synthetic_images(9)
    pictures = as_dataset(images, labels)["image"][:]
    features = Features({"image": Image(), "label": Value("int64")})

    def given(values: list[int]) -> Dataset:
        return Dataset.from_dict({"image": pictures, "label": values}, features=features)

    data = read_images(given([7, 9, 4] * 3))
    assert data.class_names == ["4", "7", "9"] and data.labels.tolist() == [1, 2, 0] * 3
    test = read_images(given([9] * 9), like=data)  # by name, not by place
    assert test.labels.tolist() == [2] * 9
    with pytest.raises(BadRowError, match=r"row 8 has label 5, which is no class: labels must be among 4, 7, 9"):
        read_images(given([4] * 8 + [5]), like=data)


def test_command_condenses_a_parquet_file(train: Dataset, test_split: Dataset, tmp_path: Path, capsys: Any) -> None:
    from hf_dataopt.cli import main

    for name, part in (("train", train), ("test", test_split)):
        part.to_parquet(tmp_path / f"{name}.parquet")
    call = [
        "condense",
        str(tmp_path / "train.parquet"),
        "--test",
        str(tmp_path / "test.parquet"),
        "--evaluate",
        "--json",
    ]
    call += ["--images-per-class", "2", "--width", "4", "--depth", "2", "--outer-iterations", "1", "--inner-iterations"]
    call += ["1", "--evaluation-epochs", "2", "--seeds", "1", "--output-dir", str(tmp_path / "run")]
    assert main(call) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6 and [row["trained on"] for row in result["scores"]] == ["condensed", "random"]
    assert len(load_condensed(result["folder"])) == 6
    assert str(REPO) not in result["config"]
    assert main(["condense", str(tmp_path / "none.parquet"), "--output-dir", str(tmp_path / "run")]) == 2


def test_demo_section_claims_what_it_scored(
    train: Dataset, test_split: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from hf_dataopt.cli import main
    from hf_dataopt.condensation import command

    tiny = command.digits_config(width=4, depth=2)
    monkeypatch.setattr(command, "digits", lambda: (train, test_split))
    quick = {"evaluation_augmentation": "none", "evaluation_epochs": 1}
    monkeypatch.setattr(command, "digits_config", lambda **changes: replace(tiny, **{**changes, **quick}))
    assert main(["demo", "--section", "condensation", "--smoke", "--json", "--output-dir", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)["condensation"]
    (claim,) = result["claims"]
    random, before, ours = (f"{row['accuracy']:.1f} %" for row in result["scores"])  # one seed has no spread
    assert claim["ours"] == ours and claim["baseline"] == f"random images {random}; mosaics before {before}"
