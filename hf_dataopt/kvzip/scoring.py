"""How much each context pair matters: a pass over the model shows each layer's attention to a score (`scores/`).

By default the context is repeated chunk by chunk, and the score is the maximum attention (Eq. 8.2 of section 8.3.2, chunks and
prompts of section 8.3.4, Figure 8.7).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .._compat import cache_keyword, copied_layer, decoder_of, input_device, last_block, layer_kinds, text_config
from ..distributed import Room
from ..errors import UnsupportedModelError
from ..progress import bar
from ..routing.attach import attach
from ..routing.dispatch import maskless
from ..routing.layer_inputs import LayerInputs, listening, watch
from ..routing.verdicts import evaluating
from ..settings import brief, check_config, check_flag, check_kind
from ..text.positions import positions_alike
from .config import KVzipConfig
from .passes import AllSeen, PassCache, PassLayer, View
from .reading import USER, PrefilledContext, positions
from .rules import AttentionRules, no_autocast
from .score import Positions, Score, ScoredLayer
from .scores import score_of

logger = logging.getLogger(__name__)

# tokens; smaller chunks than this are not repeated for the sake of positions
_LEAST_CHUNK = 64


@torch.no_grad()
def score_context(
    prefilled: PrefilledContext, config: KVzipConfig | None = None, *, user: str = USER, progress: bool = True
) -> torch.Tensor:
    """Importance of every context pair, by default the most attention it receives while the model repeats the context.

    Args:
        prefilled: the full cache; left exactly as it is.
        config: the score; chunk size, overlap, replay and the key set of the softmax.
        user: on whose behalf the model is attached.
        progress: show a bar.

    Returns:
        (scored layers, KV heads, context tokens) float32, higher stays; for KVzip in [0, 1].

    Raises:
        UnsupportedModelError: the score needs something that cannot be seen in this model.
        ValueError: a context that was used up, or a score of one's own that gives no finite (KV heads, n).

    Source: Eq. 8.2; chunks and repeat prompts of section 8.3.4.
    Differs: the softmax runs over prefix, chunk and repeat input as in the reference code (Eq. 8.2 says all keys:
        `softmax_keys="all"`), in float32 whatever the model's dtype, with the model's own logit scale. Images are repeated
        by the embeddings that were read, and causally, also where the model reads them in both directions (Gemma 3).
    Cost: with m = chunk size, the linear layers of (1 + prompt / m) forwards over the context and O(n^2) attention
        (`replay="exact"`) or O(n m) (`"local"`); memory O(m) beside the cache, whatever the context length. Scores that look
        at the context's own queries: one forward over it in one piece, or over the last of its tokens. Where the device has
        no room for a forward, it comes in halves, quarters, ...: the same scores, up to rounding; not with gradients.
    """
    config, progress = check_config(config, KVzipConfig), check_flag("progress", progress)
    check_kind("prefilled", prefilled, PrefilledContext, "give what prefill returned")
    layers: list[Any] = prefilled.cache.layers
    first = layers[prefilled.scored_layers[0]].keys
    if first is None:
        raise ValueError("this prefilled context was used up by free=True; prefill again")
    shape = (len(prefilled.scored_layers), first.shape[1], prefilled.n_context)
    run = _Run(prefilled, score_of(config.score), torch.full(shape, float("-inf"), device=first.device))
    attach(prefilled.model, user)
    with maskless(), evaluating(run.decoder), run.listening():
        if run.looks_at == "nothing":
            run.without_queries()
        elif run.looks_at == "context":
            run.read_again()
        else:
            run.repeat(config, progress)
    return run.scores


class _Run:
    """One scoring of one context.

    Args:
        prefilled: the full cache.
        score: a `Score`, or a function of the same arguments.
        scores: (scored layers, KV heads, context tokens) float32, to be filled.
    """

    def __init__(self, prefilled: PrefilledContext, score: Any, scores: torch.Tensor) -> None:
        self.prefilled, self.score, self.scores = prefilled, score, scores
        self.decoder = decoder_of(prefilled.model)
        self.looks_at = getattr(score, "looks_at", Score.looks_at)
        self.gradients = getattr(score, "gradients", Score.gradients)
        self.modules = getattr(score, "modules", Score.modules)
        self.inputs: LayerInputs | None = None
        # by layer, what a `PassCache` heard; the cache itself, whose layers know this run, would close a cycle
        self.given: dict[int, tuple[Any, torch.Tensor]] = {}
        self.kept: dict[int, list[tuple[Any, ...]]] = {}  # by look, what waits for later parts or for gradients
        what = "a repeat input" if self.looks_at == "repeat" else "the context, read again"
        self.room = Room(f"parts of {{}} tokens of {what}")
        self.waits, self.looks = False, 0  # whether scores are asked later, and looks within one forward
        self.view, self.where = View(0, [], [], (0, 0)), torch.empty(0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what attention modules are given, where the score needs it."""
        if not self.modules and not self.gradients:
            yield
            return
        block = last_block(self.decoder)
        watch(self.decoder, *([] if block is None else [block]), outputs=self.gradients)
        with listening() as self.inputs:
            yield

    def repeat(self, config: KVzipConfig, progress: bool) -> None:
        """Chunk by chunk, each seen by its repeat input (Figure 8.7)."""
        prefilled, prompt = self.prefilled, self.prefilled.prompt
        total, chunk = prompt.ids.numel(), fitting_chunk(prefilled, config)
        with bar(prefilled.n_context, "Scoring", unit="tok", disable=not progress) as shown:
            for start, end, ids in prompt.repeat_inputs(chunk, config.overlap, prefilled.before):
                first, after = prefilled.n_prefix + start, prefilled.n_prefix + end
                local, keys = config.replay == "local", config.softmax_keys
                view = View.of_chunk(prefilled.n_prefix, first, after, total, local=local, softmax_keys=keys)
                if prefilled.n_before:
                    view = replace(view, skipped=prefilled.n_before, rest=not local)
                ids = ids.to(input_device(prefilled.model))[None]
                given = repeated(prefilled, start, end, ids)
                self._pass(view, self._copies, given, total + prefilled.n_before)
                shown.update(end - start)

    def read_again(self) -> None:
        """The context's own queries, all of them or the last ones, from one forward over it."""
        prefilled, n_prefix = self.prefilled, self.prefilled.n_prefix
        total, last = prefilled.prompt.ids.numel(), getattr(self.score, "last", None)
        start = n_prefix if last is None else max(total - last, n_prefix)
        if len(prefilled.scored_layers) < len(self._fresh()):  # windows and states cannot be taken back to the middle
            start = 0
        ids = prefilled.prompt.ids[start:].to(input_device(prefilled.model))[None]
        embedded = prefilled.embeddings
        given = {"input_ids": ids} if embedded is None else {"inputs_embeds": embedded[:, start:]}
        self._pass(View.of_context(start, n_prefix, total), self._fresh, given, start)

    def without_queries(self) -> None:
        """Keys, values and their places alone."""
        self.view = View.of_context(self.prefilled.n_prefix, self.prefilled.n_prefix, self.prefilled.prompt.ids.numel())
        for index in self.prefilled.scored_layers:
            layer: Any = self.prefilled.cache.layers[index]
            keys, values = (part[0, :, self.prefilled.n_prefix :] for part in (layer.keys, layer.values))
            none = keys.new_zeros(1, keys.shape[0], 0, keys.shape[-1])
            self.where = torch.empty(0, dtype=torch.int64, device=keys.device)
            self.look(index, none, none[..., 0].float(), keys, values, AttentionRules(keys.shape[-1] ** -0.5))

    def _copies(self) -> list[Any]:
        layers: list[Any] = self.prefilled.cache.layers
        return [copied_layer(layer) for layer in layers]

    def _fresh(self) -> list[Any]:
        layers: list[Any] = DynamicCache(config=text_config(self.prefilled.model)).layers
        return layers

    def _pass(self, view: View, layers: Callable[[], list[Any]], given: dict[str, torch.Tensor], start: int) -> None:
        """The decoder over tokens that stand from `start` on, at once or in parts; `layers` serve where nothing is scored."""
        total = next(iter(given.values())).shape[1]

        def forward(size: int) -> None:
            in_parts = size < total
            self.view, self.kept, self.waits = view, {}, in_parts or self.gradients
            cache = PassCache(self._shown(layers(), in_parts), self.inputs)
            self.given = cache.given
            for at in range(0, total, size):
                self._forward(cache, {name: one[:, at : at + size] for name, one in given.items()}, start + at)

        if self.gradients:
            forward(total)
            self._differentiate()
        else:
            self.room.attempt(forward, total, self.scores.device)
        for parts in self.kept.values():
            self._ask(*_whole(parts))
        self.kept = {}

    def _shown(self, layers: list[Any], in_parts: bool) -> list[Any]:
        """The layers with those that are scored in their places."""
        prefilled, scored = self.prefilled, self.prefilled.scored_layers
        # layers that share keys may read them after the layer that wrote them
        kinds = layer_kinds(text_config(prefilled.model))
        shared = "shared" in kinds or len(kinds) < text_config(prefilled.model).num_hidden_layers
        for index in scored:
            last = index == scored[-1] and not shared and not self.gradients
            full = prefilled.cache.layers[index]
            layers[index] = PassLayer(full, index, prefilled.latent, self.view, self.look, last, in_parts)
        return layers

    def _forward(self, cache: PassCache, given: dict[str, torch.Tensor], start: int) -> None:
        """One forward of the decoder over tokens that stand from `start` on."""
        one = next(iter(given.values()))
        self.where = torch.arange(start, start + one.shape[1], device=one.device)
        name, where = cache_keyword(self.decoder.forward), positions(self.decoder, start, one)
        self.looks = 0
        if self.inputs is not None:
            self.inputs.outputs = {} if self.gradients else None
        with contextlib.suppress(AllSeen), torch.set_grad_enabled(self.gradients):
            self.decoder(**given, use_cache=True, **{name: cache}, **where)

    def look(
        self,
        index: int,
        query: torch.Tensor,
        lse: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rules: AttentionRules,
    ) -> None:
        """One layer's attention; see `passes.Look`."""
        a, b = self.view.scored
        at = self.where.to(query.device)
        counted = slice(0, None)
        if self.looks_at == "context":  # forwards over models with windows or states begin with the prompt
            last = getattr(self.score, "last", None)
            least = self.prefilled.n_prefix if last is None else max(b - last, self.prefilled.n_prefix)
            counted = slice(max(least - int(at[0]), 0), None)
        module, given = self.given.pop(index, (None, None))
        if (self.modules or self.gradients) and module is None:
            raise UnsupportedModelError(
                f"what layer {index} of this model is given cannot be seen: its attention has no `layer_idx` or is handed no "
                "hidden states. Use score='kvzip'"
            )
        scored = self.prefilled.scored_layers
        layer = ScoredLayer(
            index=index,
            place=scored.index(index),
            count=len(scored),
            rules=rules,
            lse=lse[0][:, counted],
            decoder=self.decoder,
            module=module,
            given=None if given is None else given[counted],
        )
        places = torch.arange(a, b, device=at.device) + self.prefilled.n_before
        shown = (query[0][:, counted], keys, values, Positions(at[counted], places))
        if self.waits:
            self.kept.setdefault(self.looks, []).append((layer, *shown))
            self.looks += 1
        else:
            self._ask(layer, *shown)

    def _differentiate(self) -> None:
        """Gradients of the squared last hidden states by what each layer's attention wrote, for the layers that wait."""
        outputs = {} if self.inputs is None or self.inputs.outputs is None else self.inputs.outputs
        end = outputs.get(last_block(self.decoder))
        layers = [layer for ((layer, *_),) in self.kept.values()]
        written = [
            one for one in (outputs.get(layer.module) for layer in layers) if one is not None and one.requires_grad
        ]
        if end is None or not end.requires_grad or len(written) < len(layers):
            raise UnsupportedModelError(
                "what the layers of this model give cannot be differentiated here (no weights that require gradients, "
                "or layers that cannot be seen); use score='kvzip'"
            )
        found = torch.autograd.grad(end, written, grad_outputs=2 * end.detach())
        for place, gradient in zip(self.kept, found, strict=True):
            [(layer, *shown)] = self.kept[place]
            norms = gradient[0].detach().float().norm(dim=-1)
            self.kept[place] = [(replace(layer, gradient=norms), *shown)]
        if self.inputs is not None:
            self.inputs.outputs = None

    def _ask(
        self, layer: ScoredLayer, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, where: Positions
    ) -> None:
        """Call the score and put what it says where it belongs."""
        with no_autocast(keys.device):
            found = self.score(layer, queries, keys, values, where)
        name = getattr(self.score, "__name__", type(self.score).__name__)
        expected = tuple(keys.shape[:2])
        if not isinstance(found, torch.Tensor) or tuple(found.shape) != expected or not found.is_floating_point():
            raise ValueError(f"score {name} must give floats (KV heads, n) = {expected}, got {brief(found)}")
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"score {name} gave NaN or infinity for layer {layer.index}; scores must be finite")
        if self.prefilled.latent:  # all heads read the one latent
            found = found.amax(dim=0, keepdim=True)
        start, end = (one - self.prefilled.n_prefix for one in self.view.scored)
        target = self.scores[layer.place, :, start:end]
        # layers that share these keys score them together
        target.copy_(torch.maximum(target, found.detach().to(target)))


