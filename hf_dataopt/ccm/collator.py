"""From conversations and few-shot examples to [c(1) COMP ... c(t) COMP I O] with labels on O (Algorithm 6)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..settings import brief, check_choice, check_flag, check_int, check_kind, check_tokenizer, optional
from ..text.chat import ChatFormat, said
from .attention import skip_positions
from .config import CCMConfig
from .stream_layout import stream_row
from .turns import encode_answer, encode_turn

logger = logging.getLogger(__name__)
_WORKERS = 256


class DataCollatorForCCM:
    """Inserts compression tokens, positions and labels.

    A sample is a dict with one of
    `messages` (chat; the last is O, the one before I, each earlier one a c(j)),
    `texts` (strings in the same order),
    `contexts`, `input`, `output` (each text, message, list of messages or ids, as `CompressedContextMemory.append` takes
    them; `input` may be missing), or
    `examples`, `input`, `output` (few-shot: each example is `{"input", "output"}` and a c(j)).
    A message's content is text or text parts.
    Labels are on O alone; the words with which a chat template opens the answer belong to I. With
    `completion_only_loss=False` each c(j) and I carry labels too. With `memory="concat"` and `"merge"` c(j) is predicted
    behind Mem(j-1), so that one pass trains every step of the memory; in the other modes a c(j) sees no memory. For
    conversations: it does harm where contexts cannot be predicted (lists of facts). First tokens have no label, but O's.
    With `layout="stream"` a sample is a long text instead, `{"text"}` or `{"input_ids"}`, compressed where
    `StreamingContextMemory` would compress it; every token carries a label but the first and those right behind compression
    tokens. The adapter's config needs `stream`.
    Set `remove_unused_columns=False` in `TrainingArguments`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, optional): not needed for samples of ids.
        config (`CCMConfig`): of the adapter, after `get_peft_model`.
        max_length (`int`, tokens without compression tokens, default 1024): oldest contexts of longer samples are left out;
            the sample's start (beginning-of-text token, template opening, attention sink) stays. Streams lose their end.
        pack (`bool`, default `False`): put several samples into one row, each with positions from 0.
        completion_only_loss (`bool`, default `True`): labels on O only, as the text.
        layout (`str`, default `"turns"`): `"turns"` or `"stream"`.
        template_kwargs (`dict`, optional), system (`str`, optional), special_tokens_in_text (`bool`, default `False`): see
            `ChatFormat`; the system message stands before the first message of every sample. Give the memory the same.

    Raises:
        ValueError: a stream without sizes or packed, an empty batch, a sample without output, ids outside the vocabulary, a
            special token that cannot be encoded as text, or input and output longer than `max_length`.
        TypeError: a sample of another kind.

    Source: Algorithm 6; `max_length` of the reference code.

    Example:
        >>> collator = DataCollatorForCCM(tokenizer, adapted.peft_config["default"])
        >>> batch = collator([{"contexts": ["Anna lives in Oslo."], "input": "Where?", "output": " Oslo"}])
        >>> sorted(batch)[:2]
        ['attention_mask', 'input_ids']
    """

    def __init__(
        self,
        tokenizer: Any,
        config: CCMConfig,
        *,
        max_length: int = 1024,
        pack: bool = False,
        completion_only_loss: bool = True,
        layout: str = "turns",
        template_kwargs: dict[str, Any] | None = None,
        system: str | None = None,
        special_tokens_in_text: bool = False,
    ) -> None:
        optional(check_tokenizer, "tokenizer", tokenizer)
        check_kind("config", config, CCMConfig, "pass model.peft_config['default']")
        max_length = check_int("max_length", max_length, 2)
        pack, completion_only_loss = check_flag("pack", pack), check_flag("completion_only_loss", completion_only_loss)
        self.layout = check_choice("layout", layout, ("turns", "stream"))
        if self.layout == "stream" and (config.stream is None or pack):
            raise ValueError(
                "a stream needs CCMConfig(stream=...), which has its sizes, and a row for each text (pack=False); got "
                f"stream={config.stream!r:.100}, pack={pack}"
            )
        if config.comp_token_ids is None:
            raise ValueError("this config has no compression tokens yet; pass `model.peft_config['default']`")
        self.tokenizer, self.config, self.max_length, self.pack = tokenizer, config, max_length, pack
        self.completion_only_loss = completion_only_loss
        self.chat = ChatFormat(
            template_kwargs=template_kwargs, system=system, special_tokens_in_text=special_tokens_in_text
        )
        # samples cut and contexts left out, a row per loader worker: only one process writes each
        self._cut = torch.zeros(_WORKERS, 2, dtype=torch.int64).share_memory_()

    @property
    def cut_samples(self) -> int:
        """How many samples lost contexts so far, loader workers included; a sample counts every time it is collated."""
        return int(self._cut[:, 0].sum())

    @property
    def cut_turns(self) -> int:
        """How many contexts were left out so far."""
        return int(self._cut[:, 1].sum())

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`, `labels`, each (rows, longest) int64, padded right.
        """
        if not isinstance(features, list | tuple):
            raise TypeError(f"features must be a list of samples, got {brief(features)}")
        if not features:
            raise ValueError("cannot collate an empty batch")
        one = self._stream if self.layout == "stream" else self._sample
        rows = [[one(feature)] for feature in features]
        if self.pack:
            rows = self._packed([row[0] for row in rows])
        longest = max(sum(len(ids) for ids, _, _ in row) for row in rows)
        fill = {"input_ids": 0, "attention_mask": 0, "position_ids": 1, "labels": -100}
        batch = {name: torch.full((len(rows), longest), value) for name, value in fill.items()}
        for index, row in enumerate(rows):
            end = 0
            for ids, positions, labels in row:
                start, end = end, end + len(ids)
                batch["input_ids"][index, start:end] = ids
                batch["position_ids"][index, start:end] = positions
                batch["labels"][index, start:end] = labels
                batch["attention_mask"][index, start:end] = 1
        return batch

    def _packed(self, samples: list[Any]) -> list[list[Any]]:
        rows: list[list[Any]] = []
        for sample in samples:
            size = len(sample[0])
            room = next((row for row in rows if sum(len(s[0]) for s in row) + size <= self.max_length), None)
            if room is None:
                rows.append([sample])
            else:
                room.append(sample)
        return rows

    def _sample(self, feature: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        contexts, question, answer = self._parts(feature)
        turns = [self._turn(turn, first=index == 0) for index, turn in enumerate(contexts)]
        asked, said = self._question_and_answer(question, answer, first=not turns)
        if not said or not all(turns):
            raise ValueError("a sample needs an output and contexts that have tokens")
        start, cut = (turns[0] if turns else asked)[:1], 0
        while (cut and turns and _answers(contexts[cut])) or (
            sum(map(len, turns)) + len(asked) + len(said) > self.max_length
        ):
            if not turns:
                raise ValueError(
                    f"input and output have {len(asked) + len(said)} tokens, max_length is {self.max_length}; raise it"
                )
            turns, cut = turns[1:], cut + 1
            if turns and not _answers(contexts[cut]):
                turns[0] = self._begun(self._turn(contexts[cut], first=True), start)
            elif not turns:
                asked, said = self._question_and_answer(question, answer, first=True)
                asked = self._begun(asked, start) if asked else asked
        if cut:
            self._count_cut(cut)
        comp = list(self.config.comp_token_ids or [])
        if self.config.memory == "gist":
            turns = [sum(turns, [])] if turns else []
        text = [*(token for turn in turns for token in turn), *asked, *said]
        if min(text) < 0 or max(text) >= comp[0]:
            raise ValueError(f"ids must be in [0, {comp[0] - 1}], got {min(text)} to {max(text)}")
        ids = torch.tensor([*(token for turn in turns for token in [*turn, *comp]), *asked, *said])
        labels, opens = ids.clone(), len(ids) - len(said)
        labels[0] = -100  # in a packed row another sample's last token stands before it
        if self.completion_only_loss:
            labels[:opens] = -100
        else:
            behind_text = (ids < comp[0]).roll(1)
            behind_text[opens] = True
            labels[~behind_text | (ids >= comp[0])] = -100
        where = torch.where(ids >= comp[0], ids - comp[0], -1)
        return ids, skip_positions(where[None], torch.ones(1, len(ids), dtype=torch.bool))[0], labels

    def _stream(self, feature: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not isinstance(feature, dict) or (feature.get("text") is None) == (feature.get("input_ids") is None):
            got = sorted(feature) if isinstance(feature, dict) else feature
            raise TypeError(
                f"a stream's sample must be a dict with text or input_ids, got {brief(got)} (with a Trainer, set "
                "remove_unused_columns=False)"
            )
        given = feature["input_ids"] if feature.get("text") is None else feature["text"]
        ids = self._turn(given, first=True)
        if len(ids) > self.max_length:
            self._count_cut(0, f"{len(ids) - self.max_length} last tokens")
            ids = ids[: self.max_length]
        limit = (self.config.comp_token_ids or [0])[0]
        if len(ids) < 2 or not 0 <= min(ids) <= max(ids) < limit:
            raise ValueError(f"a stream needs at least two ids in [0, {limit - 1}], got {brief(ids)}")
        return stream_row(ids, self.config)

    def _turn(self, turn: Any, first: bool) -> list[int]:
        return encode_turn(self.tokenizer, turn, first, self.chat)

    def _question_and_answer(self, question: Any, answer: Any, first: bool) -> tuple[list[int], list[int]]:
        asked = [] if question is None else self._turn(question, first)
        opening, ids = encode_answer(self.tokenizer, answer, first and not asked, self.chat)
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return [*asked, *opening], [*ids, eos] if isinstance(said(answer), str) and eos is not None else ids

    def _begun(self, ids: list[int], start: list[int]) -> list[int]:
        """Ids that come first now: with the sample's first token where that is a beginning-of-text token or a sink."""
        keep = self.config.sink or start == [getattr(self.tokenizer, "bos_token_id", None)]
        return [*start, *ids] if keep and ids[:1] != start else ids

    def _count_cut(self, turns: int, what: str = "") -> None:
        worker = torch.utils.data.get_worker_info()
        row = 0 if worker is None else 1 + worker.id % (_WORKERS - 1)
        if not self._cut[row].any():
            what = what or f"{turns} oldest contexts"
            logger.warning("a sample is longer than %d tokens: %s left out", self.max_length, what)
        self._cut[row] += torch.tensor([1, turns])

    @staticmethod
    def _parts(feature: dict[str, Any]) -> tuple[list[Any], Any, Any]:
        """Contexts, input (None if there is none) and output of one sample."""
        if not isinstance(feature, dict):
            raise TypeError(f"a sample must be a dict, got {brief(feature)}")
        kinds = [name for name in ("messages", "texts", "contexts", "examples") if feature.get(name) is not None]
        if len(kinds) > 1:
            raise ValueError(f"a sample has one of messages, texts, contexts, examples; got {kinds}")
        for name in kinds:
            if isinstance(feature[name], str | bytes | dict) or not hasattr(feature[name], "__iter__"):
                raise TypeError(
                    f"{name} must be a list with an entry for each turn, got {brief(feature[name])}; write [...]"
                )
        named = next((name for name in ("messages", "texts") if name in kinds), None)
        turns = list(feature[named]) if named else []
        if turns:
            if len(turns) < 2:
                raise ValueError("a conversation needs at least two turns")
            return turns[:-2], turns[-2], turns[-1]
        if "output" not in feature:
            raise TypeError(
                f"a sample needs messages, texts, or contexts/examples with output; got {sorted(feature)} "
                "(with a Trainer, set remove_unused_columns=False)"
            )
        if feature.get("examples") is None:
            contexts = feature.get("contexts")
            return [] if contexts is None else list(contexts), feature.get("input"), feature["output"]
        pairs = [
            [said(example.get(name)) if isinstance(example, dict) else None for name in ("input", "output")]
            for example in (*feature["examples"], feature)
        ]
        if not all(isinstance(text, str) for pair in pairs for text in pair):
            raise TypeError("few-shot examples, and what follows them, need 'input' and 'output' as text")
        return [f"{asked} {answer}\n" for asked, answer in pairs[:-1]], pairs[-1][0], f" {pairs[-1][1]}"


def _answers(turn: Any) -> bool:
    """Whether a turn cannot open a conversation: chat templates want a user or system message first."""
    turn = turn[0] if isinstance(turn, list | tuple) and turn else turn
    return isinstance(turn, dict) and turn.get("role") == "assistant"
