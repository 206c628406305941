"""The collators as objects: modes, columns, workers, counters, pickling, what is refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hf_dataopt.mixup.batches import batch_generator
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.collators import DataCollatorForCoMixup, DataCollatorForPuzzleMix
from hf_dataopt.mixup.config import PuzzleMixConfig
from hf_dataopt.mixup.live import LABELS_KEY, SALIENCY_KEY
from hf_dataopt.mixup.puzzle_mix import puzzle_mix

from .models import batch, make, rows

PUZZLE = PuzzleMixConfig(grid_sizes=(2, 4), neighbourhood=1)


def with_maps(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [{**row, "map": row["pixel_values"][0].numpy()} for row in rows("vit", n, start)]


def in_workers(**options: Any) -> DataCollatorForPuzzleMix:
    return DataCollatorForPuzzleMix(None, PUZZLE, saliency="map", num_labels=10, **options)


def test_with_a_model_the_batch_leaves_as_it_came() -> None:
    collator = DataCollatorForPuzzleMix(make("vit"), PUZZLE)
    found, expected = collator(rows("vit", 4)), batch("vit", 4)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_column_is_mixed_here_by_the_pure_function() -> None:
    found = in_workers(seed=3)(with_maps(6))
    plain = batch("vit", 6)
    expected = puzzle_mix(
        plain["pixel_values"],
        torch.eye(10)[plain["labels"]],
        plain["pixel_values"][:, 0],
        PUZZLE,
        batch_generator(3, 0, plain["labels"], plain["pixel_values"][:, 0]),
    )
    assert torch.equal(found["pixel_values"], expected.images) and torch.equal(found["labels"], expected.targets)
    assert set(found) == {"pixel_values", "labels"}


def test_rows_without_the_column_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    collator = in_workers()
    for _ in range(2):
        assert collator(rows("vit", 4))["labels"].dtype == torch.int64
    assert caplog.text.count("remove_unused_columns") == 1
    with pytest.raises(ValueError, match="1 of 3 rows lack"):
        collator([*with_maps(2), *rows("vit", 1)])


def test_no_number_of_workers_and_no_global_seed_changes_a_bit() -> None:
    data = with_maps(32)
    data[3]["map"] = data[3]["map"] * 0
    runs = []
    for number, options in enumerate(
        [{}, {"num_workers": 1}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]
    ):
        collator = in_workers()
        torch.manual_seed(number)  # torch draws the workers' seeds from it
        loader = DataLoader(data, batch_size=8, collate_fn=collator, **options)
        passes = []
        for epoch in range(2):
            collator.set_epoch(epoch)
            passes.append(list(loader))
        runs.append(passes)
        assert collator.seen == 64
        assert collator.unmixed >= 2  # the blank one, twice; random permutations may add some that partner themselves
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            for a, b in zip(one, two, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = ([part["labels"] for part in one] for one in runs[0])
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # a run that goes on in the middle draws what the whole one drew
    late = in_workers()
    late.set_epoch(1)
    assert torch.equal(late(data[16:24])["pixel_values"], runs[0][1][2]["pixel_values"])


def test_spawned_workers_get_neither_model_nor_hooks() -> None:
    model = make("vit")
    collator = DataCollatorForPuzzleMix(model, PUZZLE, saliency="map")
    for on in (False, True):
        if on:
            collator.install()
        twin = pickle.loads(pickle.dumps(collator))
        assert twin.live is None
        found = twin(with_maps(4))
        assert found["labels"].dtype == torch.int64 and set(found) >= {"pixel_values", "labels"}
        assert set(found) - {"pixel_values", "labels"} == ({SALIENCY_KEY, LABELS_KEY} if on else set())
        assert not on or found[SALIENCY_KEY].shape == (4, 8, 8)


def test_epochs_repeat() -> None:
    collator = in_workers()
    first = collator(with_maps(8))
    assert torch.equal(collator(with_maps(8))["labels"], first["labels"])
    collator.set_epoch(1)
    assert not torch.equal(collator(with_maps(8))["labels"], first["labels"])
    assert not torch.equal(collator(with_maps(8, 1))["labels"], first["labels"])
    collator.set_epoch(0)
    assert torch.equal(collator(with_maps(8))["labels"], first["labels"])
    assert not torch.equal(in_workers(seed=1)(with_maps(8))["labels"], first["labels"])


def test_results_are_kept_when_asked() -> None:
    model = make("vit").train()
    config = CoMixupConfig(grid=2, part_size=4, outputs_per_part=3, distance_window=2, clean_weight=0.0)
    collator = DataCollatorForCoMixup(model, config)
    collator.install()
    model(**batch("vit", 8))
    assert collator.last_result is None and collator.seen == 6
    collator.keep_result = True
    output = model(**batch("vit", 8), num_items_in_batch=16)
    assert collator.last_result is not None and collator.last_inputs is not None
    assert len(output.logits) == len(collator.last_result.images) == 6 and len(collator.last_inputs) == 8
    # 6 outputs made of 8 samples stand for half of 16
    rows_ = -(collator.last_result.targets * output.logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(output.loss, rows_.mean() / 2)
    with collator.paused():
        model(**batch("vit", 8))
    assert collator.seen == 12
    collator.remove()
    model(**batch("vit", 8))
    assert collator.seen == 12


def test_spectrograms_move_along_time_only() -> None:
    model = make("ast").train()
    config = PuzzleMixConfig(grid_sizes=(4,), transport_cost=1e-3)
    collator = DataCollatorForPuzzleMix(model, config)
    collator.install()
    collator.keep_result = True
    moved = 0
    for _ in range(3):
        model(**batch("ast", 8))
        result = collator.last_result
        assert result is not None and result.plans is not None and result.images.shape == (8, 1, 32, 16)
        columns = result.masks.shape[-1]
        home = torch.arange(result.plans.shape[-1])
        assert torch.equal(result.plans % columns, (home % columns).expand_as(result.plans))
        moved += int((result.plans // columns != home // columns).sum())
    assert moved > 0


def test_blank_images_are_counted() -> None:
    model = make("vit").train()
    with torch.no_grad():
        model.classifier.weight.zero_()  # no gradient reaches any input
    collator = DataCollatorForPuzzleMix(model, PUZZLE)
    collator.install()
    data = batch("vit", 4)
    output = model(**data)
    assert collator.unmixed == collator.seen == 4
    plain = model.eval()(**data)
    torch.testing.assert_close(output.loss, plain.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model is None"),
        ({"saliency": "map"}, "num_labels"),
        ({"saliency": "map", "num_labels": 10, "label_smoothing": 0.1}, "soft_target_loss"),
        ({"saliency": "map", "num_labels": 10, "augmentation": abs}, "augment in the data set"),
        ({"saliency": "map", "num_labels": 10, "config": PuzzleMixConfig(clean_weight=1.0)}, "clean_weight"),
    ],
)
def test_modes_that_cannot_work_without_a_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataCollatorForPuzzleMix(None, **options)


def test_gradient_options_need_the_live_gradient() -> None:
    model = make("vit")
    for saliency in ("map", lambda images, targets: images.mean(1)):
        with pytest.raises(ValueError, match="saliency='live'"):
            DataCollatorForPuzzleMix(model, PuzzleMixConfig().adversarial(), saliency=saliency)
        with pytest.raises(ValueError, match="saliency='live'"):
            DataCollatorForPuzzleMix(model, PUZZLE, saliency=saliency, saliency_scale=0.5)
    with pytest.raises(TypeError, match="unknown"):
        DataCollatorForPuzzleMix(model, PUZZLE, unknown=1)
    with pytest.raises(ValueError, match="loader workers"), in_workers().paused():
        pass
    with pytest.raises(ValueError, match="loader workers"):
        in_workers().keep_result = True
    with pytest.raises(ValueError, match="one map each"):
        in_workers()([{**row, "map": torch.ones(4, 4)} for row in rows("vit", 2)])


def test_algorithm_2_through_the_collator() -> None:
    model = make("vit").train()
    config = PuzzleMixConfig(grid_sizes=(2,), neighbourhood=1, transport=False).adversarial(probability=0.5)
    collator = DataCollatorForPuzzleMix(model, config)
    collator.install()
    collator.keep_result = True
    output = model(**batch("vit", 8))
    result, images = collator.last_result, collator.last_inputs
    assert result is not None and images is not None and bool(torch.isfinite(output.loss))
    mask = torch.nn.functional.interpolate(result.masks[:, :1], scale_factor=4)
    clean = mask * images + (1 - mask) * images[result.sources[:, 1]]
    apart = (result.images - clean).abs()
    assert 0 < float(apart.max()) <= config.adversarial_eps + 1e-6
    assert int((apart.flatten(1).amax(1) == 0).sum()) > 0  # some pairs are drawn for neither role
