"""Fitting gates to KVzip's own scores on texts: read, score, learn, and hold some texts back to see what was learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .._compat import input_device
from ..checkpoint import PassCheckpoint
from ..progress import bar
from ..seeding import generator
from ..settings import MOST_SEED, Settings, settle
from .config import KVzipConfig
from .eviction import keep_mask
from .gate_network import GateWeights, gate_scores
from .gate_reading import BUDGETS, Read, ReadTexts, read_texts

_WARM_UP = 0.1  # share of the steps
_SECONDS = 20.0  # between two checkpoints of the steps
_SOFT = 0.25  # deviations of the scores


@dataclass(frozen=True, kw_only=True)
class GateConfig(Settings):
    """How gates are fitted.

    Args:
        hidden (`int`, >= 1, default 48): hidden units of each layer's gate.
        steps (`int`, >= 1, default 400): steps of AdamW.
        tokens_per_step (`int`, >= 1, default 512): tokens of every step; each serves the gates of all layers.
        learning_rate (`float`, in (0, 1], default 3e-3): highest, after a tenth of the steps; it falls to zero as a cosine.
        weight_decay (`float`, in [0, 1], default 0.01): of the weights, not of biases.
        loss (`str`, default `"squared"`): `"squared"` error of the logarithms, or `"cut"`: a pair on the wrong side of what its
            text keeps at 0.5, 0.3, 0.2 and 0.1 costs its distance to that cut, softened.
        most_tokens (`int`, >= 1, default 250000): that are learned from and held in memory; where the texts have more, every
            text gives an equal random share, so that more texts make for more variety at the same size.
        held_share (`float`, in (0, 1), default 0.15): share of the texts that is held back, at least one.
        seed (`int`, >= 0, default 0): of the weights, of the order of tokens, and of which texts are held back.

    Raises:
        ValueError: a field is out of its range.
        TypeError: a field has the wrong type.
    """

    METHOD: ClassVar[str] = "gate"
    hidden: int = 48
    steps: int = 400
    tokens_per_step: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    loss: Literal["squared", "cut"] = "squared"
    most_tokens: int = 250_000
    held_share: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        rates = ("learning_rate", "weight_decay", "held_share")
        settle(
            self,
            choices={"loss": tuple(LOSSES)},
            counts={"hidden": 1, "steps": 1, "tokens_per_step": 1, "most_tokens": 1, "seed": (0, MOST_SEED)},
            numbers=dict.fromkeys(rates, (0, 1)),
            above=("learning_rate", "held_share"),
            below=("held_share",),
        )


@dataclass
class GateFit:
    """What came out of a fit.

    Args:
        weights: for plain inputs.
        about: texts, tokens and their hash; loss of held texts before and after; agreement with KVzip on them, by budget.
    """

    weights: GateWeights
    about: dict[str, Any]


def fit_gates(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    config: GateConfig,
    scoring: KVzipConfig,
    *,
    made_by: str,
    folder: Path | None = None,
    progress: bool = True,
) -> GateFit:
    """Score the texts with KVzip and fit one gate per layer to the logarithm of its scores, by squared error.

    Args:
        model, tokenizer: the language model.
        texts: at least two, each read as one context.
        config: size and training.
        scoring: how texts are read and scored.
        made_by: hash of the model's weights, for checkpoints.
        folder: of checkpoints; None keeps none.
        progress: show bars and the estimate.

    Returns:
        The weights and what is known of them.

    Raises:
        ValueError, TypeError: fewer than two texts, or one that cannot be a context.
    """
    read = read_texts(
        model,
        tokenizer,
        texts,
        scoring,
        held_share=config.held_share,
        most_tokens=config.most_tokens,
        seed=config.seed,
        made_by=made_by,
        folder=folder,
        progress=progress,
    )
    return fit_read(read, config, input_device(model), folder=folder, progress=progress)


def fit_read(
    read: ReadTexts, config: GateConfig, device: torch.device, *, folder: Path | None = None, progress: bool = True
) -> GateFit:
    """Fit gates to texts that were read and scored already, so that several settings share them.

    Args:
        read: the texts.
        config: size and training.
        device: to compute on.
        folder: of checkpoints; None keeps none.
        progress: show a bar.

    Returns:
        As `fit_gates`.
    """
    path = None if folder is None else folder / "gates.safetensors"
    key = {**read.key, "settings": config.to_json_string()}
    weights, before = _train(read, config, PassCheckpoint(path, key, _SECONDS), device, progress=progress)
    after, agreement = _judged(weights, read.held, device)
    shares = {str(budget): round(share, 4) for budget, share in zip(BUDGETS, agreement, strict=True)}
    about = {**read.about, "loss": [round(before, 4), round(after, 4)], "agreement": shares}
    return GateFit(weights, about)


def _squared(found: Tensor, scores: Tensor, cuts: Tensor) -> Tensor:
    """Mean squared error of scores (layers, n, heads), whatever the cuts."""
    return (found - scores).square().mean()


def _cut(found: Tensor, scores: Tensor, cuts: Tensor) -> Tensor:
    """Mean over pairs and cuts (n, budgets): distance of the score to the cut, times how far it is found on its wrong side."""
    total = torch.zeros((), device=found.device)
    for cut in cuts.T[:, None, :, None]:
        beyond = scores - cut
        total = total + (beyond.abs() * F.softplus((cut - found) * beyond.sign() / _SOFT)).mean()
    return _SOFT * total / cuts.shape[1]


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"squared": _squared, "cut": _cut}


def _train(
    read: ReadTexts, config: GateConfig, checkpoint: PassCheckpoint, device: torch.device, *, progress: bool
) -> tuple[GateWeights, float]:
    """Weights for plain inputs, and the loss of held texts before the first step."""
    tokens, loss_of = read.fitted, LOSSES[config.loss]
    layers, _, width = tokens.inputs.shape
    mean, spread = tokens.scale()
    level, scale = float(tokens.scores.mean()), float(tokens.scores.std(correction=0)) + 1e-4
    start = GateWeights.start(layers, width, config.hidden, tokens.scores.shape[2], generator(config.seed))
    before, _ = _judged(start.on_plain(mean.cpu(), spread.cpu(), level, scale), read.held, device)
    tensors = {name: tensor.to(device) for name, tensor in start.tensors.items()}
    found = checkpoint.load(config.steps, _state(tensors, None))
    done, saved = found or (0, {})
    for name, tensor in tensors.items():
        tensor.copy_(saved.get(name, tensor)).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [one for name, one in tensors.items() if "bias" not in name],
                "weight_decay": config.weight_decay,
            },
            {"params": [one for name, one in tensors.items() if "bias" in name], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    for name, tensor in tensors.items() if done else ():
        moments = {kind: saved[f"{name}.{kind}"].to(device) for kind in _MOMENTS}
        optimizer.state[tensor] = {"step": torch.tensor(float(done)), **moments}
    size, weights = min(config.tokens_per_step, tokens.count), GateWeights(**tensors)
    with bar(config.steps, "Fitting gates", disable=not progress) as shown, torch.enable_grad():
        shown.update(done)
        for step in range(done, config.steps):
            given, wanted, cuts = tokens.batch(step, size)
            given = given.sub_(mean).div_(spread).to(device)
            wanted, cuts = (one.sub_(level).div_(scale).to(device) for one in (wanted, cuts))
            loss = loss_of(gate_scores(weights, given), wanted, cuts)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(step / config.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            checkpoint.save(step + 1, _state(tensors, optimizer), force=step + 1 == config.steps)
            shown.update(1)
    weights = GateWeights(**{name: tensor.detach().cpu() for name, tensor in tensors.items()})
    return weights.on_plain(mean.cpu(), spread.cpu(), level, scale), before


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _state(tensors: dict[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
    """Weights and their moments by name; without an optimizer, tensors of the same shapes."""
    found = {name: tensor.detach() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        moments = optimizer.state[tensor] if optimizer is not None else dict.fromkeys(_MOMENTS, tensor.detach())
        found |= {f"{name}.{kind}": moments[kind] for kind in _MOMENTS}
    return found


def _rate(share: float) -> float:
    """Warm-up, then a cosine to zero."""
    if share < _WARM_UP:
        return (share + 1e-2) / (_WARM_UP + 1e-2)
    return 0.5 * (1 + math.cos(math.pi * (share - _WARM_UP) / (1 - _WARM_UP)))


@torch.no_grad()
def _judged(weights: GateWeights, held: list[Read], device: torch.device) -> tuple[float, list[float]]:
    """Of held texts: mean squared error, and for each budget the share of KVzip's pairs that the gates keep too."""
    there = GateWeights(**{name: tensor.to(device) for name, tensor in weights.tensors.items()})
    losses, shares = [], []
    for one in held:
        found, wanted = gate_scores(there, one.inputs.to(device).float()), one.scores.to(device)
        losses.append(float((found - wanted).square().mean()))
        for budget in BUDGETS:
            config = KVzipConfig(keep_ratio=budget)
            theirs = keep_mask(wanted, config)
            shares.append(float((keep_mask(found, config) & theirs).sum() / theirs.sum()))
    return sum(losses) / len(held), torch.tensor(shares).reshape(len(held), -1).mean(0).tolist()
