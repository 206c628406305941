"""Settings of all methods, their presets and what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_dataopt import CCMConfig, CoMixupConfig, IDCConfig, KVzipConfig, PuzzleMixConfig, RelationConfig
from hf_dataopt.condensation.config import evaluation_epochs_of
from hf_dataopt.condensation.multi_formation import Formation
from hf_dataopt.kvzip.gate_fit import GateConfig
from hf_dataopt.kvzip.scores import NAMES
from hf_dataopt.mixup.options import LiveOptions
from hf_dataopt.mixup.schedule import MixupSchedule
from hf_dataopt.text.chat import ChatFormat

from .pool import ANY, CALLABLE, FLAG, NEVER, NONE, TEXT, WORDS, Argument, Case, Kind, choice, count, number

SEED = count(0, 2**63 - 1)
REAL = number(-1.7e308, 1.7e308)


def _channels(value: Any) -> bool | None:
    """Several numbers: the config says whether they are in range and fit each other."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return None if len(value.shape) == 1 and value.shape[0] else False
    return None if isinstance(value, list | tuple) and value and not any(map(_odd, value)) else False


def _odd(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float) or value != value


CHANNELS = Kind(_channels, [lambda: (0.5, float("nan")), lambda: (True,), lambda: ("0.5",), lambda: ((0.5,),)])
SIZES = Kind(_channels, [lambda: (0,), lambda: (4, -1), lambda: (2.5,), lambda: ("4",), lambda: (4, None)])


def _arguments(**given: tuple[Any, Kind]) -> dict[str, Argument]:
    return {name: Argument(lambda value=value: value, kind) for name, (value, kind) in given.items()}


