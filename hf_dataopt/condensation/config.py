"""Settings of dataset condensation, each with its range and the place it comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack

from ..settings import LARGEST, MOST_SEED, Settings, brief, check_each, check_int, check_number, plain, settle

if TYPE_CHECKING:
    from .fields import IDCFields

_CHOICES = {
    "formation": ("single", "multi", "bound"),
    "axis": ("image", "time"),
    "initialisation": ("random", "herding", "mix", "mix_herding", "patches", "noise"),
    "network": ("convnet", "resnet_ap"),
    "match": ("gradient", "feature"),
    "metric": ("mse", "l1", "l1_mean", "cos"),
    "train_network_on": ("real", "synthetic", "nothing"),
    "storage": ("uint8", "float16", "float32"),
    "learning_rate_space": ("stored", "normalised", "first_step"),
    "dtype": ("float32", "bfloat16"),
    "image_mode": ("RGB", "L"),
}
_COUNTS: dict[str, int | tuple[int, int]] = {
    "images_per_class": 1,
    "factor": (1, 4096),
    "formed_batch": 1,
    "depth": (1, 64),
    "outer_iterations": 0,
    "inner_iterations": 1,
    "real_batch": 1,
    "network_images": 1,
    "network_batch": 1,
    "early_epochs": 0,
    "reinitialise_every": 1,
    "pretrained_networks": 0,
    "evaluation_batch": 1,
    "checkpoint_every": 1,
    "seed": (0, MOST_SEED),
    "evaluation_epochs": 1,
    "image_size": (1, 2**14),
    "patches_per_image": (1, 1000),
    "teacher_images": 1,
}
_RANGES = {
    "soft_temperature": (1e-3, 1e3),
    "learning_rate": (0.0, 1e6),
    "learning_rate_size": (1.0, 1e6),
    "momentum": (0.0, 1.0),
    "width": (1e-3, 1e5),
    "network_learning_rate": (0.0, 1e3),
    "network_momentum": (0.0, 1.0),
    "network_weight_decay": (0.0, 1.0),
    "cutmix": (0.0, 1.0),
    "evaluation_learning_rate": (0.0, 1e3),
    "evaluation_cutmix": (0.0, 1.0),
    "pad_value": (-LARGEST, LARGEST),
    "clamp_low": (-LARGEST, LARGEST),
    "clamp_high": (-LARGEST, LARGEST),
}
_TEXTS = ("augmentation", "evaluation_augmentation", "background")
_OPTIONAL = ("evaluation_epochs", "image_size", "image_mode", "clamp_low", "clamp_high")
_FLAGS = ("scale_learning_rate", "match_bias", "match_head", "normalise", "soft_labels")


@dataclass(frozen=True, kw_only=True)
class IDCConfig(Settings):
    """How a data set is condensed and how the result is scored.

    Args:
        images_per_class (`int`, >= 1, default 10): stored elements of a class.
        factor (`int`, >= 1, default 2): multi-formation factor; 1 is IDC-I.
        formation, axis, pad_value: see `Formation`; `axis="time"` for spectrograms.
        image_size (`int`, optional): side of the square that all images are brought to (shorter side resized, middle cut
            out), for photos of different sizes; None: they have one size already.
        image_mode (`str`, optional): `"RGB"` or `"L"` (grey), what all images are brought to; None: as they are, grey ones
            among colour become colour.
        background (`str`, default `"white"`): colour under transparent pixels, a name or `"#rrggbb"`.
        initialisation (`str`, default `"mix_herding"`): `"random"` real images, `"herding"` those whose running mean stays
            closest to the class mean (of a teacher's features, of pixels without one), `"mix"` factor^2 random images
            shrunk into one mosaic (equals random at factor 1), `"mix_herding"` herded ones, `"patches"` the crops that a
            teacher is surest of, `"noise"`.
        patches_per_image (`int`, default 5): crops of an image that `"patches"` chooses from.
        teacher_images (`int`, default 40,000): images shown to the teacher that is trained where none is given.
        soft_labels (`bool`, default False): add a column `soft_label` of the teacher's class shares, float16, for every cell.
        soft_temperature (`float`, default 1): of their softmax.
        network, width, depth: `"convnet"` (width in channels, 128) or `"resnet_ap"` (width as a factor, 1.0); ignored
            when the condenser is given a network factory.
        match (`str`, default `"gradient"`): `"feature"` is DM.
        metric (`str`, default `"mse"`): sum of squares, `"l1"`, `"l1_mean"` or `"cos"`; see `distance`.
        match_bias, match_head (`bool`, default False): compare vectors / the linear head too.
        learning_rate (`float`, default 0.005): of the images at 10 images per class.
        scale_learning_rate (`bool`, default True): times images_per_class / 10 and (size / `learning_rate_size`)^2.
        learning_rate_space (`str`, default `"stored"`): what the step counts in: stored values, or `"normalised"` ones,
            (x - mean) / std, as the papers of DM and DSA give it: a step there is std^2 of it here. `"first_step"`: by
            how many deviations of the data (std) the first step moves values, root mean square; its rate is kept.
        learning_rate_size (`float`, default 32): base size in pixels of that rule (28 for MNIST, 64 speech, 224 ImageNet).
        momentum (`float`, default 0.5): of the images' SGD, shared by all classes.
        outer_iterations (`int`, default 2000): network lives; `inner_iterations` (100) rounds over the classes in each.
        real_batch (`int`, default 64): real images of a class per step.
        formed_batch (`int`, default 128): most formed synthetic images of a class per step.
        augmentation (`str`, default `"color_crop_cutout"`): siamese augmentation of the match.
        train_network_on (`str`, default `"real"`): `"synthetic"` is DSA, `"nothing"` DM.
        network_images (`int`, default 500): images the network sees after each round, in batches of `network_batch` (64).
        network_learning_rate (0.01), network_momentum (0.9), network_weight_decay (5e-4): of the network's SGD.
        cutmix (`float`, [0, 1], default 0.5): probability of CutMix in a network step.
        early_epochs (`int`, default 0): epochs on real data before a new network is used.
        reinitialise_every (`int`, default 1): outer iterations a network lives.
        pretrained_networks (`int`, default 0): size of a pool of networks trained `early_epochs` once and then drawn
            from; 0 trains a new one each time.
        clamp_low, clamp_high (`float` or None, default 0 and 1): range of stored values, applied at every outer
            iteration; None: the training data's minimum for low, no bound for high.
        normalise (`bool`, default True): networks see (x - mean) / std; `mean`, `std` default to the training data's.
        storage (`str`, default `"uint8"`): 8-bit images; `"float16"`, `"float32"` arrays. Measured loss of 8 bits: none
            (digits, 1 per class, 5 seeds: 94.8 % +- 1.2 against 94.7 % +- 1.3; benchmarks/condensation_storage.py).
        evaluation_epochs (`int`, optional): default by storage, see `evaluation_epochs_of`.
        evaluation_augmentation (`str`, default `"color_crop_flip_scale_rotate"`; `"photo"`: a resized crop, a flip, jittered
            colours and light, see `photo_augment`), evaluation_cutmix (0.5), evaluation_learning_rate (0.01),
            evaluation_batch (64): the scoring recipe, shared by every method.
        dtype (`str`, default `"float32"`): `"bfloat16"` runs the networks' own updates, scoring included, under autocast; the
            match, which is of differences, and the images stay float32.
        compile (`bool` or `str`, default False): `torch.compile` the networks where they are trained, in the loop and in the
            scoring runs; a string names the backend. The match itself differentiates twice, which compiled code cannot.
        checkpoint_every (`int`, default 1): outer iterations between checkpoints.
        seed (`int`, >= 0, default 0): every random choice.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field has the wrong type.

    Source: sections 6.3-6.5 and Algorithm 5; values from the reference code's `--reproduce` tables.
    Differs: random images are drawn (the reference takes the first ones), and a run starts from herded mosaics, which end
        better than its random ones (benchmarks/README.md); `initialisation="mix"` is the reference's start.

    Example:
        >>> IDCConfig.cifar10(images_per_class=50).factor
        2
    """

    METHOD: ClassVar[str] = "IDC"
    images_per_class: int = 10
    factor: int = 2
    formation: Literal["single", "multi", "bound"] = "single"
    axis: Literal["image", "time"] = "image"
    pad_value: float = 0.5
    image_size: int | None = None
    image_mode: Literal["RGB", "L"] | None = None
    background: str = "white"
    initialisation: Literal["random", "herding", "mix", "mix_herding", "patches", "noise"] = "mix_herding"
    patches_per_image: int = 5
    teacher_images: int = 40_000
    soft_labels: bool = False
    soft_temperature: float = 1.0
    network: Literal["convnet", "resnet_ap"] = "convnet"
    width: float = 128
    depth: int = 3
    match: Literal["gradient", "feature"] = "gradient"
    metric: Literal["mse", "l1", "l1_mean", "cos"] = "mse"
    match_bias: bool = False
    match_head: bool = False
    learning_rate: float = 0.005
    scale_learning_rate: bool = True
    learning_rate_space: Literal["stored", "normalised", "first_step"] = "stored"
    learning_rate_size: float = 32
    momentum: float = 0.5
    outer_iterations: int = 2000
    inner_iterations: int = 100
    real_batch: int = 64
    formed_batch: int = 128
    augmentation: str = "color_crop_cutout"
    train_network_on: Literal["real", "synthetic", "nothing"] = "real"
    network_images: int = 500
    network_batch: int = 64
    network_learning_rate: float = 0.01
    network_momentum: float = 0.9
    network_weight_decay: float = 5e-4
    cutmix: float = 0.5
    early_epochs: int = 0
    reinitialise_every: int = 1
    pretrained_networks: int = 0
    clamp_low: float | None = 0.0
    clamp_high: float | None = 1.0
    normalise: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    storage: Literal["uint8", "float16", "float32"] = "uint8"
    evaluation_epochs: int | None = None
    evaluation_augmentation: str = "color_crop_flip_scale_rotate"
    evaluation_cutmix: float = 0.5
    evaluation_learning_rate: float = 0.01
    evaluation_batch: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool | str = False
    checkpoint_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        from ..decoding import colour_of
        from .augment import operations
        from .photo import PHOTO

        settle(
            self,
            choices=_CHOICES,
            numbers=_RANGES,
            counts=_COUNTS,
            flags=_FLAGS,
            texts=_TEXTS,
            optional=_OPTIONAL,
        )
        object.__setattr__(self, "compile", plain(self.compile))
        if not isinstance(self.compile, bool | str):
            raise TypeError(f"compile must be a bool or a backend's name, got {brief(self.compile)}")
        least = 1.0 if self.network == "convnet" else 1 / 64  # at least one channel
        check_number(
            "width", self.width, least, todo=f"it is {'channels' if least == 1 else 'a factor of 64 channels'}"
        )
        for name, low in (("mean", -LARGEST), ("std", 1e-12)):
            value = getattr(self, name)
            if value is not None:
                values = check_each(name, value, check_number, low)
                object.__setattr__(self, name, tuple(float(one) for one in values))
        if self.clamp_low is not None and self.clamp_high is not None and self.clamp_low >= self.clamp_high:
            raise ValueError(f"clamp_low must be below clamp_high, got {self.clamp_low} and {self.clamp_high}")
        if self.storage == "uint8" and (self.clamp_low, self.clamp_high) != (0.0, 1.0):
            raise ValueError(
                "storage='uint8' needs clamp_low=0 and clamp_high=1; use storage='float32' for other ranges"
            )
        operations(self.augmentation)
        if self.evaluation_augmentation != PHOTO:
            operations(self.evaluation_augmentation)
        colour_of(self.background)

    def image_learning_rate(self, height: int) -> float:
        """Step size of the images: `learning_rate` scaled by storage and size as the reference code does.

        Args:
            height: of the images in pixels.
        """
        height = check_int("height", height, 1)
        if not self.scale_learning_rate:
            return self.learning_rate
        return self.learning_rate * self.images_per_class / 10 * (height / self.learning_rate_size) ** 2

    def epochs_of_evaluation(self, classes: int) -> int:
        """Epochs of a scoring run: as set, else by the number of formed images per class."""
        from .formation import Formation

        classes = check_int("classes", classes, 1)
        if self.evaluation_epochs is not None:
            return self.evaluation_epochs
        formation = Formation(factor=self.factor, kind=self.formation, axis=self.axis)
        return evaluation_epochs_of(formation.count(self.images_per_class), classes)

    @classmethod
    def cifar10(cls, **changes: Unpack[IDCFields]) -> IDCConfig:
        """CIFAR-10 (Table 6.1)."""
        return cls(**{**_SMALL, "network_images": 2000, **_CIFAR, **changes})

    @classmethod
    def cifar100(cls, **changes: Unpack[IDCFields]) -> IDCConfig:
        """CIFAR-100: the settings of CIFAR-10, means and deviations included, as the reference code has them."""
        return cls.cifar10(**changes)

    @classmethod
    def svhn(cls, **changes: Unpack[IDCFields]) -> IDCConfig:
        """SVHN: digits, so that scoring does not flip; at factor 1 and 1 a class the scoring runs do without CutMix."""
        made = cls(**{**_SMALL, **_DIGITS, **changes})
        single = made.factor == 1 and made.images_per_class == 1 and "evaluation_cutmix" not in changes
        return replace(made, evaluation_cutmix=0.0) if single else made

    @classmethod
    def mnist(cls, **changes: Unpack[IDCFields]) -> IDCConfig:
        """MNIST: L1, learning rate 1e-4 at base size 28, no flips; with multi-formation neither cutout nor CutMix."""
        made = cls(**{**_SMALL, **_DIGITS, "metric": "l1", "learning_rate": 1e-4, "learning_rate_size": 28, **changes})
        if made.factor == 1:
            return made
        plain: dict[str, Any] = {"augmentation": "color_crop", "cutmix": 0.0, "evaluation_cutmix": 0.0}
        return replace(made, **{name: value for name, value in plain.items() if name not in changes})

    @classmethod
    def fashion_mnist(cls, **changes: Unpack[IDCFields]) -> IDCConfig:
        """Fashion-MNIST: L1, learning rate 1e-4 at base size 32."""
        return cls(**{**_SMALL, "metric": "l1", "learning_rate": 1e-4, **changes})

    @classmethod
    def imagenet_subset(cls, classes: int = 10, **changes: Unpack[IDCFields]) -> IDCConfig:
        """ImageNet-10 or ImageNet-100 at 224 pixels with ResNetAP-10 (Table 6.3), scored as photos are.

        Args:
            classes: 10 (networks trained 10 epochs first) or 100 (ten pretrained networks, 5 epochs).
            changes: fields to set.
        """
        many = check_int("classes", classes, 2) >= 100
        values: dict[str, Any] = {
            "factor": 3,
            "network": "resnet_ap",
            "width": 1.0,
            "metric": "l1",
            "learning_rate": 1e-3 if many else 3e-3,
            "learning_rate_size": 224,
            "outer_iterations": 500,
            "early_epochs": 5 if many else 10,
            "pretrained_networks": 10 if many else 0,
            "cutmix": 1.0,
            "evaluation_cutmix": 1.0,
            "evaluation_augmentation": "photo",
            "real_batch": 128 if many else 64,
            "evaluation_batch": 128 if many else 64,
            "network_batch": 128 if many else 64,
            "network_learning_rate": 0.1 if many else 0.01,
            "network_weight_decay": 1e-4 if many else 5e-4,
            "evaluation_learning_rate": 0.1 if many else 0.01,
        }
        made = cls(**{**values, **changes})
        if "formation" not in changes and made.factor >= 3 and made.images_per_class >= 20:
            return replace(made, formation="bound")
        return made

    @classmethod
    def speech(cls, **changes: Unpack[IDCFields]) -> IDCConfig:
        """Mini Speech Commands: log-spectrograms of 64 x 64, cut along time (section 6.5.2, Table 6.4)."""
        values: dict[str, Any] = {
            "axis": "time",
            "pad_value": 0.0,
            "depth": 4,
            "metric": "l1",
            "learning_rate": 3e-3,
            "learning_rate_size": 64,
            "outer_iterations": 1000,
            "augmentation": "none",
            "network_learning_rate": 3e-4,
            "cutmix": 0.0,
            "clamp_low": None,
            "clamp_high": None,
            "storage": "float32",
            "evaluation_epochs": 1000,
            "evaluation_augmentation": "none",
            "evaluation_cutmix": 0.0,
        }
        return cls(**{**values, **changes})


_SMALL: dict[str, Any] = {"evaluation_epochs": 1000}
_DIGITS: dict[str, Any] = {"evaluation_augmentation": "color_crop_scale_rotate"}
_CIFAR: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
_EPOCHS = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))


def evaluation_epochs_of(formed_per_class: int, classes: int = 10) -> int:
    """Epochs of the reference's scoring runs: fewer for larger storage; two thirds of it, to 100s, from 100 classes on.

    Example:
        >>> evaluation_epochs_of(40), evaluation_epochs_of(40, classes=100)
        (1500, 1000)
    """
    formed_per_class, classes = check_int("formed_per_class", formed_per_class, 1), check_int("classes", classes, 1)
    epochs = next((count for most, count in _EPOCHS if formed_per_class <= most), 300)
    return int(epochs * 2 / 3) // 100 * 100 if classes >= 100 else epochs
