"""A context read into a full cache, piece by piece, without masks: what is scored and evicted afterwards.

One that holds images is read in one piece, by the whole model and under its own masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .._compat import (
    CACHE_NAMES,
    cache_keyword,
    causal_model_of,
    copied_layer,
    decoder_of,
    input_device,
    last_logits,
    layer_kinds,
    takes_positions,
    text_config,
)
from ..distributed import Room, Undo
from ..errors import UnsupportedModelError
from ..progress import bar
from ..routing.attach import attach
from ..routing.cache import RoutedCache
from ..routing.dispatch import maskless, tag
from ..routing.layer_inputs import LayerInputs, listening, watch
from .attention import attend, merge
from .config import KVzipConfig
from .images import ContextImages
from .prompt import KVzipPrompt
from .rules import AttentionRules, no_autocast, same_dtype, tail_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USER = "kvzip"  # of `routing.attach`
_KEPT_KINDS = {"full", "sliding", "linear", "shared"}
# called with a layer's index and what its attention is given, (n, width), before the layer's keys are cached
OnInput = Callable[[int, torch.Tensor], None]


@dataclass
class PrefilledContext:
    """A context's full cache, before anything is evicted.

    Args:
        model: the language model that made it.
        prompt: its token sequences.
        cache: full keys and values of prefix and context, batch 1.
        scored_layers: indices of the layers that attend globally; other layers are neither scored nor evicted.
        latent: the model caches one latent a token and expands it to keys and values of all heads (MLA).
        embeddings: (1, n, width), what the decoder read, where the context holds images; None for text.
        before: (n,) int64, tokens between prefix and context of which some are evicted, and which are not scored: layers then
            hold prefix and context alone, and the rest of it as `turns.HeldLayer` has it.
    """

    model: PreTrainedModel
    prompt: KVzipPrompt
    cache: DynamicCache
    scored_layers: list[int]
    latent: bool = False
    embeddings: torch.Tensor | None = None
    before: torch.Tensor | None = None

    @property
    def n_before(self) -> int:
        """Tokens of `before`."""
        return 0 if self.before is None else self.before.numel()

    @property
    def n_prefix(self) -> int:
        """Tokens before the context."""
        return self.prompt.prefix_ids.numel()

    @property
    def n_context(self) -> int:
        """Tokens of the context."""
        return self.prompt.context_ids.numel()


def check_supported(model: Any) -> list[int]:
    """Refuse models with nothing to evict, before anything is computed; `proof.prove` tells whether the rest is exact.

    Args:
        model: a causal language model, PEFT-wrapped or not.

    Returns:
        Indices of the layers that are scored and evicted.

    Raises:
        UnsupportedModelError: no layer attends globally, or layers of a kind that KVzip does not know.
        TypeError: no language model of transformers.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(f"KVzip needs a causal language model of transformers, got {type(model).__name__}")
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"the adapter's virtual tokens ({adapter.peft_type}) stand before every prompt, where a compressed context "
                "cannot put them; use a LoRA, or a plain cache"
            )
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"KVzip compresses decoder-only models; {config.model_type} has an encoder")
    kinds = layer_kinds(config)
    scored = [index for index, kind in enumerate(kinds) if kind == "full"]
    if not scored or set(kinds) - _KEPT_KINDS:
        raise UnsupportedModelError(
            f"KVzip evicts from layers with global attention; this {config.model_type} model has {len(scored)} of them "
            f"among {len(kinds)} ({', '.join(sorted(set(kinds)))}). Load it without a sliding window, or use a plain cache"
        )
    return scored


