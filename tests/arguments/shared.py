"""What all rooms share: metrics, saliency, features, decoding, random streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hf_dataopt import FeatureExtractor, Thumbnails, decoding, metrics
from hf_dataopt.errors import BadRowError
from hf_dataopt.saliency import SaliencyExtractor, input_gradient, input_saliency, saliency_map
from hf_dataopt.seeding import generator

from ..mixup.models import vit
from .pool import CALLABLE, NONE, UNCALLED, WORDS, Argument, Case, Kind, choice, count, instance, like, number

NAN = float("nan")
MODEL = vit().eval()


def _pixels() -> Tensor:
    return torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)


def _flat(value: Any, kinds: str) -> bool | None:
    try:
        found = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        return False
    return None if found.ndim == 1 and found.dtype.kind in kinds and found.size else False


LABELS = Argument(
    lambda: [0, 0, 1, 1],
    Kind(lambda v: _flat(v, "fiub"), [lambda: [0, 2, 1, 1], lambda: [0, 0, 0, 0], lambda: [0, 1], lambda: ["a"] * 4]),
)
SCORES = Argument(
    lambda: [0.1, 0.4, 0.3, 0.8],
    Kind(lambda v: _flat(v, "fiu"), [lambda: [NAN] * 4, lambda: [1.0], lambda: [[1.0] * 4], lambda: ["1"] * 4]),
)
INPUTS = Kind(
    lambda value: None if isinstance(value, Mapping) else False,
    [dict, lambda: {"pixel_values": None}, lambda: {"pixel_values": _pixels().int()}, lambda: {"pixel_values": [1]}],
)
CLASSES = Kind(
    lambda value: None if isinstance(value, Tensor) else False,
    [
        lambda: torch.tensor([0, 10]),
        lambda: torch.tensor([-1, 0]),
        lambda: torch.tensor([0]),
        lambda: torch.ones(2, 10),
        lambda: [0, 1],
    ],
)
CELLS = [
    None,
    {},
    [],
    "a",
    b"x",
    [[1, 2], [3]],
    [[NAN]],
    object(),
    {"bytes": b"x", "path": None},
    {"bytes": None, "path": "no"},
]


def _of(**arguments: Argument) -> dict[str, Argument]:
    return arguments


def _batch(column: str = "pixel_values", **more: Any) -> Argument:
    def made() -> dict[str, Any]:
        return {column: [image.numpy() for image in _pixels()], **more}

    bad = [lambda cell=cell: {**made(), column: [cell, cell]} for cell in CELLS]
    bad += [lambda cell=cell: {**made(), "labels": [cell, 1]} for cell in (None, "a", NAN, 10, -1, [1])] if more else []
    return Argument(made, Kind(lambda value: None if isinstance(value, Mapping) else False, bad))


def cases() -> dict[str, Case]:
    """All of them."""
    found = {
        f"metrics.{name}": Case(getattr(metrics, name), _of(labels=LABELS, scores=SCORES))
        for name in ("average_precision", "auroc", "detection_metrics")
    }
    found["metrics.tnr_at_tpr"] = Case(
        metrics.tnr_at_tpr, _of(labels=LABELS, scores=SCORES, tpr=Argument(lambda: 0.9, number(0, 1, above=True)))
    )
    found["metrics.module_path"] = Case(
        metrics.module_path, _of(name=Argument(lambda: "auroc", choice(*metrics.METRIC_NAMES)))
    )
    whole = _of(
        model=Argument(lambda: MODEL, UNCALLED),
        inputs=Argument(lambda: {"pixel_values": _pixels()}, INPUTS),
        labels=Argument(lambda: torch.tensor([0, 1]), CLASSES),
    )
    found["input_gradient"] = Case(input_gradient, whole)
    found["input_saliency"] = Case(input_saliency, whole)
    found["saliency_map"] = Case(
        saliency_map,
        _of(gradient=Argument(_pixels, Kind(lambda v: None if isinstance(v, Tensor) else False, like(_pixels).bad))),
    )
    text = Argument(lambda: "pixel_values", WORDS)
    found["SaliencyExtractor"] = Case(
        SaliencyExtractor,
        _of(
            model=Argument(lambda: MODEL, instance(nn.Module)),
            processor=Argument(lambda: None, NONE | CALLABLE),
            column=text,
            label_column=text,
            key=Argument(lambda: None, NONE | WORDS),
            output=text,
        ),
    )
    found["SaliencyExtractor.__call__"] = Case(
        SaliencyExtractor(MODEL), _of(batch=_batch(labels=[0, 1])), (BadRowError,)
    )
    found["FeatureExtractor"] = Case(
        FeatureExtractor,
        _of(
            model=Argument(lambda: MODEL, WORDS),
            processor=Argument(lambda: None, NONE | CALLABLE),
            column=text,
            modality=Argument(lambda: "image", choice("image", "text", "audio")),
            revision=Argument(lambda: None, NONE | WORDS),
            dtype=Argument(lambda: "float32", choice("float32", "bfloat16", "float16")),
            suffix=Argument(lambda: "", WORDS),
            on_error=Argument(lambda: "raise", choice("raise", "skip")),
        ),
    )
    found["FeatureExtractor.__call__"] = Case(
        FeatureExtractor(MODEL, column="pixel_values"),
        _of(batch=_batch(), rank=Argument(lambda: 0, NONE | count(0))),
        (BadRowError,),
    )
    found["Thumbnails"] = Case(
        Thumbnails, _of(column=text, on_error=Argument(lambda: "raise", choice("raise", "skip")))
    )
    found["Thumbnails.__call__"] = Case(Thumbnails("pixel_values"), _of(batch=_batch()), (BadRowError,))
    picture = Argument(
        lambda: Image.new("RGB", (4, 4)), Kind(lambda value: None, [lambda cell=cell: cell for cell in CELLS])
    )
    for name in ("read_image", "read_picture", "picture_size"):
        found[f"decoding.{name}"] = Case(getattr(decoding, name), _of(value=picture))
    found["decoding.read_array"] = Case(decoding.read_array, _of(value=Argument(lambda: [1.0, 2.0], picture.kind)))
    found["decoding.read_sound"] = Case(
        decoding.read_sound,
        _of(
            value=Argument(lambda: [1.0, 2.0], picture.kind),
            rate=Argument(lambda: None, NONE | count(1)),
        ),
        (ImportError,),
    )
    found["decoding.read_rows"] = Case(
        decoding.read_rows,
        _of(
            values=Argument(lambda: [[1.0], [2.0]], Kind(lambda value: None)),
            read=Argument(lambda: decoding.read_array, UNCALLED),
            on_error=Argument(lambda: "raise", choice("raise", "skip")),
        ),
    )
    found["seeding.generator"] = Case(
        generator, {name: Argument(lambda: 1, count(0, 2**64 - 1)) for name in ("seed", "epoch", "rank", "worker")}
    )
    return found
