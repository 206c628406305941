"""Dataset condensation: the condenser, forming, condensed sets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from hf_dataopt import DatasetCondenser, IDCConfig, MultiFormation
from hf_dataopt.condensation.augment import Draws, augment, draw
from hf_dataopt.condensation.baselines import METHODS
from hf_dataopt.condensation.matching import distance, match_gradients
from hf_dataopt.condensation.multi_formation import Formation, form, form_labels
from hf_dataopt.condensation.networks import ConvNet
from hf_dataopt.condensation.saved import load_condensed, push_condensed, save_condensed
from hf_dataopt.errors import BadRowError, FolderInUseError, HubError

from ..condensation.conftest import as_dataset, synthetic_images
from .kvzip import FOLDER, HUB, LICENCE, LOAD
from .pool import (
    CALLABLE,
    FLAG,
    NONE,
    PATH,
    UNCALLED,
    WORDS,
    Argument,
    Case,
    Kind,
    choice,
    count,
    instance,
    like,
    saved,
)

CONFIG = IDCConfig(
    images_per_class=1,
    outer_iterations=1,
    inner_iterations=1,
    width=4,
    depth=1,
    real_batch=4,
    network_images=4,
    network_batch=4,
    evaluation_epochs=1,
    initialisation="random",
)


@lru_cache(maxsize=1)
def _train() -> Dataset:
    return as_dataset(*synthetic_images(12))


def train() -> Dataset:
    return _train()


def _condenser() -> DatasetCondenser:
    return DatasetCondenser(CONFIG, device="cpu")


@lru_cache(maxsize=1)
def _condensed() -> Dataset:
    return _condenser().initial(train())


def condensed() -> Dataset:
    return _condensed()


def _of(**arguments: Argument) -> dict[str, Argument]:
    return arguments


def _dataset(value: Any) -> bool | None:
    return None if isinstance(value, Dataset) else False


def _column(name: str, value: Any) -> Dataset:
    rows = {"image": [None if name == "image" else [[0.5] * 8] * 8] * 6, "label": [0, 1] * 3}
    rows[name] = [value, *rows[name][1:]]
    return Dataset.from_dict(rows)


SETS = Kind(
    _dataset,
    [
        lambda: _column("label", -1),
        lambda: _column("label", None),
        lambda: _column("image", None),
        lambda: _column("image", [[0.5]]),
        lambda: _column("image", [[float("nan")] * 8] * 8),
        lambda: train().remove_columns("label"),
        lambda: train().select([]),
        lambda: train().select([0]),
        lambda: DatasetDict({"train": train()}),
        lambda: train().to_iterable_dataset(),
        lambda: train().to_dict(),
    ],
)
TRAIN = Argument(train, SETS)
CONDENSED = Argument(condensed, Kind(_dataset, [train, *SETS.bad]))
COLUMNS = _of(image_column=Argument(lambda: "image", WORDS), label_column=Argument(lambda: "label", WORDS))
FORMATION = Argument(lambda: Formation(factor=2), instance(Formation, near=[dict, lambda: 2, lambda: Formation]))
SCORES = Argument(tuple, Kind(lambda value: None if hasattr(value, "__len__") else False))


def _batch() -> dict[str, Any]:
    return {name: condensed()[:2][name] for name in condensed().column_names}


BATCH = Kind(
    lambda value: None if isinstance(value, Mapping) else False,
    [*(lambda v=v: {**_batch(), "image": v} for v in ([], [None], ["a"], [3], [[[1.0]], None], [b"x"])), dict],
)


def _labelled() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])


NO_TRACKERS = Kind(
    lambda value: isinstance(value, list | tuple) and not value,
    [lambda: "wandb", lambda: ["tensorbord"], lambda: [None], lambda: [["wandb"]]],
)
TEACHERS = Kind(
    lambda value: None if isinstance(value, torch.nn.Module | str) else False,
    [dict, list, lambda: torch.nn.Linear, lambda: "/nothing/there", lambda: torch.zeros(2)],
)
PAIRS = Kind(
    lambda value: False,
    [
        lambda: _labelled()[0],
        lambda: (_labelled()[0], torch.tensor([0])),
        lambda: (_labelled()[0], torch.tensor([0, 3])),
        lambda: (_labelled()[0], torch.tensor([0, -1])),
        lambda: (_labelled()[0], torch.tensor([0.0, 1.0])),
        lambda: (_labelled()[0].long(), torch.tensor([0, 1])),
        lambda: (_labelled()[0][0], torch.tensor([0])),
        lambda: (_labelled()[0].numpy(), torch.tensor([0, 1])),
        lambda: (*_labelled(), None),
    ],
)


def _loaded(**arguments: Any) -> Any:
    saved("condensed", lambda folder: save_condensed(condensed(), folder))
    return load_condensed(**arguments)


def cases() -> dict[str, Case]:
    """All of the room."""
    about = Argument(lambda: None, NONE | instance(dict))
    images = lambda: torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # noqa: E731
    output = Argument(lambda: "tensor", choice("stored", "tensor"))
    networks = Kind(lambda v: None if isinstance(v, dict) else False, [lambda: {"a": None}])
    rows = (BadRowError, FolderInUseError)
    return {
        "DatasetCondenser": Case(
            DatasetCondenser,
            _of(
                config=Argument(lambda: CONFIG, NONE | instance(IDCConfig, near=[dict, lambda: IDCConfig])),
                method=Argument(lambda: "mosaic", choice(*METHODS)),
                teacher=Argument(lambda: None, NONE | TEACHERS),
                network=Argument(lambda: None, NONE | CALLABLE),
                device=Argument(lambda: "cpu", NONE | WORDS),
                on_error=Argument(lambda: "raise", choice("raise", "skip")),
            ),
        ),
        "DatasetCondenser.condense": Case(
            lambda **a: _condenser().condense(**a),
            {
                "dataset": TRAIN,
                **COLUMNS,
                "output_dir": Argument(lambda: None, NONE | PATH),
                "callback": Argument(lambda: None, NONE | UNCALLED),
                "report_to": Argument(lambda: None, NONE | NO_TRACKERS),
            },
            rows,
        ),
        "DatasetCondenser.initial": Case(lambda **a: _condenser().initial(**a), {"dataset": TRAIN, **COLUMNS}, rows),
        "DatasetCondenser.estimate": Case(
            lambda **a: _condenser().estimate(**a),
            {"dataset": TRAIN, **COLUMNS, "clock": Argument(lambda: time.perf_counter, CALLABLE)},
            rows,
        ),
        "DatasetCondenser.evaluate": Case(
            lambda **a: _condenser().evaluate(**a),
            _of(
                condensed=CONDENSED,
                test=TRAIN,
                train=Argument(lambda: None, NONE | SETS),
                networks=Argument(lambda: None, NONE | networks),
                seeds=Argument(lambda: 1, count(1, 1000)),
                full_epochs=Argument(lambda: None, NONE | count(1, 2)),
            ),
            rows,
        ),
        "MultiFormation": Case(
            MultiFormation, _of(formation=FORMATION, column=Argument(lambda: "image", WORDS), output=output)
        ),
        "MultiFormation.from_dataset": Case(MultiFormation.from_dataset, _of(dataset=CONDENSED, output=output)),
        "MultiFormation.__call__": Case(
            lambda batch: MultiFormation.from_dataset(condensed())(batch), _of(batch=Argument(_batch, BATCH)), rows
        ),
        "form": Case(form, _of(images=Argument(images, like(images, loose=True)), formation=FORMATION)),
        "form_labels": Case(
            form_labels,
            _of(
                labels=Argument(lambda: torch.arange(3), like(lambda: torch.arange(3), loose=True)), formation=FORMATION
            ),
        ),
        "matching.distance": Case(
            distance,
            _of(
                real=Argument(images, like(images)),
                synthetic=Argument(images, like(images)),
                metric=Argument(lambda: "mse", choice("mse", "l1", "l1_mean", "cos")),
            ),
        ),
        "matching.match_gradients": Case(
            match_gradients,
            _of(
                network=Argument(lambda: ConvNet(1, 3, size=(8, 8), width=4, depth=1), UNCALLED),
                real=Argument(_labelled, PAIRS),
                synthetic=Argument(_labelled, PAIRS),
                metric=Argument(lambda: "mse", choice("mse", "l1", "l1_mean", "cos")),
                bias=Argument(lambda: False, FLAG),
                head=Argument(lambda: False, FLAG),
            ),
        ),
        "augment.draw": Case(
            draw,
            _of(
                strategy=Argument(lambda: "color_crop_cutout", WORDS),
                size=Argument(lambda: (8, 8), Kind(lambda v: None if isinstance(v, list | tuple | range) else False)),
                generator=Argument(torch.Generator, instance(torch.Generator)),
                n=Argument(lambda: 2, NONE | count(1)),
                pick=Argument(lambda: None, NONE | count(0, 0)),
            ),
        ),
        "augment.augment": Case(
            augment,
            _of(
                images=Argument(images, like(images, loose=True)),
                draws=Argument(lambda: draw("flip", (8, 8), torch.Generator()), instance(Draws)),
            ),
        ),
        "save_condensed": Case(
            save_condensed,
            _of(
                condensed=CONDENSED,
                folder=FOLDER,
                config=Argument(lambda: CONFIG, NONE | instance(IDCConfig)),
                scores=SCORES,
                source=Argument(lambda: "me/source", NONE | WORDS),
                license=LICENCE,
                name=Argument(lambda: None, NONE | WORDS),
            ),
        ),
        "load_condensed": Case(_loaded, {"source": FOLDER, **LOAD}, (HubError,)),
        "push_condensed": Case(push_condensed, {"condensed": CONDENSED, "about": about, **HUB}, (HubError,)),
    }
