"""What gates are fitted to: hidden states that attention is given on some texts, and the logarithm of KVzip's scores there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._compat import input_device, text_config
from ..checkpoint import PassCheckpoint
from ..progress import bar, say
from ..seeding import generator
from ..settings import check_each, check_text
from .config import KVzipConfig
from .prefill import prefill
from .prompt import KVzipPrompt, build_prompt
from .reading import check_supported
from .scoring import score_context

# budgets that are looked at: cuts of the loss, and agreement that is told
BUDGETS = (0.5, 0.3, 0.2, 0.1)
# lowest logarithm that is learned: pairs below are evicted at any budget, and how far below tells nothing
_FLOOR = -9.0
_ROOM = 0.7  # share of an accelerator's free memory that inputs may take


@dataclass
class Read:
    """One text, or some tokens of one.

    Args:
        inputs: (layers, n, width) float16, what every scored layer's attention was given.
        scores: (layers, n, heads) float32, logarithms of KVzip's scores, from `_FLOOR` on.
        cuts: (budgets,) float32, the lowest logarithm that stays of the whole text at each of `BUDGETS`.
    """

    inputs: Tensor
    scores: Tensor
    cuts: Tensor


@dataclass
class Tokens:
    """Tokens of all texts that are learned from, and the order in which they are served.

    Args:
        inputs: (layers, count, width) float16, where they are computed with if there is room.
        scores: (layers, count, heads) float32, cuts: (count, budgets) float32, as in `Read`.
        order: (count,) int64.
    """

    inputs: Tensor
    scores: Tensor
    cuts: Tensor
    order: Tensor

    @classmethod
    def of(cls, texts: list[Read], seed: int, device: torch.device) -> Tokens:
        """All of them; `texts` is emptied, so that nothing is in memory twice."""
        lengths = [one.inputs.shape[1] for one in texts]
        layers, _, width = texts[0].inputs.shape
        count, heads = sum(lengths), texts[0].scores.shape[2]
        where = _place(device, count * layers * (2 * width + 4 * heads))
        found = cls(
            torch.empty(layers, count, width, dtype=torch.float16, device=where),
            torch.empty(layers, count, heads, device=where),
            torch.empty(count, len(BUDGETS), device=where),
            torch.randperm(count, generator=generator(seed, epoch=2)).to(where),
        )
        while texts:
            end = sum(lengths[: len(texts)])
            one = texts.pop()
            at = slice(end - one.inputs.shape[1], end)
            found.inputs[:, at], found.scores[:, at], found.cuts[at] = one.inputs, one.scores, one.cuts
        return found

    @property
    def count(self) -> int:
        """Tokens."""
        return self.order.numel()

    def some(self, count: int) -> Tokens:
        """The first of them in the order of serving."""
        at = self.order[:count].sort().values
        order = torch.searchsorted(at, self.order[:count])
        return Tokens(self.inputs[:, at], self.scores[:, at], self.cuts[at], order)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (layers, size, width) float32, scores (layers, size, heads) and cuts (size, budgets) of one step."""
        at = step * size % (self.count - size + 1)
        chosen = self.order[at : at + size]
        return self.inputs[:, chosen].float(), self.scores[:, chosen], self.cuts[chosen]

    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every input of every layer, (layers, 1, width); one layer at a time in float32."""
        means, spreads = [], []
        for layer in self.inputs:
            given = layer.float()
            means.append(given.mean(0))
            spreads.append(given.std(0, correction=0))
        return torch.stack(means)[:, None], torch.stack(spreads)[:, None] + 1e-4


@dataclass
class ReadTexts:
    """All texts.

    Args:
        fitted: tokens that are learned from.
        held: texts that were held back, whole.
        key: what they depend on, for checkpoints.
        about: the score, numbers of texts and tokens, and their hash.
    """

    fitted: Tokens
    held: list[Read]
    key: dict[str, str]
    about: dict[str, Any]


def read_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    scoring: KVzipConfig,
    *,
    held_share: float,
    most_tokens: int,
    seed: int,
    made_by: str,
    folder: Path | None = None,
    progress: bool = True,
) -> ReadTexts:
    """Read every text as a context, score it by KVzip, and hold some of them back.

    Args:
        model, tokenizer: the language model.
        texts: at least two.
        scoring: how texts are read and scored.
        held_share: of the texts, at least one.
        most_tokens: that are learned from; of more, every text gives an equal random share.
        seed: of which texts are held back, which tokens are learned from, and their order.
        made_by: hash of the model's weights, for checkpoints.
        folder: of checkpoints; None keeps none.
        progress: show a bar and an estimate.

    Raises:
        ValueError, TypeError: fewer than two texts, or one that cannot be a context.
    """
    prompts = _prompts(tokenizer, texts, scoring)
    order = torch.randperm(len(prompts), generator=generator(seed, epoch=1)).tolist()
    n_held = min(max(round(len(prompts) * held_share), 1), len(prompts) - 1)
    is_held = set(order[:n_held])
    total = sum(prompt.context_ids.numel() for index, prompt in enumerate(prompts) if index not in is_held)
    share = min(most_tokens / total, 1.0)
    keys = [{"model": made_by, "text": _hash(prompt), "scoring": scoring.to_json_string()} for prompt in prompts]
    _estimate(model, prompts, share, progress)
    read: dict[int, Read] = {}
    with bar(sum(prompt.ids.numel() for prompt in prompts), "Scoring texts", unit="tok", disable=not progress) as shown:
        for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            path = None if folder is None else folder / f"scores-{index:04}.safetensors"
            n, chosen = prompt.context_ids.numel(), None
            if share < 1 and index not in is_held:
                drawn = torch.randperm(n, generator=generator(seed, epoch=3, worker=index))
                chosen = drawn[: max(round(n * share), 1)].sort().values
            read[index] = _read(model, prompt, scoring, PassCheckpoint(path, key), chosen)
            shown.update(prompt.ids.numel())
    held, fitted = [read[i] for i in order[:n_held]], [read[i] for i in order[n_held:]]
    del read
    about: dict[str, Any] = {
        "score": scoring.score,
        "texts": len(fitted),
        "tokens": sum(one.inputs.shape[1] for one in fitted),
        "held_texts": n_held,
        "held_tokens": sum(one.inputs.shape[1] for one in held),
        "texts_hash": hashlib.blake2b(" ".join(key["text"] for key in keys).encode(), digest_size=16).hexdigest(),
    }
    key = {**keys[0], "text": str(about["texts_hash"])}
    return ReadTexts(Tokens.of(fitted, seed, input_device(model)), held, key, about)


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


def _estimate(model: Any, prompts: list[KVzipPrompt], share: float, progress: bool) -> None:
    if not progress:
        return
    layers, tokens = len(check_supported(model)), sum(prompt.ids.numel() for prompt in prompts)
    size = layers * tokens * share * text_config(model).hidden_size * 2 / 1e9
    say(
        f"Fitting gates of {layers} layers on {len(prompts)} texts of {tokens:,} tokens: about as long as reading them three "
        f"times, and {size:.1f} GB of inputs in memory"
    )


def _read(
    model: Any, prompt: KVzipPrompt, scoring: KVzipConfig, checkpoint: PassCheckpoint, chosen: Tensor | None
) -> Read:
    """Inputs of one text, or of the chosen tokens of it, and their scores: from the checkpoint, or made now."""
    pieces: dict[int, list[Tensor]] = {}

    def on_input(layer: int, given: Tensor) -> None:
        pieces.setdefault(layer, []).append(given.float().clamp(-6e4, 6e4).to(torch.float16))

    prefilled = prefill(model, prompt, scoring, on_input=on_input, progress=False)
    first = pieces[prefilled.scored_layers[0]][0].device
    at = torch.arange(prefilled.n_context) if chosen is None else chosen
    places = (at + prefilled.n_prefix).to(first)
    inputs = [torch.cat(pieces.pop(layer)).to(first)[places] for layer in prefilled.scored_layers]
    heads = prefilled.cache.layers[prefilled.scored_layers[0]].keys.shape[1]  # type: ignore[union-attr]
    found = checkpoint.load(1, {"scores": torch.empty(len(inputs), heads, prefilled.n_context)})
    scores = found[1]["scores"] if found else score_context(prefilled, scoring, progress=False).float().cpu()
    if not found:
        checkpoint.save(1, {"scores": scores}, force=True)
    logs = scores.transpose(1, 2).clamp_min(1e-12).log().clamp_min(_FLOOR)
    ranked = logs.flatten().sort(descending=True).values
    cuts = torch.stack([ranked[max(int(ranked.numel() * budget) - 1, 0)] for budget in BUDGETS])
    return Read(torch.stack(inputs).cpu(), logs[:, at].contiguous(), cuts)


def _place(device: torch.device, size: int) -> torch.device:
    """Where so many bytes are kept: on an accelerator that has room for them, else in the host's memory."""
    if device.type == "cuda" and size < _ROOM * torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu")
