"""Online inference: compress each new context, keep the compression tokens' keys and values, answer from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from .._compat import causal_model_of, input_device, last_logits, positions_of, text_config
from ..routing.inputs import CallInputs
from ..settings import brief, check_each, check_int, check_path, check_tokenizer, optional
from ..text.chat import ChatFormat
from ..text.positions import warn_beyond_positions
from .active import ccm_config, check_still_active
from .cache import CompressingCache, MemoryCache, read_behind
from .proof import prove
from .saved_memory import Pushed, joined, load_memory, read_chat, save_memory
from .slots import Layers, average, check_max_slots, cleared, nbytes_of, oldest_merged
from .turns import answer_prompt, awaits_answer, encode_turn, is_one, left_padded, split

if TYPE_CHECKING:
    from transformers.generation.utils import GenerateOutput

    from ..publishing.hub import HubOptions

_MOST_USERS = 2**16


class CompressedContextMemory(Pushed):
    """Mem(t) of one user, or of a batch of users with different numbers of steps.

    Eq. 7.1 to 7.3: `append` computes h(t) and updates Mem(t); `generate` answers from Mem(t) alone.

    Args:
        model (`PeftModel`): with an active `CCMConfig` adapter.
        tokenizer (`PreTrainedTokenizerBase`, optional): needed where contexts or questions are text or messages.
        batch_size (`int`, default 1): users in this memory.
        template_kwargs (`dict`, optional), system (`str`, optional), special_tokens_in_text (`bool`, default `False`): see
            `ChatFormat`; the system message stands before the first message. Give the collator the same. A saved memory
            keeps them.
        max_slots (`int`, optional): slots of a user and layer at most, sink apart, a multiple of `num_comp_tokens`; only for
            a memory that grows. Where a context would be one too many, the two oldest groups become one, the mean of the
            contexts it stands for (Eq. 7.2's merge over these). A saved memory keeps it.

    Attributes:
        peak_kv_bytes: largest sum of the keys and values held, those just made to be kept, and those of the layer that attends
            to most: while c(t) is compressed, its own exist in one layer at a time, not in all.
        peak_slots: most slots of one user in one layer: memory, and the tokens of the call.

    Raises:
        ValueError: the active adapter is not a CCM adapter.
        UnsupportedModelError: a probe on first use of the model's class found that its memory would not be exact.
        TypeError: template arguments that are not JSON.

    Source: section 7.3.1, Eq. 7.1 to 7.3.
    Cost: memory of t * num_comp_tokens slots (concat) or num_comp_tokens slots (merge) per layer and head.

    Example:
        >>> memory = CompressedContextMemory(adapted, tokenizer)  # `get_peft_model(base, CCMConfig())`
        >>> memory.append("Anna lives in Oslo.")
        >>> memory.nbytes < memory.full_nbytes
        True
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 1,
        template_kwargs: dict[str, Any] | None = None,
        system: str | None = None,
        special_tokens_in_text: bool = False,
        max_slots: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, optional(check_tokenizer, "tokenizer", tokenizer)
        self.config = ccm_config(model)
        batch_size = check_int("batch_size", batch_size, 1, _MOST_USERS)
        self.max_slots = check_max_slots(self.config, max_slots)
        self.chat = ChatFormat(
            template_kwargs=template_kwargs, system=system, special_tokens_in_text=special_tokens_in_text
        )
        proof = prove(model, self.config, type(self))
        self._shapes = proof.shapes if proof else ()
        self._warned = False
        self._start(batch_size)

    def _start(self, batch_size: int) -> None:
        device = input_device(self.model)
        self._layers: Layers = []  # [sink | memory]
        self._held = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        self.steps = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._text = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._history: list[list[int]] = [[] for _ in range(batch_size)]
        self._before: dict[str, Any] | None = None
        self.peak_kv_bytes = 0
        self.peak_slots = 0

    @property
    def batch_size(self) -> int:
        """Users in this memory."""
        return len(self.steps)

    @property
    def tokens_seen(self) -> list[int]:
        """Context tokens compressed so far, per user."""
        return self._text.tolist()

    @property
    def layers(self) -> Layers:
        """Per layer keys and values (B, KV heads, slots, d) of Mem(t), sink left out, keys after RoPE."""
        return [(keys[:, :, self._sinks :], values[:, :, self._sinks :]) for keys, values in self._layers]

    @property
    def _sinks(self) -> int:
        return int(self.config.sink and bool(self._layers))

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, sink included."""
        return nbytes_of(self._layers)

    @property
    def full_nbytes(self) -> int:
        """Bytes that the keys and values of all context tokens seen would take without compression."""
        slots = self._held.numel()
        return nbytes_of(self.layers) * int(self._text.sum()) // slots if slots else 0

    def reset(self, users: Sequence[int] | None = None) -> None:
        """Forget everything; the memory is as it was before the first `append`.

        Args:
            users: forget these users (from 0) only; their keys and values are zeroed. Forks keep what they have.

        Raises:
            ValueError: no such user.
        """
        given = range(self.batch_size) if users is None else check_each("users", users, check_int)
        chosen = sorted(set(given))
        if not all(0 <= user < self.batch_size for user in chosen):
            raise ValueError(f"users must be in [0, {self.batch_size - 1}], got {brief(chosen)}")
        if len(chosen) == self.batch_size:
            self._start(self.batch_size)
            return
        self._before = None
        gone = torch.zeros_like(self.steps, dtype=torch.bool)
        gone[chosen] = True
        self._held = self._held & ~gone[:, None]
        used = self._held.any(0)
        slots = torch.cat([used.new_ones(self._sinks), used]).nonzero()[:, 0]
        self._layers = [(cleared(keys, gone, slots), cleared(values, gone, slots)) for keys, values in self._layers]
        self._held = self._held[:, used]
        self.steps, self._text = self.steps.masked_fill(gone, 0), self._text.masked_fill(gone, 0)
        self._history = [[] if user in chosen else row for user, row in enumerate(self._history)]
        if not bool((self.steps > 0).any()):
            self._layers, self._held = [], self._held[:, :0]

    @torch.no_grad()
    def append(self, context: Any) -> None:
        """Compress one more context c(t) and update the memory.

        Args:
            context: one user: `str`, message (`{"role", "content"}`), a list of messages (ONE context of all of them, one
                compression) or ids (list or 1-D tensor); a content may be text parts. Several users: a list of these, one
                per user; None where a user has nothing new.

        Raises:
            ValueError: an empty context, ids outside the vocabulary, or another number of users.
            TypeError: neither text, messages nor ids.

        Warns once (`UserWarning`) when contexts and question need more positions than the model has. A context that alone
        needs more is split into several of equal length, each with slots of its own (not for gist, which has one group).
        """
        rows, before = self._rows(context), self._state()
        if self.config.memory != "gist":
            self._take_in_all(split(rows, positions_of(text_config(causal_model_of(self.model))), self.config), before)
            return
        if any(row is None for row in rows):
            raise ValueError("a gist memory is made anew at every step: every user needs a context")
        again = CompressedContextMemory(self.model, batch_size=self.batch_size)
        again._warned, again.tokenizer, again.chat = self._warned, self.tokenizer, self.chat
        again._history = [[*old, *(row or [])] for old, row in zip(self._history, rows, strict=True)]
        again._take_in(list(again._history))
        again._count_peak(self.peak_slots, max(self.peak_kv_bytes, again.peak_kv_bytes + self.nbytes))
        self.__dict__.update(again.__dict__ | {"_before": before})

    def undo(self) -> None:
        """Take the last `append` back, for every user: an answer the user did not like, a turn sent again.

        Raises:
            ValueError: nothing to take back. One step is kept; `fork()` before a turn keeps as many as you like.

        Cost: none for a memory that grows; with `max_slots`, and merge and gist memories, the one before is held, too.
        """
        if self._before is None:
            raise ValueError(
                "there is no append to undo: one step is kept, and none behind reset() or loading; use fork()"
            )
        before, layers = self._before, self._before["_layers"]
        if layers is None:
            slots, none = torch.arange(self._sinks + before["_held"].shape[1]), before["steps"] == 0
            layers = [(cleared(keys, none, slots), cleared(values, none, slots)) for keys, values in self._layers]
        self.__dict__.update(before | {"_layers": layers, "_before": None})

    def _state(self) -> dict[str, Any]:
        """What an append changes; None for the layers of a memory that grows, whose old slots stay in it."""
        names = ("_layers", "_held", "steps", "_text", "_history")
        state = {name: getattr(self, name) for name in names}
        return state | {"_layers": None} if self._layers and self._grows else state

    @property
    def _grows(self) -> bool:
        """Whether the slots of before are the first of the slots after an append."""
        return self.config.memory.startswith("concat") and self.max_slots is None

    def _take_in_all(self, parts: Sequence[Sequence[list[int] | None]], before: dict[str, Any]) -> None:
        """All of an append's steps, or none."""
        try:
            for rows in parts:
                self._take_in(rows)
        except BaseException:
            if self.steps is not before["steps"]:
                self._before = before
                self.undo()
            raise
        self._before = before

    def _take_in(self, rows: Sequence[list[int] | None]) -> None:
        new = torch.tensor([row is not None for row in rows], device=self.steps.device)
        cache = self._compress(rows)
        before = {name: value for name, value in vars(self).items() if name != "_layers"}
        # a layer of a growing memory holds its old slots: two memories at a time would be too many
        kept, size = None if self._grows else list(self._layers), self._sinks + self._held.shape[1]
        started = bool(self._layers)
        try:
            self._update(cache.kept, cache.sink, new)
            self._text = self._text + torch.tensor([len(row or []) for row in rows], device=self._text.device)
            self.steps = self.steps + new.long()
        except BaseException:  # an interrupt, out of memory
            shorter = [(keys[:, :, :size], values[:, :, :size]) for keys, values in self._layers] if started else []
            self.__dict__.update(before | {"_layers": shorter if kept is None else kept})
            raise

    def _compress(self, rows: Sequence[list[int] | None]) -> CompressingCache:
        """One forward of [c(t) COMP] behind the memory it may see (Eq. 7.1)."""
        comp = list(self.config.comp_token_ids or [])
        ids, mask = left_padded([[*(row or []), *comp] for row in rows], self.steps.device)
        text = (mask.long().cumsum(1) - 1).clamp(min=0)
        length = torch.tensor([len(row or []) for row in rows], device=ids.device)[:, None]
        column = ids.shape[1] - len(comp)
        self._warn_if_long([len(row or []) + len(comp) for row in rows])
        positions = self._text[:, None] + text  # COMP k follows the text; later text starts where COMP 0 stood
        positions[:, column:] = self._text[:, None] + length + torch.arange(len(comp), device=ids.device)
        layers, held = self._seen(self.config.recurrent)
        first = mask.long().argmax(1) if self.config.sink else None
        cache = CompressingCache(layers, len(comp), first, self._text)
        # one row of logits is made; none of them is read
        read_behind(self.model, cache, ids, torch.cat([held, mask], 1).long(), positions, **last_logits(self.model))
        slots, extra = cache.attended_slots, cache.attended_bytes + nbytes_of(cache.kept) + nbytes_of(cache.sink)
        if not self.config.recurrent:  # the memory is there, unseen
            slots += self._held.shape[1]
        self._count_peak(slots, self.nbytes + extra)
        return cache

    def _warn_if_long(self, tokens: Sequence[int], users: Sequence[int] | None = None) -> None:
        """Warn, once, where new tokens per row need positions that the model does not have."""
        seen = self.tokens_seen if users is None else [self.tokens_seen[user] for user in users]
        needed = max(old + new for old, new in zip(seen, tokens, strict=True))
        config = text_config(causal_model_of(self.model))
        self._warned = self._warned or warn_beyond_positions(config, needed, "the memory's text so far")

    def _count_peak(self, slots: int, nbytes: int) -> None:
        self.peak_slots, self.peak_kv_bytes = max(self.peak_slots, slots), max(self.peak_kv_bytes, nbytes)

    def _update(self, found: Layers, sinks: Layers, new: torch.Tensor) -> None:
        """Mem(t) = g_update(Mem(t-1), h(t)) (Eq. 7.2), a layer at a time."""
        slots = new[:, None].expand(-1, self.config.num_comp_tokens)
        weights = [self.config.update_weight(step + 1) for step in self.steps.tolist()]
        weight = (torch.tensor(weights, device=new.device) * new)[:, None, None, None]
        fresh = (self.steps == 0)[:, None, None, None]
        started = bool(self._layers)
        held = self._held | slots if self.config.merges and started else torch.cat([self._held, slots], 1)
        fit = oldest_merged(held, self.steps + new.long(), self.config.num_comp_tokens, self.max_slots)

        def grown(old: torch.Tensor, h: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
            anew = fresh.to(h.device)
            first = [] if sink is None else [torch.where(anew, sink, old[:, :, :1]) if started else sink]
            if not started:
                return torch.cat([*first, h], 2)
            memory = old[:, :, len(first) :]
            if self.config.merges:
                return torch.cat([*first, average(memory, h, weight.to(h.device))], 2)
            return torch.cat([*first, memory, h] if fit is None else [*first, fit(torch.cat([memory, h], 2))], 2)

        self._layers = list(self._layers if started else found)
        for index, (keys, values) in enumerate(found):
            old, sink = self._layers[index], sinks[index] if sinks else (None, None)
            self._layers[index] = grown(old[0], keys, sink[0]), grown(old[1], values, sink[1])
        self._held = held if fit is None else fit.held
        self._count_peak(0, self.nbytes + nbytes_of(found) + nbytes_of(sinks))

    def _seen(self, everything: bool = True) -> tuple[Layers, torch.Tensor]:
        """[sink | memory], or the sink alone, and which of its slots each user holds, (B, slots) bool."""
        held = torch.cat([(self.steps > 0)[:, None].expand(-1, self._sinks), self._held], 1)
        if everything:
            return self._layers, held
        layers = [(keys[:, :, : self._sinks], values[:, :, : self._sinks]) for keys, values in self._layers]
        return layers if self._sinks else [], held[:, : self._sinks]

    def _fork(self, rows: int | None = None) -> tuple[MemoryCache, torch.Tensor]:
        """A cache that starts with [sink | memory], and which of its slots each user holds, (B, slots) bool."""
        layers, held = self._seen()
        if rows is not None:
            layers = [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in layers]
            held = held.expand(rows, -1)
        starts = self._text if rows is None else self._text.expand(rows)
        return MemoryCache(layers, full=bool(held.all()), starts=starts).belongs_to(self.model), held

    def inputs(self, question: Any) -> CallInputs:
        """Everything `generate` needs: `model.generate(**memory.inputs(question))`.

        Args:
            question: as `append`'s context, a list of messages being one question. One user's memory also takes a list of
                questions (a list of messages for each that is made of messages), and forks for each entry. A message that
                is not the assistant's is followed by the words with which the chat template opens the answer.

        Returns:
            `input_ids` (B, q), `attention_mask` (B, memory + q), `position_ids` (B, q) and a fresh fork under the keyword that
            the installed transformers wants (the returned dict knows it as `past_key_values` too).

        Raises:
            ValueError, TypeError: as `append`.
        """
        several = self.batch_size == 1 and isinstance(question, list | tuple) and not is_one(question)
        rows = self._rows(question, count=len(question) if several else None, asking=True)
        if any(row is None for row in rows):
            raise ValueError("every user needs a question; use a memory of fewer users")
        self._warn_if_long([len(row or []) for row in rows], users=[0] * len(rows) if several else None)
        ids, mask = left_padded([row or [] for row in rows], self.steps.device)
        cache, held = self._fork(rows=len(rows) if several else None)
        positions = self._text[:, None] + (mask.long().cumsum(1) - 1).clamp(min=0)
        full = torch.cat([held, mask], 1).long()
        cache.full, cache.asked = bool(full.all()), ids.shape[1]
        return CallInputs(input_ids=ids, attention_mask=full, position_ids=positions, cache=cache)

    def generate(self, question: Any, **kwargs: Any) -> str | list[str] | torch.Tensor | GenerateOutput:
        """Answer from Mem(t) and the question (Eq. 7.3); the memory stays as it was.

        Args:
            question: see `inputs`.
            kwargs: of `model.generate`.

        Returns:
            The answer as `str` (a list for several); without a tokenizer ids (B, q + new), and with
            `return_dict_in_generate=True` what `model.generate` returns.
        """
        inputs = self.inputs(question)
        output = self.model.generate(**inputs, **kwargs)
        cache = inputs["past_key_values"]
        self._count_peak(cache.get_seq_length(), self.nbytes + cache.nbytes)
        if self.tokenizer is None or not isinstance(output, torch.Tensor):
            return output
        answers = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers if len(answers) > 1 else answers[0]

    def logits(self, question: Any) -> torch.Tensor:
        """Next-token logits (B, q, vocabulary) of a question behind the memory."""
        with torch.no_grad():
            return self.model(**self.inputs(question), use_cache=True).logits

    def fork(self) -> CompressedContextMemory:
        """An independent memory with the same content; nothing is copied until one of them grows."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._layers = list(self._layers)
        other._history = [list(row) for row in self._history]
        return other

    def save_pretrained(self, folder: str | Path, *, adapter: str | None = None, license: str | None = None) -> None:
        """Write the memory, which model and adapter wrote it, and a card.

        Args:
            folder: made if missing.
            adapter: Hub name of the adapter, for the code on the card.
            license: of what was said, if it may be shared; otherwise the card names none.
        """
        tensors = {"held": self._held, "steps": self.steps, "text": self._text}
        sink = self._seen(everything=False)[0]
        for kind, layers in (("memory", self.layers), ("sink", sink)):
            for index, (keys, values) in enumerate(layers):
                tensors |= {f"{kind}.{index}.keys": keys, f"{kind}.{index}.values": values}
        settings = {"layers": len(self._layers), "history": self._history, "max_slots": self.max_slots}
        settings |= {"peak_kv_bytes": self.peak_kv_bytes, "peak_slots": self.peak_slots, **self.chat.to_dict()}
        sizes = (self.batch_size, sum(self.steps.tolist()), sum(self.tokens_seen), self.nbytes)
        card = {"adapter": adapter, "license": license}
        save_memory(check_path("folder", folder), "context_memory", self.model, tensors, settings, sizes, card)

    @classmethod
    def from_pretrained(
        cls, model: Any, source: str | Path, tokenizer: Any = None, **hub: Unpack[HubOptions]
    ) -> CompressedContextMemory:
        """Read what `save_pretrained` wrote, from a folder or the Hub.

        Args:
            model: with the adapter that wrote it.
            source: folder or Hub name.
            tokenizer: for text and messages.
            hub: `revision`, `token`.

        Raises:
            ValueError: no memory there, or one that another model or adapter wrote.
        """
        memory = cls(model, tokenizer)
        tensors, settings = load_memory(model, source, "context_memory", memory._shapes, **hub)
        memory._held, memory.steps, memory._text = tensors["held"], tensors["steps"], tensors["text"]
        memory._history, memory.chat = settings["history"], read_chat(settings, source)
        memory.max_slots = settings.get("max_slots")
        memory.peak_kv_bytes, memory.peak_slots = settings["peak_kv_bytes"], settings["peak_slots"]
        memory._layers = joined(tensors, memory.config.sink, source)
        return memory

    def _rows(self, given: Any, count: int | None = None, asking: bool = False) -> list[list[int] | None]:
        check_still_active(self.model, self.config)
        users = count or self.batch_size
        single = users == 1 and count is None and (not isinstance(given, list | tuple) or is_one(given))
        if isinstance(given, torch.Tensor) and given.ndim == 2:
            given, single = list(given), False
        items: Sequence[Any] = [given] if single else given
        if not isinstance(items, list | tuple) or len(items) != users:
            raise ValueError(
                f"this memory has {users} users and needs a list with one entry for each, got {brief(given)}; a list of "
                "messages is one entry where it stands in such a list"
            )
        limit = (self.config.comp_token_ids or [0])[0]
        rows: list[list[int] | None] = []
        for index, item in enumerate(items):
            first = int(self.steps[index if users == self.batch_size else 0]) == 0
            row = None if item is None else encode_turn(self.tokenizer, item, first, self.chat)
            if row is not None and not row:
                raise ValueError(f"entry {index} has no tokens; pass None for a user with nothing new")
            if row is not None and not 0 <= min(row) <= max(row) < limit:
                raise ValueError(f"ids must be in [0, {limit - 1}], got {min(row)} to {max(row)} in entry {index}")
            if row is not None and asking and awaits_answer(item):
                row = [*row, *answer_prompt(self.tokenizer, self.chat)]
            rows.append(row)
        if all(row is None for row in rows):
            raise ValueError("no user has anything new")
        return rows