PUZZLE = _arguments(
    grid_sizes=((2, 4), SIZES),
    alpha=(1.0, number(1e-3, 1e3)),
    n_labels=(3, count(2, 4)),
    beta=(1.2, number(0, 1e3)),
    gamma=(0.5, number(0, 1e3)),
    eta=(0.2, number(0, 1e3)),
    neighbourhood=(4, count(1)),
    data_term=("code", choice("code", "text")),
    solver=("exact", choice("exact", "pygco")),
    transport=(True, FLAG),
    transport_cost=(0.8, number(1e-6, 1e3)),
    transport_block=(None, NONE | count(1)),
    transport_rounds=("grid", NONE | count(1, 10_000) | choice("grid")),
    transport_axis=("both", choice("both", "height", "width")),
    transport_mask=("visible", choice("visible", "share")),
    probability=(1.0, number(0, 1)),
    clean_weight=(0.0, number(0, 1e3)),
    adversarial_probability=(0.0, number(0, 1)),
    adversarial_eps=(0.1, number(0, 1)),
    adversarial_step=(0.1, number(0, 1)),
    image_mean=((0.5,), CHANNELS),
    image_std=((0.5,), CHANNELS),
)
CO_MIXUP = _arguments(
    grid=(4, NONE | count(1, 64) | SIZES),
    part_size=(20, count(1)),
    outputs_per_part=(None, NONE | count(1, 2**16)),
    beta=(0.32, number(0, 1e3)),
    gamma=(1.0, number(0, 1e3)),
    eta=(0.05, number(0, 1e3)),
    alpha=(2.0, NONE | number(1e-3, 1e3)),
    tau=(0.83, number(0, 1e3)),
    tau_type=("hard", choice("hard", "soft")),
    omega=(0.001, number(0, 1)),
    sweeps=(4, count(1)),
    resolve=(True, FLAG),
    keep_best=(True, FLAG),
    distance_window=(8, count(1)),
    distance_stride=(1, count(1)),
    probability=(1.0, number(0, 1)),
    clean_weight=(0.0, number(0, 1e3)),
    image_mean=((0.5,), CHANNELS),
    image_std=((0.5,), CHANNELS),
    strict=(False, FLAG),
)
RELATION = _arguments(
    score=("combined", choice("combined", "label_noise")),
    cut=("estimated", choice("estimated", "algorithm4") | number(0, 1)),
    neighbours=(30, count(1)),
    temperature=(4.0, number(1e-3, 64)),
    similarity=("cosine", choice("cosine", "rbf")),
    rbf_gamma=(1.0, number(1e-6, 1e6)),
    compatibility=(True, FLAG),
    edge_cutoff=(0.03, number(0, 1)),
    diagonal=(False, FLAG),
    threshold=("relative", choice("relative", "absolute", "quantile", "noise_rate")),
    threshold_value=(0.6, number(0, 1)),
    max_noisy_share=(0.3, number(0, 1)),
    skip_share=(0.5, number(0, 1)),
    max_passes=(100, count(1)),
    on_cycle=("best", choice("best", "last", "moves")),
    outlier_temperature=(1.0, number(1e-3, 64)),
    outlier_reference=(5000, NONE | count(1)),
    outlier_share=(0.01, number(0, 0.999)),
    outlier_epsilon=(1e-6, number(0, 1)),
    partition_size=(None, NONE | count(2)),
    dtype=("float32", choice("float32", "bfloat16", "float16")),
    device=(None, NONE | WORDS),
    max_memory_gb=(0.06, number(1e-3, 1e4)),
    seed=(0, SEED),
)
IDC = _arguments(
    images_per_class=(10, count(1)),
    factor=(2, count(1, 4096)),
    formation=("single", choice("single", "multi", "bound")),
    image_mode=(None, NONE | choice("RGB", "L")),
    background=("white", WORDS),
    patches_per_image=(5, count(1, 1000)),
    teacher_images=(64, count(1)),
    soft_labels=(False, FLAG),
    soft_temperature=(1.0, number(1e-3, 1e3)),
    axis=("image", choice("image", "time")),
    pad_value=(0.5, REAL),
    image_size=(None, NONE | count(1, 2**14)),
    initialisation=("mix", choice("random", "herding", "mix", "mix_herding", "patches", "noise")),
    network=("convnet", choice("convnet", "resnet_ap")),
    width=(128, number(1, 1e5)),
    depth=(3, count(1, 64)),
    match=("gradient", choice("gradient", "feature")),
    metric=("mse", choice("mse", "l1", "l1_mean", "cos")),
    match_bias=(False, FLAG),
    match_head=(False, FLAG),
    learning_rate=(0.005, number(0, 1e6)),
    scale_learning_rate=(True, FLAG),
    learning_rate_size=(32, number(1, 1e6)),
    momentum=(0.5, number(0, 1)),
    outer_iterations=(2000, count(0)),
    inner_iterations=(100, count(1)),
    real_batch=(64, count(1)),
    formed_batch=(128, count(1)),
    augmentation=("color_crop_cutout", WORDS),
    train_network_on=("real", choice("real", "synthetic", "nothing")),
    network_images=(500, count(1)),
    network_batch=(64, count(1)),
    network_learning_rate=(0.01, number(0, 1e3)),
    network_momentum=(0.9, number(0, 1)),
    network_weight_decay=(5e-4, number(0, 1)),
    cutmix=(0.5, number(0, 1)),
    early_epochs=(0, count(0)),
    reinitialise_every=(1, count(1)),
    pretrained_networks=(0, count(0)),
    clamp_low=(0.0, NONE | REAL),
    clamp_high=(1.0, NONE | REAL),
    normalise=(True, FLAG),
    mean=((0.5,), NONE | CHANNELS),
    std=((0.5,), NONE | CHANNELS),
    storage=("float32", choice("uint8", "float16", "float32")),
    evaluation_epochs=(None, NONE | count(1)),
    evaluation_augmentation=("none", WORDS),
    evaluation_cutmix=(0.5, number(0, 1)),
    evaluation_learning_rate=(0.01, number(0, 1e3)),
    evaluation_batch=(64, count(1)),
    dtype=("float32", choice("float32", "bfloat16")),
    compile=(False, FLAG | WORDS),
    checkpoint_every=(1, count(1)),
    seed=(0, SEED),
)


def _json(value: Any) -> bool | None:
    return (
        None if value is None or (isinstance(value, dict) and all(isinstance(name, str) for name in value)) else False
    )