def _whole(parts: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """What a score is shown of one layer, from what was shown of it part by part."""
    layers, queries, _, _, where = zip(*parts, strict=True)
    _, _, keys, values, last = parts[-1]
    given = None if layers[0].given is None else torch.cat([layer.given for layer in layers])
    layer = replace(layers[0], lse=torch.cat([layer.lse for layer in layers], dim=1), given=given)
    return (
        layer,
        torch.cat(queries, dim=1),
        keys,
        values,
        Positions(torch.cat([one.queries for one in where]), last.keys),
    )


def repeated(prefilled: PrefilledContext, start: int, end: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the decoder is given for the repeat input of one chunk.

    Args:
        prefilled: the full cache.
        start, end: the chunk, in context tokens.
        ids: (1, q) int64, its repeat input.

    Returns:
        `input_ids`; or, for a context with images, `inputs_embeds` (1, q, width), in which all that repeats the context is
        embedded as it was read.
    """
    if prefilled.embeddings is None:
        return {"input_ids": ids}
    prompt, length = prefilled.prompt, ids.shape[1]
    first = prompt.next_repeat_ids.numel() if start else 0
    overlap = length - first - prompt.suffix_ids.numel() - (end - start) if start else 0
    places = [(first, start - overlap, start), (length - (end - start), start, end)]
    words = ids.clone()
    for at, a, b in places:
        words[:, at : at + b - a] = 0  # placeholders may lie outside the vocabulary
    embedded = decoder_of(prefilled.model).get_input_embeddings()(words)
    read = prefilled.embeddings[:, prefilled.n_prefix :].to(embedded)
    for at, a, b in places:
        embedded[:, at : at + b - a] = read[:, a:b]
    return {"inputs_embeds": embedded}


def fitting_chunk(prefilled: PrefilledContext, config: KVzipConfig) -> int:
    """Chunk size at which replay positions stay inside those the model was made for, as far as that is possible.

    Replays stand behind the whole context. Rotary embeddings that change with the length (dynamic, longrope) would turn the
    replay's queries otherwise than the cached keys, and learned positions end.

    Returns:
        `chunk_size`, or less where the context leaves less room; a chunk of 64 tokens at least (a warning says so).
    """
    prompt = prefilled.prompt
    total = prompt.ids.numel() + prefilled.n_before
    limit = positions_alike(text_config(prefilled.model), total)
    if limit is None:
        return config.chunk_size
    overlap = min(config.overlap, config.chunk_size, prefilled.n_context)
    words = max(prompt.first_repeat_ids.numel(), prompt.next_repeat_ids.numel() + overlap) + prompt.suffix_ids.numel()
    chunk = min(config.chunk_size, prefilled.n_context)
    room = limit - total - words
    if chunk <= room:
        return config.chunk_size
    if room >= min(_LEAST_CHUNK, chunk):
        logger.info("chunks of %d tokens instead of %d, so that replays end before position %s", room, chunk, limit)
        return room
    warnings.warn(
        f"{total} tokens of context leave {max(room, 0)} of the model's {limit} positions for repeating it: "
        "scores come from positions it was not trained on; use a shorter context",
        stacklevel=5,
    )
    return config.chunk_size
