"""Unlimited text with a bounded cache: [attention sink | compressed memory | recent tokens] (Figures 7.8 and 7.9)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch.nn import functional

from .._compat import causal_model_of, input_device, text_config
from ..settings import (
    check_each,
    check_flag,
    check_int,
    check_path,
    check_tensor,
    check_tokenizer,
    optional,
)
from ..text.chat import ChatFormat
from ..text.positions import warn_beyond_positions
from .active import ccm_config, check_still_active
from .cache import MemoryCache, read_behind
from .config import stream_sizes
from .memory import CompressedContextMemory
from .proof import prove
from .rotation import Rotation
from .saved_memory import Pushed, layers_of, load_memory, read_chat, save_memory
from .turns import encode_turn, is_said

if TYPE_CHECKING:
    from ..publishing.hub import HubOptions

Layers = list[tuple[torch.Tensor, torch.Tensor]]
_SIZES = ("max_kv", "compress_tokens", "memory_size", "sink", "compress")
_STATE = ("memory_slots", "_virtual_slots", "tokens_seen")


class StreamingContextMemory(Pushed):
    """Reads a stream; once the cache is full, the oldest recent tokens become compression tokens of the memory.

    Positions are those inside the cache, from 0, re-assigned after every compression; the memory is first in, first out.

    Args:
        model (`PeftModel`): with an active `CCMConfig` adapter of a concat memory.
        tokenizer (`PreTrainedTokenizerBase`, optional): for text.
        max_kv (`int`, tokens, default the adapter's `stream`, else 160): size of the cache; one more token is held for the
            moment it takes to compress. compress_tokens (`int`, default likewise, else 64): tokens per compression.
        memory_size (`int`, slots, default likewise, else 8): compressed slots at most. sink (`int`, tokens, default likewise,
            else 1): first tokens kept.
        compress (`bool`, default `True`): False drops tokens instead, with the same cache size at every step (StreamingLLM).
        template_kwargs (`dict`, optional), system (`str`, optional), special_tokens_in_text (`bool`, default `False`): for
            `perplexity` of text and messages, see `ChatFormat`. A saved stream keeps them.

    Raises:
        ValueError: sizes that do not fit together, a merge memory, or rotary positions that cannot be re-assigned.
        UnsupportedModelError: a model with sliding-window layers.

    Source: section 7.4, "Streaming with sliding window"; sizes as there.

    Example:
        >>> stream = StreamingContextMemory(adapted, tokenizer, max_kv=24, compress_tokens=8, memory_size=8)
        >>> stream.perplexity(context) > 1
        True
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_kv: int | None = None,
        compress_tokens: int | None = None,
        memory_size: int | None = None,
        sink: int | None = None,
        compress: bool = True,
        template_kwargs: dict[str, Any] | None = None,
        system: str | None = None,
        special_tokens_in_text: bool = False,
    ) -> None:
        self.model, self.config = model, ccm_config(model)
        self.tokenizer = optional(check_tokenizer, "tokenizer", tokenizer)
        if self.config.merges:
            raise ValueError("streaming works on concat memories: a merged key has no position to re-assign")
        given = {"max_kv": max_kv, "compress_tokens": compress_tokens, "memory_size": memory_size, "sink": sink}
        given = {name: size for name, size in given.items() if size is not None}
        sizes = stream_sizes({**(self.config.stream or {}), **given}, self.config.num_comp_tokens)
        self.max_kv, self.compress_tokens = sizes["max_kv"], sizes["compress_tokens"]
        self.memory_size, self.sink = sizes["memory_size"], sizes["sink"]
        self.compress = check_flag("compress", compress)
        self.chat = ChatFormat(
            template_kwargs=template_kwargs, system=system, special_tokens_in_text=special_tokens_in_text
        )
        self._rotary = Rotation(model)
        prove(model, self.config, CompressedContextMemory)
        most = self.max_kv + self.config.num_comp_tokens + 1
        warn_beyond_positions(text_config(causal_model_of(model)), most, f"a stream with max_kv {self.max_kv}")
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self._layers: Layers = []
        self.memory_slots = 0
        self._virtual_slots = 0  # slots that a compressing stream would hold (compress=False)
        self.tokens_seen = 0

    def save_pretrained(self, folder: str | Path, *, adapter: str | None = None, license: str | None = None) -> None:
        """Write the stream as it stands, which model and adapter wrote it, and a card.

        Args:
            folder: made if missing.
            adapter: Hub name of the adapter, for the code on the card.
            license: of what was said, if it may be shared; otherwise the card names none.
        """
        tensors: dict[str, torch.Tensor] = {}
        for index, (keys, values) in enumerate(self._layers):
            tensors |= {f"cache.{index}.keys": keys, f"cache.{index}.values": values}
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        settings = {name.lstrip("_"): getattr(self, name) for name in (*_SIZES, *_STATE)} | self.chat.to_dict()
        sizes = (1, self.memory_slots // self.config.num_comp_tokens, self.tokens_seen, nbytes)
        card = {"adapter": adapter, "license": license}
        save_memory(check_path("folder", folder), "streaming_memory", self.model, tensors, settings, sizes, card)

    @classmethod
    def from_pretrained(
        cls, model: Any, source: str | Path, tokenizer: Any = None, **hub: Unpack[HubOptions]
    ) -> StreamingContextMemory:
        """Read what `save_pretrained` wrote, from a folder or the Hub; the stream goes on where it stood.

        Args:
            model: with the adapter that wrote it.
            source: folder or Hub name.
            tokenizer: for text.
            hub: `revision`, `token`.

        Raises:
            ValueError: no stream there, or one that another model or adapter wrote.
        """
        proof = prove(model, ccm_config(model), CompressedContextMemory)
        shapes = proof.shapes if proof else ()
        tensors, settings = load_memory(model, source, "streaming_memory", shapes, **hub)
        names = [name.lstrip("_") for name in (*_SIZES, *_STATE)]
        if any(isinstance(settings.get(name), bool) != (name == "compress") for name in names) or not all(
            isinstance(settings.get(name), int) and settings[name] >= 0 for name in names
        ):
            raise ValueError(f"{source} lacks sizes of the stream, or has wrong ones; save it again")
        stream = cls(model, tokenizer, **{name: settings[name] for name in _SIZES})
        stream._layers, stream.chat = layers_of(tensors, "cache"), read_chat(settings, source)
        for name in _STATE:
            setattr(stream, name, settings[name.lstrip("_")])
        unused = stream._virtual_slots if stream.compress else stream.memory_slots
        wrong = (
            any(not name.startswith("cache.") for name in tensors),
            stream.size > stream.max_kv,
            stream.memory_slots + stream.sink > max(stream.size, stream.sink),
            max(stream.memory_slots, stream._virtual_slots) > stream.memory_size or unused > 0,
            stream.tokens_seen < stream.size or bool(stream.tokens_seen) != bool(stream.size),
        )
        if any(wrong):
            raise ValueError(f"{source} holds {stream.size} slots, which do not fit its sizes; save it again")
        return stream

    @property
    def size(self) -> int:
        """Slots in the cache."""
        return self._layers[0][0].shape[2] if self._layers else 0

    @torch.no_grad()
    def feed(self, ids: Any) -> torch.Tensor:
        """Read more of the stream.

        Args:
            ids: (n,) int64, or what `CompressedContextMemory.append` takes of one user: text, a message, messages.

        Returns:
            (n, vocabulary) logits, each from what the cache held when its token came.

        Raises:
            ValueError: no tokens, or another adapter is active.
        """
        check_still_active(self.model, self.config)
        if is_said(ids):
            ids = encode_turn(self.tokenizer, ids, not self.tokens_seen, self.chat)
        if not isinstance(ids, torch.Tensor):
            ids = torch.tensor(check_each("ids", ids, check_int), dtype=torch.int64)
        tokens = check_tensor("ids", ids, floating=None).to(input_device(self.model))
        if tokens.ndim != 1 or tokens.numel() == 0:
            raise ValueError(f"a stream is fed 1-D, non-empty ids, got shape {tuple(tokens.shape)}")
        limit = (self.config.comp_token_ids or [0])[0]
        if tokens.is_floating_point() or not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            raise ValueError(f"a stream is fed whole ids in [0, {limit - 1}], got {tokens.min()} to {tokens.max()}")
        parts, start = [], 0
        while start < tokens.numel():
            if self.size > self.max_kv:  # an interrupt came before it was compressed
                self._shrink()
            piece = tokens[start : start + self.max_kv + 1 - self.size]
            logits, cache = self._forward(piece, self._layers)
            self._layers = cache.tail(cache.get_seq_length())
            self.tokens_seen += piece.numel()
            parts.append(logits[0])
            if self.size > self.max_kv:
                self._shrink()
            start += piece.numel()
        return torch.cat(parts)

    def perplexity(self, text: Any) -> float:
        """exp of the mean next-token loss over a text (or messages, or ids), read as one fresh stream.

        Raises:
            ValueError: fewer than two tokens.
        """
        ids = torch.tensor(encode_turn(self.tokenizer, text, True, self.chat))
        if ids.numel() < 2:
            raise ValueError("perplexity needs at least two tokens")
        self.reset()
        total = 0.0
        for start in range(0, ids.numel() - 1, 1024):  # logits of a piece at a time
            targets = ids[start + 1 : start + 1025]
            logits = self.feed(ids[start : start + targets.numel()]).float()
            total += float(functional.cross_entropy(logits, targets.to(logits.device), reduction="sum"))
        return math.exp(total / (ids.numel() - 1))

    def _forward(self, ids: torch.Tensor, layers: Layers) -> tuple[torch.Tensor, MemoryCache]:
        """Logits (B, n, vocabulary) of ids (n,), the same for all B texts of the cache, or (B, n)."""
        cache = MemoryCache(layers)
        past = cache.memory_length
        cache.memory_length = min(past, self.sink + self.memory_slots)
        rows = ids.expand(layers[0][0].shape[0] if layers else 1, -1) if ids.ndim == 1 else ids
        positions = torch.arange(past, past + rows.shape[1], device=ids.device).expand_as(rows)
        mask = torch.ones(len(rows), past + rows.shape[1], dtype=torch.int64, device=ids.device)
        return read_behind(self.model, cache, rows, mask, positions).logits, cache

    def _shrink(self) -> None:
        """Turn the oldest recent tokens into memory, drop the oldest memory, close the gap in positions."""
        n_tok, head = self.config.num_comp_tokens, self.sink + self.memory_slots
        end, size = head + self.compress_tokens, self.size
        grown = min(max(self.memory_slots, self._virtual_slots) + n_tok, self.memory_size)
        if self.compress:
            comp = torch.tensor(self.config.comp_token_ids, device=self._layers[0][0].device)
            _, cache = self._forward(comp, [(k[:, :, :end], v[:, :, :end]) for k, v in self._layers])
            new = cache.tail(n_tok)
            memory = [*range(self.sink, head), *range(size, size + n_tok)][-grown:]
            layers = [
                (torch.cat([k, h[0]], 2), torch.cat([v, h[1]], 2)) for (k, v), h in zip(self._layers, new, strict=True)
            ]
            kept = [*range(self.sink), *memory, *range(end, size)]
            # a compression token stands behind the compressed ones, not behind the whole cache
            stands = [end + slot - size if slot >= size else slot for slot in kept]
            counts = (grown, self._virtual_slots)
        else:
            layers = self._layers
            gone = self.compress_tokens - (grown - self._virtual_slots)
            kept = [*range(self.sink), *range(self.sink + gone, size)]
            stands = kept
            counts = (self.memory_slots, grown)
        index = torch.tensor(kept, device=layers[0][0].device)
        shift = torch.arange(len(kept), device=index.device) - torch.tensor(stands, device=index.device)
        moved = [(self._rotary(number, k[:, :, index], shift), v[:, :, index]) for number, (k, v) in enumerate(layers)]
        self._layers, (self.memory_slots, self._virtual_slots) = moved, counts
