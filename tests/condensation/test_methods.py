"""Methods by name: all condense, are saved and decoded alike; herding, patches and teachers do what their papers say.

Invariants: methods without optimisation give their start; what was chosen is found among the training images; a teacher's
columns go by name; its loss on chosen crops is below that of any crop left behind of the same rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_dataopt import MultiFormation
from hf_dataopt.condensation import command
from hf_dataopt.condensation.baselines import METHODS, method_config
from hf_dataopt.condensation.columns import LabelledImages
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.initialise import herding, initial_images, mosaic
from hf_dataopt.condensation.multi_formation import Formation, form, read_recipe, stack
from hf_dataopt.condensation.patches import choose_patches
from hf_dataopt.condensation.saved import load_condensed, save_condensed
from hf_dataopt.condensation.teacher import Teacher

from .test_loop import SMALL, network

CHOSEN = ("mosaic", "rded", "herding", "random")  # nothing is optimised
QUICK = replace(SMALL, outer_iterations=1, teacher_images=64)


class Mean(nn.Module):
    """Logits that say how bright an image is: the brighter, the surer of class 0."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3))
        return torch.stack([bright, -bright, torch.zeros_like(bright)], 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_condenses_saves_and_decodes_alike(train: Dataset, method: str, tmp_path: Path) -> None:
    condenser = DatasetCondenser(QUICK, method=method)
    condensed = condenser.condense(train)
    images = stack(condensed["image"][:])
    assert images.shape == (6, 1, 12, 12) and float(images.min()) >= 0 and float(images.max()) <= 1
    start = stack(condenser.initial(train)["image"][:])
    assert torch.equal(images, start) == (method in CHOSEN)
    lives = {"dm": 2, "idc-short": 4}.get(method, int(method not in CHOSEN))
    assert len(condenser.losses) == condenser.config.outer_iterations == lives
    near = read_recipe(condensed)["start_correlation"]
    both = zip(images.flatten(1).numpy(), start.flatten(1).numpy(), strict=True)
    assert near == pytest.approx(np.mean([np.corrcoef(a, b)[0, 1] for a, b in both]), abs=1e-3)
    folder = save_condensed(condensed, tmp_path / "set", config=condenser.config)
    told = "are real training images" if method in CHOSEN else f"still correlate {near} with them"
    assert told in (folder / "README.md").read_text()
    loaded = load_condensed(folder)
    assert read_recipe(loaded)["method"] == method and METHODS[method] in (folder / "README.md").read_text()
    formed = loaded.map(MultiFormation.from_dataset(loaded), batched=True)
    assert len(formed) == 6 * {"idc": 4, "idc-short": 4, "mosaic": 4, "rded": 4}.get(method, 1)
    assert torch.equal(
        stack(condensed["image"][:]), stack(DatasetCondenser(QUICK, method=method).condense(train)["image"][:])
    )


def test_a_short_run_is_idc_with_its_own_steps() -> None:
    short = method_config("idc-short", replace(QUICK, initialisation="noise", learning_rate=7.0, metric="l1"))
    assert (short.outer_iterations, short.inner_iterations, short.initialisation) == (4, 3, "mix_herding")
    assert (short.learning_rate, short.learning_rate_space, short.scale_learning_rate) == (0.035, "first_step", False)
    assert (short.metric, short.match, short.factor) == ("l1", "gradient", QUICK.factor)


def test_the_command_knows_the_same_methods() -> None:
    assert tuple(METHODS) == command._METHODS
    with pytest.raises(ValueError, match="method must be one of"):
        DatasetCondenser(QUICK, method="mosaics")
    with pytest.raises(ValueError, match="method must be one of"):
        method_config("IDC", QUICK)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**20))
def test_herding_equals_the_rule_written_down(n: int, d: int, seed: int) -> None:
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 3 + 5
    mean, total, chosen = features.double().mean(0), torch.zeros(d, dtype=torch.float64), []
    for step in range(1, n + 1):
        gaps = {k: float((mean - (total + features[k].double()) / step).norm()) for k in range(n) if k not in chosen}
        chosen.append(min(gaps, key=lambda k: gaps[k]))
        total = total + features[chosen[-1]].double()
    assert herding(features, n).tolist() == chosen


@pytest.mark.parametrize("how", ["random", "herding"])
def test_a_class_without_training_images_is_named(data: LabelledImages, how: str) -> None:
    kept = data.labels != 1
    less = replace(data, images=data.images[kept], labels=data.labels[kept])
    config = replace(SMALL, initialisation=how, factor=1)
    with pytest.raises(ValueError, match=f"class {data.class_names[1]!r} has no training images"):
        initial_images(less, config, Formation(factor=1), torch.Generator())


def test_herding_goes_by_a_teachers_features(data: LabelledImages) -> None:
    teacher = Teacher.of(network())
    config = replace(SMALL, initialisation="herding", factor=1)
    own = torch.Generator()
    by_pixels = initial_images(data, config, Formation(factor=1), own)
    by_features = initial_images(data, config, Formation(factor=1), own, teacher)
    rows = data.rows_of_class[1]
    features = teacher.features(data.pixels(rows), data)
    with torch.no_grad():
        inside = network().features(data.normalised(data.pixels(rows))).flatten(1)
    torch.testing.assert_close(features, inside)
    assert torch.equal(by_features[2:4], data.pixels(rows[herding(features, 2)]))
    assert not torch.equal(by_features, by_pixels)


