"""Several contexts in one cache, a row each: every row sees its own context, of its own length, and its own questions.

The pairs of all rows are one ragged context with as many heads as rows have together (section 8.4.1), so attention stays one
call a layer. Rows are padded on the left: a shorter context begins later, and positions count tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .._compat import has_states
from ..errors import DroppedTokensError, UnsupportedModelError
from ..settings import brief, check_each
from .config import KVzipConfig
from .layers import KVzipLayer, KVzipSlidingLayer
from .making import compress
from .prompt import KVzipPrompt
from .questions import ids_of_questions
from .ragged import Ragged, RaggedContext
from .ragged_attention import attend_ragged
from .rules import AttentionRules

if TYPE_CHECKING:
    from .gates import KVzipGates


@dataclass(frozen=True)
class Rows:
    """The contexts of a batch.

    Args:
        prompts: of every row.
    """

    prompts: list[KVzipPrompt]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row's prefix and context."""
        return [prompt.ids.numel() for prompt in self.prompts]

    @property
    def mask(self) -> torch.Tensor:
        """(rows, longest) int64, 0 for padding."""
        longest = max(self.lengths)
        return torch.stack([(torch.arange(longest) >= longest - length).long() for length in self.lengths])

    @property
    def ids(self) -> torch.Tensor:
        """(rows, longest) int64, padded on the left with 0."""
        return _padded([prompt.ids for prompt in self.prompts])

    def inputs(self, question: Any, tokenizer: Any, config: KVzipConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (rows, longest context + longest question) int64.

        Args:
            question: one for every row, or one `str` or message for all.
            tokenizer, config: of the cache.

        Raises:
            TypeError, ValueError: another number of questions, or one that cannot be asked.
        """
        asked = [question] * len(self.prompts) if isinstance(question, str | dict) else question
        if not isinstance(asked, list | tuple) or len(asked) != len(self.prompts):
            raise ValueError(
                f"a cache of {len(self.prompts)} contexts takes a list of as many questions, each a str, a message, a list of "
                f"messages or ids, or one str for all; got {brief(question)}"
            )
        rows = []
        for one, prompt in zip(asked, self.prompts, strict=True):
            found = ids_of_questions(one, prompt, tokenizer, config)
            if len(found) != 1:
                raise ValueError(f"each context takes one question, got {brief(one)}")
            rows += found
        questions = _padded(rows)
        real = torch.arange(questions.shape[1]) >= questions.shape[1] - torch.tensor([[len(row)] for row in rows])
        return torch.cat([self.ids, questions], dim=1), torch.cat([self.mask, real.long()], dim=1)

    def check(self, batch: int, attention_mask: Any) -> None:
        """Refuse a call whose rows or mask are not those of the contexts.

        Raises:
            DroppedTokensError: another number of rows, or a mask that does not say where each context begins.
        """
        mask, rows = self.mask, len(self.prompts)
        flat = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        fits = batch % rows == 0
        if fits and flat:
            seen = attention_mask[:, : mask.shape[1]].cpu().bool()
            fits = torch.equal(seen, mask.bool().repeat_interleave(batch // rows, dim=0))
        elif fits:
            fits = bool(mask.all())
        if not fits:
            raise DroppedTokensError(
                f"this cache holds {rows} contexts of {self.lengths} tokens, padded on the left; a call needs their rows in "
                "order and an attention mask that hides this padding: `model.generate(**cache.inputs(questions))` does it right"
            )


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    longest = max(row.numel() for row in rows)
    return torch.stack([torch.cat([row.new_zeros(longest - row.numel()), row]) for row in rows])


class KVzipRowsLayer(KVzipLayer):
    """One global-attention layer of several contexts.

    Args:
        context: of all rows, the KV heads of one after those of the other; its tokens are those of the longest.
        rows: how many.
    """

    def __init__(self, context: Ragged, rows: int) -> None:
        super().__init__(context)
        self.rows = rows

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scale: float,
        expanded: bool,
        **options: Any,
    ) -> torch.Tensor:
        """As `KVzipLayer.attend`; what a mask says of the contexts was checked by `Rows.check`."""
        n = self.context.n_tokens
        if isinstance(mask, torch.Tensor) and mask.shape[-1] == n + key.shape[2]:
            mask = mask[..., n:]
        return super().attend(query, key, value, mask, scale, expanded, **options)

    def attend_context(self, query: torch.Tensor, rules: AttentionRules) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row over its own context; rows of one context (beams) read it together."""
        batch, heads = query.shape[:2]
        alike = batch // self.rows
        by_context = query.unflatten(0, (self.rows, alike)).transpose(0, 1).flatten(1, 2)
        found = attend_ragged(by_context, self.context, **rules.options)
        output, lse = (
            one.unflatten(1, (self.rows, heads)).transpose(0, 1).reshape(batch, heads, *one.shape[2:]) for one in found
        )
        return output, lse

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As `KVzipLayer.reorder_cache`: beams of one context change places."""
        self._check(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused where contexts would be left out or change places."""
        self._check(indices)
        super().batch_select_indices(indices)

    def _check(self, order: torch.Tensor) -> None:
        alike = max(order.numel() // self.rows, 1)
        stays = torch.arange(order.numel(), device=order.device) // alike
        batch = 0 if self.keys is None else self.keys.shape[0]
        if order.numel() % self.rows or not torch.equal(order // max(batch // self.rows, 1), stays):
            raise ValueError("rows of different contexts cannot change places or be left out; make a cache of those")


def compress_rows(
    model: Any,
    tokenizer: Any,
    contexts: Any,
    config: KVzipConfig,
    gates: KVzipGates | None,
    *,
    progress: bool = True,
) -> tuple[list[Any], Rows]:
    """Layers and token sequences of several compressed contexts; arguments and errors as `KVzipCache.from_contexts`."""
    check_each("contexts", contexts, lambda name, value: value, least=1)
    if config.standing:
        raise ValueError("standing=True keeps one request within its budget; give each context a cache of its own")
    plain = replace(config, storage="model")
    made, prompts = [], []
    for context in contexts:
        layers, prompt = compress(model, tokenizer, context, plain, gates=gates, progress=progress)
        _check_layers(model, layers)
        made.append(layers)
        prompts.append(prompt)
    rows = Rows(prompts)
    return [_joined(list(layers), rows, config) for layers in zip(*made, strict=True)], rows


def _check_layers(model: Any, layers: list[Any]) -> None:
    for layer in layers:
        latent, chunked = getattr(layer, "latent", False), getattr(layer, "chunked", False)
        if latent or chunked or has_states(layer):
            kind = "latents" if latent else "attention in chunks" if chunked else "linear attention"
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers with {kind}, which contexts of different lengths cannot share; give each "
                "context a cache of its own"
            )


def _joined(layers: list[Any], rows: Rows, config: KVzipConfig) -> Any:
    """One layer of all rows."""
    total = max(rows.lengths)
    if isinstance(layers[0], KVzipLayer):
        contexts = [layer.context for layer in layers]
        keys, values = (torch.cat(parts) for parts in zip(*(one.opened() for one in contexts), strict=True))
        lengths = [length for one in contexts for length in one.lengths]
        return KVzipRowsLayer(RaggedContext(keys, values, lengths, total).stored(config.storage), len(layers))
    if not isinstance(layers[0], DynamicSlidingWindowLayer):
        return layers[0]  # reads the keys of another layer
    longest = max(layer.keys.shape[2] for layer in layers)
    joined = KVzipSlidingLayer(layers[0].sliding_window)
    joined.__dict__.update(layers[0].__dict__)
    joined.keys, joined.values = (
        torch.cat([torch.nn.functional.pad(one, (0, 0, longest - one.shape[2], 0)) for one in parts])
        for parts in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
    )
    joined.cumulative_length = total
    return joined