TEMPLATE = Kind(
    _json, [lambda: {"x": object()}, lambda: {"x": float("nan")}, lambda: {1: 2}, lambda: {"tokenize": True}]
)
SYSTEM = NONE | WORDS
CHAT = _arguments(
    template_kwargs=({"a": 1}, TEMPLATE), system=("Be brief.", SYSTEM), special_tokens_in_text=(False, FLAG)
)
FLAG_OR_NOT = Kind(lambda value: FLAG.takes(value) and None, FLAG.bad)  # True needs other settings
KVZIP = {
    **_arguments(
        keep_ratio=(0.3, number(0, 1, above=True)),
        max_kv_tokens=(None, NONE | count(1)),
        standing=(False, FLAG_OR_NOT),
        level=("pair", choice("pair", "pair-uniform", "head")),
        chunk_size=(2000, count(1)),
        overlap=(8, count(0)),
        score=("kvzip", choice(*NAMES) | CALLABLE),
        head_sinks=(4, count(0)),
        head_recent=(4, count(0)),
        replay=("exact", choice("exact", "local")),
        softmax_keys=("chunk", choice("chunk", "all")),
        ties=("position", choice("position", "reference")),
        storage=("int4", choice("model", "int8", "int4")),
        prefill_chunk_size=(16_000, count(1)),
        task_line=("Answer.", TEXT),
    ),
    **CHAT,
}
IDS = Kind(
    lambda value: None if isinstance(value, range) else _channels(value),
    [lambda: [-1], lambda: [2.5], lambda: ["a"], lambda: [True]],
)
_STREAMS = [lambda: {"max_kv": 20.5}, lambda: {"window": 4}, lambda: {"max_kv": 20}]
CCM = _arguments(
    r=(8, count(1, 2**16)),
    lora_alpha=(16, number(-1e9, 1e9)),
    lora_dropout=(0.05, number(0, 1)),
    num_comp_tokens=(2, count(1, 2**16)),
    memory=("merge", choice("concat", "merge", "concat_apart", "merge_apart", "gist")),
    merge_weight=(0.5, NONE | number(0, 1, above=True)),
    sink=(False, FLAG),
    conditional=(True, FLAG),
    comp_init_token_ids=([5], NONE | IDS),
    stream=(None, NONE | Kind(lambda value: None if isinstance(value, dict) else False, _STREAMS)),
    target_modules=(
        ["q_proj"],
        NONE | WORDS | Kind(lambda value: None if isinstance(value, list | tuple | set) else False),
    ),
)


def _nothing(value: Any) -> bool | None:
    """Only an empty dict may pass; arrays are not compared, which have no truth value."""
    return None if isinstance(value, dict) and not value else False


_SHARES = [lambda: {"cutmix": 2.0}, lambda: {"a": 0.1}, lambda: {1: 1}, lambda: {"cutmix": 0.6, "mixup": 0.6}]
SCHEDULE = _arguments(
    probabilities=({"cutmix": 0.5}, NONE | Kind(_nothing, _SHARES)),
    puzzle_mix=(None, NONE | Kind(_nothing, [CoMixupConfig, lambda: {"a": 1}])),
    co_mixup=(None, NONE | Kind(_nothing, [PuzzleMixConfig, lambda: {"grid": -1}])),
    cutmix_alpha=(1.0, number(1e-3, 1e3)),
    mixup_alpha=(1.0, number(1e-3, 1e3)),
    clean_weight=(0.0, NONE | number(0, 1e3)),
    warmup_epochs=(0.0, number(0, 1e6)),
    off_epoch=(None, NONE | number(0, 1e6)),
)
LIVE = _arguments(
    saliency=(None, NONE | CALLABLE),
    saliency_scale=(1.0, number(0, 1, above=True)),
    loss=(None, NONE | CALLABLE),
    clean_loss=(None, NONE | CALLABLE),
    augmentation=(None, NONE | CALLABLE),
    mean=((0.5,), NONE | CHANNELS),
    std=((0.5,), NONE | CHANNELS),
    probability=(1.0, number(0, 1)),
    clean_weight=(0.0, number(0, 1.7e308)),
    label_smoothing=(0.0, number(0, 1, below=True)),
    attack=(None, NONE | NEVER),
    seed=(0, SEED),
)
FORMATION = _arguments(
    factor=(2, count(1)),
    kind=("single", choice("single", "multi", "bound")),
    axis=("image", choice("image", "time")),
    pad_value=(0.5, REAL),
    bound=(128, count(1)),
)
GATE = _arguments(
    hidden=(4, count(1)),
    steps=(2, count(1)),
    tokens_per_step=(8, count(1)),
    learning_rate=(1e-3, number(0, 1, above=True)),
    weight_decay=(0.01, number(0, 1)),
    loss=("cut", choice("squared", "cut")),
    most_tokens=(100, count(1)),
    held_share=(0.5, number(0, 1, above=True, below=True)),
    seed=(0, SEED),
)
_ALL = {
    "PuzzleMixConfig": (PuzzleMixConfig, PUZZLE),
    "CoMixupConfig": (CoMixupConfig, CO_MIXUP),
    "RelationConfig": (RelationConfig, RELATION),
    "IDCConfig": (IDCConfig, IDC),
    "KVzipConfig": (KVzipConfig, KVZIP),
    "GateConfig": (GateConfig, GATE),
    "CCMConfig": (CCMConfig, CCM),
    "LiveOptions": (LiveOptions, LIVE),
    "MixupSchedule": (MixupSchedule, SCHEDULE),
    "Formation": (Formation, FORMATION),
    "ChatFormat": (ChatFormat, CHAT),
}
_PRESETS = {
    "PuzzleMixConfig": ("cifar100", "tiny_imagenet", "imagenet"),
    "CoMixupConfig": ("cifar100", "tiny_imagenet", "imagenet", "dissertation"),
    "RelationConfig": ("reference",),
    "KVzipConfig": ("reference",),
    "IDCConfig": ("cifar10", "cifar100", "svhn", "mnist", "fashion_mnist", "speech"),
}
_JSON_TEXT = Kind(
    lambda value: None if isinstance(value, str) else False,
    [
        lambda: "[1]",
        lambda: "null",
        lambda: "[" * 100_000,
        lambda: '{"seed": NaN}',
        lambda: '{"colour": 1}',
        lambda: b"{}",
    ],
)