def test_patches_are_the_surest_crops_one_of_an_image(data: LabelledImages) -> None:
    teacher, formation = Teacher.of(Mean()), Formation(factor=2)

    def chosen(label: int, count: int = 8, crops: int = 4) -> Tensor:
        own = torch.Generator().manual_seed(3)
        return choose_patches(data, label, count, formation, teacher, crops=crops, generator=own)

    def loss(patches: Tensor, label: int) -> Tensor:
        shown = F.interpolate(patches, size=(12, 12), mode="bilinear", align_corners=False)
        return F.cross_entropy(teacher.logits(shown, data), torch.full((len(patches),), label), reduction="none")

    bright, dark = chosen(0), chosen(1)
    assert bright.shape == (8, 1, 6, 6)
    assert torch.equal(loss(bright, 0), loss(bright, 0).sort().values), "best first"
    everything = loss(chosen(0, count=30), 0)  # the best crop of each of the class's 30 images
    assert float(loss(bright, 0).max()) == float(everything[7]) and float(everything[-1]) > float(everything[7])
    assert float(bright.mean()) > float(data.pixels(data.rows_of_class[0]).mean()) > float(dark.mean())
    more = loss(chosen(0, count=45), 0)
    assert float(more[30]) >= float(more[0]) and torch.equal(more[:30], everything), (
        "second crops come after all first ones"
    )
    cycle = chosen(0, count=70, crops=2)
    assert torch.equal(cycle[60:], cycle[:10]), "and then they repeat"
    laid = mosaic(bright, formation, size=(12, 12))
    assert torch.equal(laid[:, :, :6, :6], bright[:2]) and torch.equal(laid[:, :, 6:, 6:], bright[6:])
    assert form(laid, formation).shape == (8, 1, 12, 12)


def test_patches_along_time_keep_all_frequencies(data: LabelledImages) -> None:
    cells = choose_patches(
        data, 2, 3, Formation(factor=3, axis="time"), Teacher.of(Mean()), crops=1, generator=torch.Generator()
    )
    assert cells.shape == (3, 1, 12, 4)


def test_a_teacher_of_our_own_is_trained_once_and_named(train: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dataopt.condensation import condenser as module

    calls, real = [], module.trained
    monkeypatch.setattr(module, "trained", lambda *args: calls.append(args[2]) or real(*args))
    condenser = DatasetCondenser(QUICK, method="rded")
    cost = condenser.estimate(train)
    assert not calls and cost.total_seconds == cost.early_seconds + cost.start_seconds > cost.early_seconds > 0
    first, second = condenser.condense(train), condenser.condense(train)
    assert calls == [64] and torch.equal(stack(first["image"][:]), stack(second["image"][:]))
    assert read_recipe(first)["teacher"] == "ConvNet trained on 64 images of the training data, seed 0"
    condenser.condense(train.select(range(60)))
    assert calls == [64, 64]
    assert "teacher" not in read_recipe(DatasetCondenser(QUICK, method="mosaic").condense(train))
    given = DatasetCondenser(QUICK, method="mosaic", teacher=network()).condense(train)
    assert read_recipe(given)["teacher"] == "ConvNet" and len(calls) == 2
    assert "teacher" not in read_recipe(DatasetCondenser(QUICK, method="random", teacher=network()).condense(train))


def test_a_trained_teacher_knows_its_classes(train: Dataset, data: LabelledImages) -> None:
    condenser = DatasetCondenser(replace(QUICK, teacher_images=3000, width=8, network_learning_rate=0.05))
    guess = condenser._teacher_for(condenser._read(train, "image", "label")).logits(data.pixels(torch.arange(90)), data)
    assert float((guess.argmax(1) == data.labels).float().mean()) > 0.9


def test_teachers_of_transformers_by_name_size_and_colour(data: LabelledImages) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    names = ["Dots", "other", "across", "down"]
    config = ViTConfig(image_size=16, patch_size=8, num_channels=3, id2label=dict(enumerate(names)), **small)
    model = ViTForImageClassification(config).train()
    teacher = Teacher.of(model)
    assert (teacher.size, teacher.channels, teacher.labels) == ((16, 16), 3, tuple(names))
    images = data.pixels(torch.arange(4))
    found = teacher.logits(images, data)
    assert model.training, "the mode is given back"
    shown = F.interpolate(data.normalised(images).expand(-1, 3, -1, -1), size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model.eval()(shown).logits[:, [2, 3, 0]]
    torch.testing.assert_close(found, expected)
    assert teacher.features(images, data).shape == (4, 8)
    with pytest.raises(ValueError, match="has 4 classes, the data 3, and they do not agree by name"):
        Teacher(network=model, name="vit", size=(16, 16), channels=3).logits(images, data)


def test_teachers_of_timm_and_wrong_ones() -> None:
    timm = pytest.importorskip("timm")
    teacher = Teacher.of(timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=3, in_chans=1))
    assert (teacher.size, teacher.channels, teacher.name) == ((32, 32), 1, "test_vit")
    assert Teacher.of(teacher) is teacher
    with pytest.raises(TypeError, match="teacher must be a trained module"):
        DatasetCondenser(QUICK, teacher=nn.Linear)
    with pytest.raises(ValueError, match="cannot be loaded as an image classifier"):
        DatasetCondenser(QUICK, teacher="/nothing/there")


def test_a_run_of_days_is_told_before_it_starts(train: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    stop = RuntimeError("seen enough")

    def interrupt(outer: int, loss: float) -> None:
        raise stop

    caplog.set_level("INFO", logger="hf_dataopt.condensation")
    for outer, warned in ((10**9, True), (50, False), (49, False)):
        caplog.clear()
        with pytest.raises(RuntimeError, match="seen enough"):
            DatasetCondenser(replace(QUICK, outer_iterations=outer, inner_iterations=1)).condense(
                train, callback=interrupt
            )
        assert ("days" in caplog.text and "idc-short" in caplog.text) == warned
        assert ("estimate:" in caplog.text) == (outer >= 50), "a few rounds are not worth one"
