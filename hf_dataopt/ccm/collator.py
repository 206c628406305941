"""From conversations and few-shot examples to [c(1) COMP ... c(t) COMP I O] with labels on O (Algorithm 6)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from .attention import skip_positions
from .config import CCMConfig
from .turns import encode_turn

logger = logging.getLogger(__name__)


class DataCollatorForCCM:
    """Inserts compression tokens, positions and labels.

    A sample is a dict with one of
    `messages` (chat; the last is O, the one before I, each earlier one a c(j)),
    `texts` (strings in the same order), or
    `contexts`, `input`, `output` (each text, message or ids; few-shot: `examples`, each `{"input", "output"}`, for `contexts`).
    Set `remove_unused_columns=False` in `TrainingArguments`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, optional): not needed for samples of ids.
        config (`CCMConfig`): of the adapter, after `get_peft_model`.
        max_length (`int`, tokens without compression tokens, default 1024): oldest contexts of longer samples are left out.
        pack (`bool`, default `False`): put several samples into one row, each with positions from 0.

    Attributes:
        cut_samples, cut_turns: how many samples lost contexts, and how many contexts.

    Raises:
        ValueError: an empty batch, a sample without output, or input and output longer than `max_length`.
        TypeError: a sample of another kind.

    Source: Algorithm 6; `max_length` of the reference code.
    """

    def __init__(self, tokenizer: Any, config: CCMConfig, *, max_length: int = 1024, pack: bool = False) -> None:
        if config.comp_token_ids is None:
            raise ValueError("this config has no compression tokens yet; pass `model.peft_config['default']`")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.tokenizer, self.config, self.max_length, self.pack = tokenizer, config, max_length, pack
        self.cut_samples = self.cut_turns = 0

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate.

        Returns:
            `input_ids`, `attention_mask`, `position_ids`, `labels`, each (rows, longest) int64, padded right.
        """
        if not features:
            raise ValueError("cannot collate an empty batch")
        rows = [[self._sample(feature)] for feature in features]
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
        turns = [encode_turn(self.tokenizer, turn, first=index == 0) for index, turn in enumerate(contexts)]
        asked = [] if question is None else encode_turn(self.tokenizer, question, first=not turns)
        said = encode_turn(self.tokenizer, answer, first=not turns and not asked)
        if isinstance(answer, str) and getattr(self.tokenizer, "eos_token_id", None) is not None:
            said = [*said, self.tokenizer.eos_token_id]
        if not said or not all(turns):
            raise ValueError("a sample needs an output and contexts that have tokens")
        cut = 0
        while turns and sum(map(len, turns)) + len(asked) + len(said) > self.max_length:
            turns, cut = turns[1:], cut + 1
        if len(asked) + len(said) > self.max_length:
            raise ValueError(
                f"input and output have {len(asked) + len(said)} tokens, max_length is {self.max_length}; raise it"
            )
        if cut:
            self.cut_samples, self.cut_turns = self.cut_samples + 1, self.cut_turns + cut
            logger.warning("%d of a sample's oldest contexts left out (%d so far)", cut, self.cut_turns)
        comp = list(self.config.comp_token_ids or [])
        if self.config.memory == "gist":
            turns = [sum(turns, [])] if turns else []
        ids = torch.tensor([*(token for turn in turns for token in [*turn, *comp]), *asked, *said])
        labels = ids.clone()
        labels[: len(ids) - len(said)] = -100
        where = torch.where((ids >= comp[0]) & (ids <= comp[-1]), ids - comp[0], -1)
        return ids, skip_positions(where[None], torch.ones(1, len(ids), dtype=torch.bool))[0], labels

    @staticmethod
    def _parts(feature: dict[str, Any]) -> tuple[list[Any], Any, Any]:
        """Contexts, input (None if there is none) and output of one sample."""
        if not isinstance(feature, dict):
            raise TypeError(f"a sample must be a dict, got {type(feature).__name__}")
        turns = feature.get("messages") or feature.get("texts")
        if turns:
            if len(turns) < 2:
                raise ValueError("a conversation needs at least two turns")
            return list(turns[:-2]), turns[-2], turns[-1]
        if "output" not in feature:
            raise TypeError(f"a sample needs messages, texts, or contexts/examples with output; got {sorted(feature)}")
        contexts = feature.get("contexts")
        if contexts is None:
            contexts = [f"{example['input']} {example['output']}\n" for example in feature.get("examples", [])]
        return list(contexts), feature.get("input"), feature["output"]
