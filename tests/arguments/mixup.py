"""Puzzle Mix, Co-Mixup, their collators, losses and pictures."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_dataopt import (
    CoMixupConfig,
    DataCollatorForCoMixup,
    DataCollatorForMixup,
    DataCollatorForPuzzleMix,
    MixResult,
    MixupSchedule,
    PuzzleMixConfig,
    co_mixup,
    plot_mixup,
    puzzle_mix,
    soft_target_loss,
)
from hf_dataopt.errors import MissingExtraError
from hf_dataopt.mixup import statistics
from hf_dataopt.mixup.adversarial import Attack, finish_attack, start_attack
from hf_dataopt.mixup.clean import clean_pass
from hf_dataopt.mixup.co_mixup import compatibility
from hf_dataopt.mixup.graph_cut import grid_energy, solve_masks
from hf_dataopt.mixup.loss import soft_cross_entropy, soft_targets, softmax_binary_cross_entropy
from hf_dataopt.mixup.puzzle_mix import PuzzleDraws, draw, mask_problem
from hf_dataopt.mixup.segmentation import mixed_maps
from hf_dataopt.mixup.transport import grid_distances, masked_transport

from .configs import SEED
from .pool import (
    CALLABLE,
    FLAG,
    NEVER,
    NONE,
    UNCALLED,
    WORDS,
    Argument,
    Case,
    Kind,
    count,
    instance,
    like,
    number,
    spoiled,
)

NAN, INF = float("nan"), float("inf")


def images() -> Tensor:
    return torch.linspace(0, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


def targets() -> Tensor:
    return torch.eye(4)


def saliency() -> Tensor:
    return images().mean(1) + 0.1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draws() -> PuzzleDraws:
    return PuzzleDraws(partner=torch.tensor([1, 0, 3, 2]), grid=4, lam=0.5)


@lru_cache(maxsize=1)
def _result() -> MixResult:
    return puzzle_mix(images(), targets(), saliency(), generator=generator())


class _Head(nn.Module):
    """A small classifier with the output of a Hugging Face one."""

    num_labels = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 4)

    def forward(self, pixel_values: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"logits": self.linear(pixel_values.flatten(1))}


def rows(with_map: bool = False) -> list[dict[str, Any]]:
    """A batch for a collator."""
    more = {"map": saliency()[0].tolist()} if with_map else {}
    return [{"pixel_values": image, "labels": k, **more} for k, image in enumerate(images())]


def _spoiled_rows(name: str, value: Any) -> list[dict[str, Any]]:
    found = rows(True)
    found[1][name] = value
    return found


IMAGES = Argument(images, like(images, loose=False))
SHARES = like(targets, more=spoiled(targets, NAN, 0.5, -1.0, INF))
TARGETS = Argument(
    targets,
    Kind(lambda value: False if SHARES.takes(value) is None and _no_shares(value) else SHARES.takes(value), SHARES.bad),
)
CONFIG = Argument(
    PuzzleMixConfig, NONE | instance(PuzzleMixConfig, near=[CoMixupConfig, lambda: PuzzleMixConfig, dict])
)
CO_CONFIG = Argument(CoMixupConfig, instance(CoMixupConfig, near=[PuzzleMixConfig, lambda: CoMixupConfig]))
GENERATOR = Argument(generator, instance(torch.Generator))
RESULT = Argument(_result, instance(MixResult, near=[images, lambda: vars(_result())]))


def _no_shares(value: Tensor) -> bool:
    return bool(((value < 0).any(1) | ((value.float().sum(1) - 1).abs() > 2e-2)).any()) or bool(value.isnan().any())


def _labels(value: Any) -> bool | None:
    if not isinstance(value, Tensor) or value.is_sparse or value.device.type == "meta" or value.dtype == torch.bool:
        return False
    if value.is_complex() or value.shape[:1] != (4,):
        return False
    if value.is_floating_point():
        return None if value.shape == (4, 4) and not _no_shares(value) else False
    return bool(value.ndim == 1 and value.min() >= 0 and value.max() < 4)


LABELS = Argument(
    lambda: torch.tensor([0, 1, 2, 3]),
    Kind(
        _labels,
        [targets, lambda: torch.tensor([0, 1, 2, 4]), lambda: torch.tensor([0, -1, 2, 3]), lambda: [0, 1, 2, 3]],
    ),
)


def _fields(**given: Argument) -> dict[str, Argument]:
    return given


def _collator(kind: type, config: Any) -> Case:
    options = _fields(
        model=Argument(_Head, NEVER | instance(nn.Module)),
        config=Argument(config, NONE | instance(config)),
        saliency=Argument(lambda: "live", WORDS | CALLABLE),
        num_labels=Argument(lambda: 4, NONE | count(1)),
        collate_fn=Argument(lambda: print, CALLABLE),
        augmentation=Argument(lambda: None, NONE | CALLABLE),
        label_smoothing=Argument(lambda: 0.0, number(0, 1, below=True)),
        loss=Argument(lambda: None, NONE | CALLABLE),
        saliency_scale=Argument(lambda: 1.0, number(0, 1, above=True)),
        seed=Argument(lambda: 1, SEED),
    )
    if kind is DataCollatorForMixup:
        options["schedule"] = options.pop("config")
    return Case(kind, options)


def _in_workers() -> DataCollatorForPuzzleMix:
    return DataCollatorForPuzzleMix(None, PuzzleMixConfig(), saliency="map", num_labels=4)


def _mixed(features: Any) -> Any:
    return _in_workers()(features)


def _live(features: Any) -> Any:
    model = _Head().train()
    collator = DataCollatorForPuzzleMix(model)
    with collator.mixing():
        return model(**collator(features))


FEATURES = Kind(
    lambda value: False if not isinstance(value, list) or not value or not isinstance(value[0], dict) else None,
    [
        *(
            lambda n=n, v=v: _spoiled_rows(n, v)
            for n in ("labels", "map")
            for v in (None, "a", NAN, -1, [[1]], {}, 10**30)
        ),
        lambda: [{}],
        lambda: [{"labels": 1}],
        lambda: [*rows(True), 3],
        lambda: [*rows(True), {}],
        lambda: _spoiled_rows("pixel_values", torch.zeros(3, 4, 4)),
        lambda: _spoiled_rows("pixel_values", "picture"),
    ],
)


def _set(name: str, value: Any) -> Any:
    setattr(DataCollatorForPuzzleMix(_Head()), name, value)


def _unary() -> np.ndarray:
    return np.linspace(0, 1, 2 * 3 * 3 * 3).reshape(2, 3, 3, 3)


def _numbers(shape: tuple[int, ...]) -> Kind:
    """An array of a shape, or what numpy makes one of."""

    def takes(value: Any) -> bool | None:
        try:
            found = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            return False
        return None if found.shape == shape and found.dtype.kind in "fiu" else False

    odd = [lambda value=value: np.full(shape, value) for value in (NAN, INF, "a", 1j)]
    return Kind(takes, [*odd, lambda: np.zeros((*shape, 2)), lambda: np.zeros(shape[1:])])


def cases() -> dict[str, Case]:
    """All of the room."""
    mixing = _fields(images=IMAGES, targets=TARGETS, saliency=Argument(saliency, Kind(_maps, like(saliency).bad)))
    found = {
        "puzzle_mix": Case(
            puzzle_mix,
            {
                **mixing,
                "config": CONFIG,
                "generator": Argument(generator, NONE | GENERATOR.kind),  # draws are given
                "draws": Argument(draws, NONE | instance(PuzzleDraws, near=[lambda: vars(draws())])),
                "shown": Argument(
                    lambda: (images(), images()),
                    NONE | Kind(lambda value: False, [lambda: (images(),), lambda: (images(), saliency()), images]),
                ),
            },
        ),
        "PuzzleDraws": Case(
            PuzzleDraws,
            _fields(
                partner=Argument(lambda: torch.tensor([1, 0]), like(lambda: torch.tensor([1, 0]), loose=True)),
                grid=Argument(lambda: 4, count(1)),
                lam=Argument(lambda: 0.5, number(0, 1)),
            ),
        ),
        "puzzle_mix.draw": Case(
            draw,
            _fields(
                usable=Argument(lambda: torch.ones(4) > 0, instance(Tensor)),
                config=Argument(PuzzleMixConfig, instance(PuzzleMixConfig)),
                generator=GENERATOR,
            ),
        ),
        "puzzle_mix.mask_problem": Case(
            mask_problem,
            _fields(
                images=IMAGES,
                saliency=Argument(saliency, like(saliency)),
                draws=Argument(draws, instance(PuzzleDraws)),
                config=Argument(PuzzleMixConfig, instance(PuzzleMixConfig)),
            ),
        ),
        "graph_cut.solve_masks": Case(solve_masks, _grids()),
        "graph_cut.grid_energy": Case(
            grid_energy, {**_grids(), "labels": Argument(lambda: np.zeros((2, 3, 3), int), _numbers((2, 3, 3)))}
        ),
        "transport.masked_transport": Case(
            masked_transport,
            _fields(
                saliency=Argument(lambda: np.ones((2, 4), np.float32), _numbers((2, 4))),
                mask=Argument(lambda: np.ones((2, 4), np.float32), _numbers((2, 4))),
                grid=Argument(lambda: (2, 2), Kind(_pair, [lambda: (2.0, 2), lambda: (3, 3)])),
                cost=Argument(lambda: 0.8, number(0, 1.7e308, above=True)),
                rounds=Argument(lambda: None, NONE | count(1, 10_000)),
            ),
        ),
        "transport.grid_distances": Case(
            grid_distances,
            _fields(rows=Argument(lambda: 2, count(1, 2**13)), columns=Argument(lambda: 2, count(1, 2**13))),
        ),
        "clean.clean_pass": Case(
            clean_pass,
            _fields(
                model=Argument(_Head, UNCALLED),
                inputs=Argument(
                    lambda: {"pixel_values": images()},
                    Kind(
                        lambda value: None if isinstance(value, Mapping) else False,
                        [dict, lambda: {"pixel_values": None}, lambda: {"pixel_values": images().int()}],
                    ),
                ),
                mean_loss=Argument(
                    lambda: lambda model, given: model.forward(**given)["logits"].square().mean(),
                    Kind(lambda value: None if callable(value) else False, calls=False),
                ),
                backward=Argument(
                    lambda: None, NONE | Kind(lambda value: None if callable(value) else False, calls=False)
                ),
            ),
        ),
        "adversarial.start_attack": Case(
            start_attack,
            _fields(
                images=Argument(images, like(images, loose=True)),
                config=Argument(PuzzleMixConfig, instance(PuzzleMixConfig)),
                generator=GENERATOR,
            ),
        ),
        "adversarial.finish_attack": Case(
            finish_attack,
            _fields(
                images=IMAGES,
                attack=Argument(lambda: start_attack(images(), PuzzleMixConfig(), generator()), instance(Attack)),
                gradient=Argument(images, like(images)),
                config=Argument(PuzzleMixConfig, instance(PuzzleMixConfig)),
            ),
        ),
        "co_mixup": Case(co_mixup, {**mixing, "config": CO_CONFIG, "generator": GENERATOR}),
        "co_mixup.compatibility": Case(
            compatibility,
            _fields(distances=Argument(lambda: np.ones((3, 3)), Kind(_square, _numbers((3, 3)).bad)), config=CO_CONFIG),
        ),
        "MixResult": Case(MixResult, {name: Argument(lambda v=v: v, _part(v)) for name, v in vars(_result()).items()}),
        "plot_mixup": Case(
            plot_mixup,
            _fields(
                result=RESULT,
                images=Argument(images, like(images, loose=True, whole=True)),
                config=Argument(lambda: None, NONE | instance(PuzzleMixConfig, CoMixupConfig, near=[dict])),
                rows=Argument(lambda: 1, count(1)),
                inputs=Argument(lambda: 1, count(1)),
            ),
            (MissingExtraError,),
        ),
        "soft_targets": Case(soft_targets, _fields(labels=LABELS, num_labels=Argument(lambda: 4, count(4)))),
        "soft_cross_entropy": Case(
            soft_cross_entropy,
            _fields(
                logits=Argument(targets, like(targets)),
                targets=TARGETS,
                label_smoothing=Argument(lambda: 0.1, number(0, 1, below=True)),
            ),
        ),
        "soft_target_loss": Case(
            soft_target_loss,
            _fields(
                outputs=Argument(
                    lambda: {"logits": targets().requires_grad_()},
                    Kind(
                        lambda value: False,
                        [lambda: {"logits": [1]}, lambda: (), lambda: (None,), lambda: {"logits": None}],
                    ),
                ),
                labels=LABELS,
                num_items_in_batch=Argument(lambda: 4, NONE | Kind(_items)),
                label_smoothing=Argument(lambda: 0.1, number(0, 1, below=True)),
            ),
        ),
        "DataCollatorForPuzzleMix": _collator(DataCollatorForPuzzleMix, PuzzleMixConfig),
        "DataCollatorForCoMixup": _collator(DataCollatorForCoMixup, CoMixupConfig),
        "DataCollatorForMixup": _collator(DataCollatorForMixup, MixupSchedule),
        "DataCollatorForPuzzleMix.install": Case(
            lambda model: DataCollatorForPuzzleMix(_Head()).install(model),
            _fields(model=Argument(_Head, NEVER | instance(nn.Module))),
        ),
        "softmax_binary_cross_entropy": Case(
            softmax_binary_cross_entropy, _fields(logits=Argument(targets, like(targets)), targets=TARGETS)
        ),
        "segmentation.mixed_maps": Case(
            mixed_maps,
            _fields(
                result=RESULT,
                maps=Argument(
                    lambda: torch.zeros(4, 8, 8, dtype=torch.int64),
                    like(lambda: torch.zeros(4, 8, 8, dtype=torch.int64), loose=True),
                ),
            ),
        ),
        "DataCollatorForPuzzleMix.__call__ (column)": Case(
            _mixed, _fields(features=Argument(lambda: rows(True), FEATURES))
        ),
        "DataCollatorForPuzzleMix.__call__ (live)": Case(_live, _fields(features=Argument(rows, FEATURES))),
        "DataCollatorForPuzzleMix.set_epoch": Case(
            lambda epoch: _in_workers().set_epoch(epoch), _fields(epoch=Argument(lambda: 1, count(0)))
        ),
        "DataCollatorForPuzzleMix.keep_result": Case(
            lambda keep: _set("keep_result", keep), _fields(keep=Argument(lambda: True, FLAG))
        ),
        "statistics.total_variation": Case(
            statistics.total_variation, _fields(images=Argument(images, like(images, loose=True, whole=True)))
        ),
        "statistics.transported_inputs": Case(
            statistics.transported_inputs,
            _fields(images=Argument(images, like(images, loose=True, whole=True)), result=RESULT),
        ),
    }
    for name in ("mixed_saliency", "source_shares", "inputs_per_output", "diversity"):
        found[f"statistics.{name}"] = Case(getattr(statistics, name), _fields(result=RESULT))
    return copy.copy(found)


def _grids() -> dict[str, Argument]:
    return _fields(
        unary=Argument(_unary, _numbers((2, 3, 3, 3))),
        vertical=Argument(lambda: np.ones((2, 2, 3)), _numbers((2, 2, 3))),
        horizontal=Argument(lambda: np.ones((2, 3, 2)), _numbers((2, 3, 2))),
    )


def _maps(value: Any) -> bool | None:
    if not isinstance(value, Tensor) or value.is_sparse or value.device.type == "meta":
        return False
    return None if value.shape == (4, 8, 8) and not value.is_complex() and value.dtype != torch.bool else False


def _pair(value: Any) -> bool | None:
    whole = isinstance(value, list | tuple) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)
    return None if whole and len(value) == 2 and value[0] * value[1] == 4 and min(value) > 0 else False


def _items(value: Any) -> bool | None:
    if isinstance(value, Tensor) and value.shape == (1,):
        return None
    return number(0, 2**53, above=True).takes(value)


def _square(value: Any) -> bool | None:
    found = _numbers((2, 2)).takes(value), _numbers((3, 3)).takes(value), _numbers((1, 1)).takes(value)
    return None if None in found else False


def _part(value: Tensor) -> Kind:
    good = (
        like(lambda: value, whole=value.ndim == 4, loose=value.ndim >= 2)
        if value.dtype != torch.bool
        else instance(Tensor)
    )
    return (NONE | good) if value.ndim in (1, 3) and value.dtype != torch.bool else good
