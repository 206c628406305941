"""A context read piece by piece and cut after each: what is held never exceeds the budget by more than a piece.

A pair's score does not change with what comes later, so the best pairs of all that was read, cut again after every piece, are
the best pairs of the whole context: the running threshold makes the global cut of section 8.4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from .._compat import chunked_attention, input_device, text_config
from ..routing.attach import attach
from .attention import attend
from .config import KVzipConfig
from .layers import KVzipLayer, kept_layer
from .live import Budget, Keep, keep_live, kept_rows
from .prompt import KVzipPrompt
from .proof import Proof
from .quantised import Storage
from .ragged import RaggedContext
from .reading import USER, OwnCache, check_supported, hearing, read_text
from .rules import AttentionRules, no_autocast, same_dtype, tail_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# (place among the scored layers, what attention is given (n, width)) to scores (KV heads, n), higher stays
Score = Callable[[int, torch.Tensor], torch.Tensor]
# a token budget in pieces: one of them beside the budget, and half of the one layer that is being cut, stay below 1.5 budgets
# for contexts of up to as many budgets as half the model has layers, however the budget spreads over these
_PIECES = 5


@torch.no_grad()
def read_within_budget(
    model: PreTrainedModel,
    prompt: KVzipPrompt,
    config: KVzipConfig,
    proof: Proof,
    score: Score,
    *,
    progress: bool = True,
) -> list[Any]:
    """Read a context of text and evict as it is read.

    Args:
        model: a proven model in evaluation mode.
        prompt: the token sequences.
        config: the budget, with level `"pair"` or `"pair-uniform"`.
        proof: what was found on the model.
        score: importance of the pairs of one layer, from what its attention is given.
        progress: show a bar.

    Returns:
        One cache layer per layer of the model, as `layers.compressed_layers` makes them.

    Raises:
        ValueError: a budget that the prefix alone exceeds, or scores with NaN or infinity.

    Source: section 8.4.1, with scores that need no second pass.
    Differs: pieces behind the first are read with the evicted pairs out of sight.
    Cost: a prefill; keys and values of the budget, of one piece (`prefill_chunk_size` tokens, with `max_kv_tokens` a fifth of
        it at most), and half a layer more while that is cut.
    """
    scored = check_supported(model)
    attach(model, USER)
    n, n_prefix = prompt.ids.numel(), prompt.prefix_ids.numel()
    budget = Budget.of(config, n - n_prefix, n_prefix, len(scored) * proof.shapes[scored[0]][0])
    step = config.prefill_chunk_size
    if config.max_kv_tokens is not None and not budget.everything:
        step = min(step, max(config.max_kv_tokens // _PIECES, 1))
    layers: list[Any] = list(DynamicCache(config=text_config(model)).layers)
    streams = [_Stream(proof.shapes[index], proof.latent) for index in scored]
    for index, stream in zip(scored, streams, strict=True):
        layers[index] = stream

    def on_input(layer: int, given: torch.Tensor) -> None:
        place = scored.index(layer)
        streams[place].expect(score(place, given), n_prefix)

    def fold(keep: Keep) -> None:
        for stream, kept in zip(streams, keep, strict=True):
            stream.fold(kept)

    def cut() -> None:
        fold(budget.keep([stream.scores for stream in streams]))

    ids = prompt.ids.to(input_device(model))[None]
    with hearing(model, scored, on_input) as heard:
        read_text(model, ids, OwnCache(layers, heard), step, after=cut, progress=progress)
    if config.ties == "reference":
        fold(keep_live([stream.scores for stream in streams], config, n - n_prefix, n_prefix))
    chunked = chunked_attention(text_config(model))
    return [
        layer.done(config.storage) if isinstance(layer, _Stream) else kept_layer(layer, chunked) for layer in layers
    ]


class _Stream(KVzipLayer):
    """A global layer while its context is read: what was kept of earlier pieces, and the piece that is being read.

    Args:
        shape: heads, key width, value width.
        latent: see `KVzipLayer`.
    """

    context: RaggedContext  # what a piece brings is cut before anything is quantised

    def __init__(self, shape: tuple[int, int, int], latent: bool) -> None:
        heads, keys, values = shape
        super().__init__(RaggedContext(torch.empty(0, keys), torch.empty(0, values), [0] * heads, 0), latent)
        self.scores: list[torch.Tensor] = [torch.empty(0)] * heads  # of the kept pairs, then of the piece too

    def expect(self, scores: torch.Tensor, n_prefix: int) -> None:
        """Scores (KV heads, n) of the piece that is about to be read."""
        if not torch.isfinite(scores).all():
            raise ValueError("scores hold NaN or infinity; fit the gates again or check the model's weights")
        scores = scores.float().clone()
        start = self.context.n_tokens + len(self.scores[0]) - self.context.lengths[0]
        scores[:, : max(n_prefix - start, 0)] = torch.inf
        self.scores = [torch.cat([old.to(new.device), new]) for old, new in zip(self.scores, scores, strict=True)]

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
        """As `KVzipLayer.attend`; the first piece sees itself alone."""
        if self.context.n_tokens:
            return super().attend(query, key, value, mask, scale, expanded, **options)
        rules = AttentionRules.of(scale, options)
        with no_autocast(query.device):
            query, key, value = same_dtype(query, key, value)
            mask, causal = tail_mask(None, query.shape[2], key.shape[2], 0, query.device)  # a piece may come in parts
            return rules.with_sinks(attend(query, key, value, mask=mask, causal=causal, **rules.options))[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `KVzipLayer.update`."""
        if not self.context.n_tokens:  # nothing is known of devices and dtypes before
            self.context = RaggedContext(
                key_states.new_empty(0, key_states.shape[3]),
                value_states.new_empty(0, value_states.shape[3]),
                self.context.lengths,
                0,
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def cut_back(self, length: int) -> None:
        """Forget all but the first tokens; what was heard of the others stays, and is not heard again."""
        n = length - self.context.n_tokens
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :n], self.values[:, :, :n]

    def done(self, storage: Storage) -> KVzipLayer:
        """The layer of a compressed cache, once everything is read; this one is used up."""
        context, scores = self.context.stored(storage), [row.cpu() for row in self.scores]
        del self.context, self.scores
        return KVzipLayer(context, self.latent, scores)

    def fold(self, keep: list[torch.Tensor]) -> None:
        """Make what stays of context and piece the context; `keep` (pairs,) bool per head, in order of position."""
        n_tokens, before, device = self.get_seq_length(), self.context.lengths, self.context.keys.device
        self.scores = [scores[kept.to(scores.device)] for scores, kept in zip(self.scores, keep, strict=True)]
        lengths, keep = [len(scores) for scores in self.scores], [kept.to(device) for kept in keep]
        old = {"keys": self.context.keys, "values": self.context.values}
        piece = {"keys": self.keys, "values": self.values}
        empty = {name: part.new_empty(0, part.shape[1]) for name, part in old.items()}
        self.context = RaggedContext(**empty, lengths=[0] * len(before), n_tokens=n_tokens)
        self.reset()
        # old keys are gone before values are copied: half a layer exists twice, never a whole one
        made = {name: kept_rows(old.pop(name), before, piece.pop(name), keep, lengths) for name in ("keys", "values")}
        self.context = RaggedContext(**made, lengths=lengths, n_tokens=n_tokens)