@torch.no_grad()
def read_context(
    model: Any,
    prompt: KVzipPrompt,
    config: KVzipConfig,
    *,
    images: ContextImages | None = None,
    on_input: OnInput | None = None,
    user: str = USER,
    progress: bool = True,
) -> PrefilledContext:
    """`prefill` of a model that `check_supported` accepts, proven or not.

    Args:
        model, prompt, config, images, on_input, progress: as `prefill`.
        user: on whose behalf the model is attached.

    Returns:
        The full cache.
    """
    scored_layers = check_supported(model)
    attach(model, user)
    plain = DynamicCache(config=text_config(model))
    full: list[Any] = plain.layers
    read = [_PrefillLayer(images is not None) if i in scored_layers else layer for i, layer in enumerate(full)]
    ids, embeddings = prompt.ids.to(input_device(model))[None], None
    with hearing(model, scored_layers, on_input) as inputs:
        if images is None:
            read_text(model, ids, OwnCache(read, inputs), config.prefill_chunk_size, progress=progress)
        else:
            whole = causal_model_of(model)
            embeddings = _read_images(whole, ids, _ImageCache(read, whole, inputs), images)
    for index, layer in enumerate(read):
        if index in scored_layers:
            full[index].lazy_initialization(layer.keys, layer.values)
            full[index].keys, full[index].values = layer.keys, layer.values
        else:
            full[index] = layer
    latent = any(read[index].latent for index in scored_layers)
    return PrefilledContext(model, prompt, plain, scored_layers, latent, embeddings)


def read_text(
    model: Any,
    ids: torch.Tensor,
    cache: OwnCache,
    step: int,
    *,
    start: int = 0,
    after: Callable[[], None] = lambda: None,
    progress: bool = True,
) -> None:
    """Forwards of the decoder over ids (1, n), `step` at a time, into `cache`; `after` is called behind each piece.

    The first of the ids stands at position `start`.

    Where the device has no room for a piece, it is read in halves, quarters, ...: the same cache, up to rounding.
    """
    decoder = decoder_of(model)
    name, room = cache_keyword(decoder.forward), Room("pieces of {} tokens")
    with bar(ids.shape[1], "Prefilling", unit="tok", disable=not progress or ids.shape[1] <= step) as shown, maskless():
        for piece in ids.split(step, dim=1):

            def read(a: int, b: int, piece: torch.Tensor = piece, start: int = start) -> None:
                part = piece[:, a:b]
                decoder(input_ids=part, use_cache=True, **{name: cache}, **positions(decoder, start + a, part))

            room.parts(piece.shape[1], read, ids.device, cache.mark)
            after()
            start += piece.shape[1]
            shown.update(piece.shape[1])


