"""Fitting gates to KVzip's own scores on texts: read, score, learn, and hold some texts back to see what was learnt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._compat import input_device, text_config
from ..checkpoint import PassCheckpoint
from ..progress import bar, say
from ..seeding import generator
from ..settings import MOST_SEED, Settings, check_each, check_text, settle
from .config import KVzipConfig
from .eviction import keep_mask
from .gate_network import GateWeights, gate_scores
from .prefill import prefill
from .prompt import KVzipPrompt, build_prompt
from .reading import check_supported
from .scoring import score_context

# budgets at which agreement is told
TOLD = (0.5, 0.3, 0.2, 0.1)
# lowest logarithm that is learned: pairs below are evicted at any budget, and how far below tells nothing
_FLOOR = -9.0
_WARM_UP = 0.1  # share of the steps
_SECONDS = 20.0  # between two checkpoints of the steps


@dataclass(frozen=True, kw_only=True)
class GateConfig(Settings):
    """How gates are fitted.

    Args:
        hidden (`int`, >= 1, default 48): hidden units of each layer's gate.
        steps (`int`, >= 1, default 400): steps of AdamW.
        tokens_per_step (`int`, >= 1, default 512): tokens of every step; each serves the gates of all layers.
        learning_rate (`float`, in (0, 1], default 3e-3): highest, after a tenth of the steps; it falls to zero as a cosine.
        weight_decay (`float`, in [0, 1], default 0.01): of the weights, not of biases.
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
    held_share: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        rates = ("learning_rate", "weight_decay", "held_share")
        settle(
            self,
            counts={"hidden": 1, "steps": 1, "tokens_per_step": 1, "seed": (0, MOST_SEED)},
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


@dataclass
class _Read:
    """One text: what every scored layer's attention was given, and KVzip's scores of its pairs.

    Args:
        inputs: (layers, n, width) float16.
        scores: (layers, n, heads) float32, logarithms from `_FLOOR` to 0.
    """

    inputs: Tensor
    scores: Tensor


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
    prompts = _prompts(tokenizer, texts, scoring)
    order = torch.randperm(len(prompts), generator=generator(config.seed, epoch=1)).tolist()
    n_held = min(max(round(len(prompts) * config.held_share), 1), len(prompts) - 1)
    keys = [{"model": made_by, "text": _hash(prompt), "scoring": scoring.to_json_string()} for prompt in prompts]
    _estimate(model, prompts, progress)
    read = []
    with bar(sum(prompt.ids.numel() for prompt in prompts), "Scoring texts", unit="tok", disable=not progress) as shown:
        for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            path = None if folder is None else folder / f"scores-{index:04}.safetensors"
            read.append(_read(model, prompt, scoring, PassCheckpoint(path, key)))
            shown.update(prompt.ids.numel())
    held, fitted = [read[i] for i in order[:n_held]], [read[i] for i in order[n_held:]]
    path = None if folder is None else folder / "gates.safetensors"
    all_texts = hashlib.blake2b(" ".join(key["text"] for key in keys).encode(), digest_size=16).hexdigest()
    key = {**keys[0], "text": all_texts, "settings": config.to_json_string()}
    weights, before = _train(
        fitted, held, config, PassCheckpoint(path, key, _SECONDS), input_device(model), progress=progress
    )
    about = {
        "texts": len(prompts) - n_held,
        "tokens": sum(one.inputs.shape[1] for one in fitted),
        "held_texts": n_held,
        "held_tokens": sum(one.inputs.shape[1] for one in held),
        "texts_hash": all_texts,
        "loss": [round(before, 4), round(_held_loss(weights, held), 4)],
        "agreement": {str(ratio): round(_agreement(weights, held, ratio), 4) for ratio in TOLD},
    }
    return GateFit(weights, about)


def _prompts(tokenizer: Any, texts: Sequence[str], scoring: KVzipConfig) -> list[KVzipPrompt]:
    prompts = []
    # one of them is held back
    for index, text in enumerate(check_each("texts", texts, check_text, least=2)):
        try:
            prompts.append(build_prompt(tokenizer, text, scoring))
        except ValueError as error:
            raise ValueError(f"text {index}: {error}") from error
    return prompts


def _hash(prompt: KVzipPrompt) -> str:
    """Of all that is read and repeated."""
    parts = (prompt.ids, prompt.suffix_ids, prompt.first_repeat_ids, prompt.next_repeat_ids)
    return hashlib.blake2b(b"|".join(part.numpy().tobytes() for part in parts), digest_size=16).hexdigest()


def _estimate(model: Any, prompts: list[KVzipPrompt], progress: bool) -> None:
    if not progress:
        return
    layers, tokens = len(check_supported(model)), sum(prompt.ids.numel() for prompt in prompts)
    size = layers * tokens * text_config(model).hidden_size * 2 / 1e9
    say(
        f"Fitting gates of {layers} layers on {len(prompts)} texts of {tokens:,} tokens: about as long as reading them three "
        f"times, and {size:.1f} GB of inputs in memory"
    )


def _read(model: Any, prompt: KVzipPrompt, scoring: KVzipConfig, checkpoint: PassCheckpoint) -> _Read:
    """Inputs of one text, and its scores: from the checkpoint, or made now."""
    pieces: dict[int, list[Tensor]] = {}

    def on_input(layer: int, given: Tensor) -> None:
        pieces.setdefault(layer, []).append(given.float().clamp(-6e4, 6e4).to(torch.float16).cpu())

    prefilled = prefill(model, prompt, scoring, on_input=on_input, progress=False)
    inputs = torch.stack([torch.cat(pieces[layer]) for layer in prefilled.scored_layers])[:, prefilled.n_prefix :]
    heads = prefilled.cache.layers[prefilled.scored_layers[0]].keys.shape[1]  # type: ignore[union-attr]
    like = {"scores": torch.empty(len(inputs), heads, prefilled.n_context)}
    found = checkpoint.load(1, like)
    scores = found[1]["scores"] if found else score_context(prefilled, scoring, progress=False).float().cpu()
    if not found:
        checkpoint.save(1, {"scores": scores}, force=True)
    return _Read(inputs.contiguous(), scores.transpose(1, 2).clamp_min(1e-12).log().clamp_min(_FLOOR))


def _loss(weights: GateWeights, inputs: Tensor, scores: Tensor) -> Tensor:
    """Mean squared error."""
    return (gate_scores(weights, inputs) - scores).square().mean()


def _train(
    fitted: list[_Read],
    held: list[_Read],
    config: GateConfig,
    checkpoint: PassCheckpoint,
    device: torch.device,
    *,
    progress: bool,
) -> tuple[GateWeights, float]:
    """Weights for plain inputs, and the loss of held texts before the first step."""
    tokens = _Tokens.of(fitted, config.seed)
    layers, _, width = fitted[0].inputs.shape
    mean, spread = _scale(fitted)
    scores = torch.cat([one.scores for one in fitted], dim=1)
    level, scale = float(scores.mean()), float(scores.std(correction=0)) + 1e-4
    start = GateWeights.start(layers, width, config.hidden, scores.shape[2], generator(config.seed))
    before = _held_loss(start.on_plain(mean, spread, level, scale), held)
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
            given, wanted = tokens.batch(step, size)
            given, wanted = given.sub_(mean).div_(spread), wanted.sub_(level).div_(scale)
            loss = _loss(weights, given.to(device), wanted.to(device))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(step / config.steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            checkpoint.save(step + 1, _state(tensors, optimizer), force=step + 1 == config.steps)
            shown.update(1)
    weights = GateWeights(**{name: tensor.detach().cpu() for name, tensor in tensors.items()})
    return weights.on_plain(mean, spread, level, scale), before


@dataclass
class _Tokens:
    """Tokens of all texts in one random order; the texts stay where they are.

    Args:
        texts: what was read.
        starts: first number of every text's tokens, when all are counted through.
        order: (count,) the numbers as they are served.
    """

    texts: list[_Read]
    starts: list[int]
    order: Tensor

    @classmethod
    def of(cls, texts: list[_Read], seed: int) -> _Tokens:
        lengths = [one.inputs.shape[1] for one in texts]
        starts = [sum(lengths[:index]) for index in range(len(lengths))]
        return cls(texts, starts, torch.randperm(sum(lengths), generator=generator(seed, epoch=2)))

    @property
    def count(self) -> int:
        return self.order.numel()

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs (layers, size, width) float32 and scores (layers, size, heads) of one step."""
        at = step * size % (self.count - size + 1)
        chosen, inputs, scores = self.order[at : at + size], [], []
        for one, start in zip(self.texts, self.starts, strict=True):
            own = chosen[(chosen >= start) & (chosen < start + one.inputs.shape[1])] - start
            inputs.append(one.inputs[:, own].float())
            scores.append(one.scores[:, own])
        return torch.cat(inputs, dim=1), torch.cat(scores, dim=1)


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


def _scale(texts: list[_Read]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every input of every layer, (layers, 1, width); one layer at a time in float32."""
    means, spreads = [], []
    for index in range(len(texts[0].inputs)):
        layer = torch.cat([one.inputs[index] for one in texts]).float()
        means.append(layer.mean(0))
        spreads.append(layer.std(0, correction=0))
    return torch.stack(means)[:, None], torch.stack(spreads)[:, None] + 1e-4


@torch.no_grad()
def _held_loss(weights: GateWeights, held: list[_Read]) -> float:
    """Mean loss of held texts."""
    return sum(float(_loss(weights, one.inputs.float(), one.scores)) for one in held) / len(held)


@torch.no_grad()
def _agreement(weights: GateWeights, held: list[_Read], ratio: float) -> float:
    """Share of the pairs that KVzip keeps of held texts which the gates keep too, at one `keep_ratio`."""
    config, shares = KVzipConfig(keep_ratio=ratio), []
    for one in held:
        ours = keep_mask(gate_scores(weights, one.inputs.float()), config)
        theirs = keep_mask(one.scores, config)
        shares.append(float((ours & theirs).sum() / theirs.sum()))
    return sum(shares) / len(shares)