def cases() -> dict[str, Case]:
    """The settings, and what hangs on them."""
    found = {name: Case(call, arguments) for name, (call, arguments) in _ALL.items()}
    for name, presets in _PRESETS.items():
        own, arguments = _ALL[name]
        for preset in presets:
            few = {key: arguments[key] for key in list(arguments)[:6]}
            found[f"{name}.{preset}"] = Case(getattr(own, preset), few)
    for name in (
        "PuzzleMixConfig",
        "CoMixupConfig",
        "MixupSchedule",
        "RelationConfig",
        "IDCConfig",
        "KVzipConfig",
        "GateConfig",
    ):
        text = {"text": Argument(lambda own=_ALL[name][0]: own().to_json_string(), _JSON_TEXT)}
        found[f"{name}.from_json_string"] = Case(_ALL[name][0].from_json_string, text)
    found["RelationConfig.dissertation"] = Case(
        RelationConfig.dissertation, _arguments(threshold_value=(2.0, number(0, 1.7e308)), seed=(0, SEED))
    )
    found["IDCConfig.imagenet_subset"] = Case(
        IDCConfig.imagenet_subset, {**_arguments(classes=(10, count(2))), "factor": IDC["factor"]}
    )
    found["PuzzleMixConfig.adversarial"] = Case(
        PuzzleMixConfig().adversarial, _arguments(probability=(0.1, number(0, 1)), eps=(0.03, number(0, 1 - 2 / 255)))
    )
    found["MixupSchedule.strength"] = Case(MixupSchedule().strength, _arguments(epochs=(1.5, number(0, 1.7e308))))
    found["IDCConfig.image_learning_rate"] = Case(IDCConfig().image_learning_rate, _arguments(height=(32, count(1))))
    found["IDCConfig.epochs_of_evaluation"] = Case(IDCConfig().epochs_of_evaluation, _arguments(classes=(10, count(1))))
    found["evaluation_epochs_of"] = Case(
        evaluation_epochs_of, _arguments(formed_per_class=(10, count(1)), classes=(10, count(1)))
    )
    found["CCMConfig.update_weight"] = Case(CCMConfig().update_weight, _arguments(step=(2, count(1))))
    found["Formation.plan"] = Case(Formation().plan, _arguments(n=(4, count(0))))
    found["Formation.count"] = Case(Formation().count, _arguments(n=(4, count(0))))
    found["Formation.cells"] = Case(Formation().cells, _arguments(factor=(2, count(1))))
    return found


__all__ = ["ANY", "cases"]