def positions(decoder: Any, start: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` from `start` on: some models count from 0 whatever the cache holds."""
    if not takes_positions(decoder):
        return {}
    return {"position_ids": torch.arange(start, start + ids.shape[1], device=ids.device)[None]}


class _Heard:
    """Hands what attention is given on to whoever wants it, layer by layer."""

    def __init__(self, inputs: LayerInputs, layers: list[int], on_input: OnInput) -> None:
        self.inputs, self.layers, self.on_input = inputs, layers, on_input
        self.heard = dict.fromkeys(layers, 0)  # tokens: those of a piece that is read again are not handed on again

    def before_update(self, layer: int, start: int) -> None:
        """To be called as the layer's keys arrive, inside of its attention module, `start` tokens after the first.

        Raises:
            UnsupportedModelError: what the module was given is no hidden state of one row.
        """
        if layer not in self.layers:
            return
        given = self.inputs.take(layer)
        if given is None or given.shape[0] != 1:
            raise UnsupportedModelError(
                f"what layer {layer} of this model is given cannot be seen: its attention has no `layer_idx` or is handed no "
                "hidden states. Use KVzip without gates"
            )
        new = given[0, max(self.heard[layer] - start, 0) :].detach()
        if len(new):
            self.on_input(layer, new)
            self.heard[layer] = start + given.shape[1]


@contextmanager
def hearing(model: Any, layers: list[int], on_input: OnInput | None) -> Iterator[_Heard | None]:
    """What `OwnCache` needs to hand on the inputs of these layers; None where nobody asks."""
    if on_input is None:
        yield None
        return
    watch(decoder_of(model))
    with listening() as inputs:
        yield _Heard(inputs, layers, on_input)


class OwnCache(RoutedCache):
    """A cache of our own forwards: thrown away if one of them fails, so it needs no second copy to go back to.

    Args:
        layers: see `RoutedCache`.
        heard: from `hearing`.
    """

    atomic = False

    def __init__(self, layers: list[Any], heard: _Heard | None = None) -> None:
        super().__init__(layers)
        self.heard = heard

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """As `RoutedCache.update`."""
        if self.heard is not None:
            layer: Any = self.layers[layer_idx]
            self.heard.before_update(layer_idx, layer.get_seq_length())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def mark(self) -> Undo:
        """A way back to what the cache holds now, for after one forward that failed: layers that know `cut_back` are cut, the
        others, which are small, are copied.
        """
        layers: list[Any] = self.layers
        kept = [layer.get_seq_length() if hasattr(layer, "cut_back") else _kept(layer) for layer in layers]

        def undo() -> None:
            for layer, before in zip(layers, kept, strict=True):
                if isinstance(before, int):
                    layer.cut_back(before)
                else:
                    layer.__dict__.clear()
                    layer.__dict__.update(_kept(before).__dict__)

        return undo


def _kept(layer: Any) -> Any:
    """A copy of a layer; of a window, which is a view into a whole piece, with memory of its own."""
    copy = copied_layer(layer)
    if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None and layer.values is not None:
        copy.keys, copy.values = layer.keys.clone(), layer.values.clone()
    return copy


class _ImageCache(OwnCache):
    """The cache of one forward of a whole model; remembers what the decoder is given, which holds the images.

    Args:
        layers, heard: see `OwnCache`.
        model: for messages.
    """

    def __init__(self, layers: list[Any], model: Any, heard: _Heard | None = None) -> None:
        super().__init__(layers, heard)
        self.embeddings: torch.Tensor | None = None
        self.refusal = f"KVzip cannot compress images for {type(model).__name__}"

    def handed_on(self, kwargs: dict[str, Any]) -> None:
        """Keep the embeddings.

        Raises:
            UnsupportedModelError: the decoder reads more of the images, or otherwise, than a repeat input can say.
        """
        given, where = kwargs.get("inputs_embeds"), kwargs.get("position_ids")
        if given is None:
            raise UnsupportedModelError(f"{self.refusal}: its decoder reads ids, so no images. Use a multimodal model")
        plain = torch.arange(given.shape[1], device=given.device)
        if where is not None and not bool((where.to(plain.device) == plain).all()):
            raise UnsupportedModelError(
                f"{self.refusal}: it does not count positions token by token where there are images, and a cache of evicted "
                "pairs goes on behind the last token. Use a plain cache; text alone is compressed"
            )
        known = {"inputs_embeds", "position_ids", "attention_mask", "cache_position", *CACHE_NAMES}
        more = sorted(name for name, value in kwargs.items() if name not in known and _holds_tensors(value))
        if more:
            raise UnsupportedModelError(
                f"{self.refusal}: beside embeddings its decoder reads {', '.join(more)}, which scoring cannot repeat. Use a "
                "plain cache; text alone is compressed"
            )
        self.embeddings = given.detach()


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))


def _read_images(model: Any, ids: torch.Tensor, cache: _ImageCache, images: ContextImages) -> torch.Tensor:
    given = images.on(ids.device, model.dtype)
    model(input_ids=ids, use_cache=True, **given, **{cache_keyword(model.forward): cache}, **last_logits(model))
    if cache.embeddings is None:
        raise UnsupportedModelError(f"{cache.refusal}: it has no decoder of its own. Use a plain cache")
    return cache.embeddings


class _PrefillLayer(DynamicLayer):
    """One global layer while the context comes in pieces: a piece sees itself causally, and all before it.

    Args:
        masked: the piece sees of itself what the model's own mask says.
    """

    latent = False

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states)
        return (tag(keys, self), values) if self.latent else (tag(key_states, self), value_states)

    def cut_back(self, length: int) -> None:
        """Forget all but the first tokens."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]

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
        """Output (1, H, q, v) of one piece."""
        rules, rows = AttentionRules.of(scale, options), query.shape[2]
        cached: Any = (self.keys, self.values)
        keys, values = (key, value) if expanded else cached
        if expanded and cached[0].shape[1] != 1:
            raise ValueError(
                "the model changes the keys of several heads after they are cached, so heads cannot be told apart; use a plain "
                "cache"
            )
        self.latent = expanded
        before = keys.shape[2] - rows
        seen, causal = tail_mask(mask, rows, rows, 0, query.device) if self.masked else (None, rows > 1)
        with no_autocast(query.device):
            query, keys, values = same_dtype(query, keys, values)
            new = keys[:, :, before:], values[:, :, before:]
            result = attend(query, *new, mask=seen, causal=causal, **rules.options)
            if before:
                result = merge(attend(query, keys[:, :, :before], values[:, :, :before], **rules.options), result)
            return rules.with_sinks(result)[0]
