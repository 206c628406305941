"""Embeddings and class probabilities of any Hugging Face classifier, as a `Dataset.map` callable."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import decoding
from ._compat import positions_of
from .decoding import OnError
from .distributed import Room, rows_of
from .settings import brief, check_callable, check_choice, check_int, check_kind, check_text, optional
from .thumbnails import COLUMN, WIDTH, thumbnail

logger = logging.getLogger(__name__)
_AUTO = {
    "image": "AutoModelForImageClassification",
    "text": "AutoModelForSequenceClassification",
    "audio": "AutoModelForAudioClassification",
}


class FeatureExtractor:
    """Adds "features" (the input of the classifier head), "probs" (softmax) and, of pictures, "thumbnail" to a batch.

    The embedding is what the model's last linear layer of `num_labels` outputs receives, read by a forward hook. A model whose
    config says `multi_label_classification` has one sigmoid a label for "probs". By "thumbnail", the 8 x 8 averages of a
    picture, `RelationCleaner` finds copies that were encoded again.

    Args:
        model: A classifier, or a hub name or folder (loaded once per process, on first use).
        processor: Maps a column's values to model inputs: an image processor, feature extractor or tokenizer. None: the
            one that is stored beside a named model, else the column holds tensors already.
        column: Column to read.
        modality: "image", "text" or "audio": which keyword the inputs go by, and which class loads a name.
        revision: Hub revision, for names.
        dtype: "float32", "bfloat16" or "float16" for the forward pass; outputs are float32.
        suffix: put behind both column names, to keep the columns of several checkpoints apart.
        on_error: "skip" gives rows that cannot be read NaN in both columns, which `RelationCleaner.fit(on_error="skip")`
            leaves out; `skipped` says why. "raise" ends at the first one and names it.

    Attributes:
        skipped: reason by row, of the rows that this process could not read (numbers of the dataset where `map` was given
            `with_indices=True`, else of the batch).
        counts: rows "skipped", texts "truncated" to the model's length, "empty" texts, of this process.

    Raises:
        ValueError: unknown modality or dtype, missing column, or a model without a head of `num_labels` outputs.
        BadRowError: a row cannot be read.

    Source: section 5.2 (features and predicted probabilities).
    Differs: a name hashes by name, revision, dtype, processor and column in `datasets`, a folder also by its files' sizes and
        times, since a checkpoint may be trained on; a model object hashes with its weights (about 20 ms per million
        parameters and call). Sounds of different length are padded where the processor makes an attention mask, else run
        by length: what a row gets never hangs on its neighbours.
    Cost: one forward pass a row; where a batch does not fit the device, it goes on in halves of it, and says so.

    Example:
        >>> dataset.map(FeatureExtractor("folder", processor), batched=True, with_rank=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | torch.nn.Module,
        processor: Callable[..., Any] | None = None,
        *,
        column: str = "image",
        modality: str = "image",
        revision: str | None = None,
        dtype: str = "float32",
        suffix: str = "",
        on_error: OnError = "raise",
    ) -> None:
        check_choice("modality", modality, tuple(_AUTO))
        check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
        decoding.check_on_error(on_error)
        if isinstance(model, str):
            check_text("model", model, empty=False, todo="give a model, or its Hub name or folder")
        else:
            check_classifier(check_kind("model", model, torch.nn.Module, "give a model, or its Hub name or folder"))
        optional(check_callable, "processor", processor, "give an image processor, feature extractor or tokenizer")
        check_text("column", column, empty=False)
        optional(check_text, "revision", revision, empty=False)
        check_text("suffix", suffix)
        self.model, self.processor, self.column, self.on_error = model, processor, column, on_error
        self.modality, self.revision, self.dtype, self.suffix = modality, revision, dtype, suffix
        self._loaded: torch.nn.Module | None = None
        self._stored_processor: Callable[..., Any] | None = None
        self._stamp: list[tuple[str, int, int]] | None = None  # of the folder that was loaded
        self._room = Room("parts of {} rows")
        self.skipped: dict[int, str] = {}
        self.counts: Counter[str] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and `datasets` hashing see: never the lazily loaded weights of a named model, nor counts."""
        fresh: dict[str, Any] = {"_loaded": None, "_stored_processor": None, "skipped": {}, "counts": Counter()}
        return {**self.__dict__, **fresh, "_stamp": _stamp(self.model)}

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, Any], *where: Any, rank: int | None = None) -> dict[str, np.ndarray]:
        """Features (n, d) and probs (n, C), float32, of one batch; of pictures thumbnails (n, 192), uint8, as well.

        Args:
            batch: holds the column.
            where: what `map` adds: row numbers (`with_indices=True`), for messages, and a rank (`with_rank=True`).
            rank: picks the GPU where there is one.
        """
        check_kind("batch", batch, Mapping, "use dataset.map(..., batched=True)")
        rank = optional(check_int, "rank", rank, 0)
        if self.column not in batch:
            raise ValueError(f"the batch has columns {list(batch)}, not {self.column!r}; set column=")
        model = self._ready()
        rank = next((int(one) for one in where if np.ndim(one) == 0 and one is not None), rank)
        rows = next((one for one in where if np.ndim(one) == 1), None)
        if torch.cuda.is_available() and (rank is not None or isinstance(self.model, str)):
            model.to(torch.device("cuda", (rank or 0) % torch.cuda.device_count()))
        values = decoding.column_values(batch, self.column)
        head = _head(model)
        features = np.full((len(values), head.in_features), np.nan, np.float32)
        probs = np.full((len(values), head.out_features), np.nan, np.float32)
        pictures = self.modality == "image" and (self.processor or self._stored_processor) is not None
        small = np.zeros((len(values), WIDTH), np.uint8) if pictures else None
        caught: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = head.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            for places, inputs in self._inputs(values, model, rows, small):
                self._forward(model, caught, np.asarray(places), inputs, (features, probs))
        finally:
            handle.remove()
            for module, mode in modes:
                module.training = mode
        found = {f"features{self.suffix}": features, f"probs{self.suffix}": probs}
        return found if small is None else {**found, COLUMN: small}

    def _forward(
        self,
        model: Any,
        caught: list[tuple[torch.Tensor, torch.Tensor]],
        places: np.ndarray,
        inputs: dict[str, torch.Tensor],
        out: tuple[np.ndarray, np.ndarray],
    ) -> None:
        """Features and probs of some rows into their places of `out`; in halves where the device runs out of memory."""
        dtype, total = getattr(torch, self.dtype), len(places)
        several = getattr(model.config, "problem_type", None) == "multi_label_classification"

        def work(start: int, stop: int) -> None:
            try:
                logits = model(**rows_of(inputs, start, stop, total, model.device, dtype)).logits
                out[0][places[start:stop]] = _pooled(*caught[-1], logits).float().cpu().numpy()
                probs = logits.float().sigmoid() if several else logits.float().softmax(dim=-1)
                out[1][places[start:stop]] = probs.cpu().numpy()
            finally:
                caught.clear()

        self._room.parts(total, work, model.device)

    def _ready(self) -> Any:
        stamp = _stamp(self.model)
        if self._loaded is None or stamp != self._stamp:
            self._stamp = stamp
            model, dtype = self.model, getattr(torch, self.dtype)
            if isinstance(model, str):
                import transformers

                model = getattr(transformers, _AUTO[self.modality]).from_pretrained(
                    model, revision=self.revision, dtype=dtype
                )
                self._stored_processor = self.processor or _load_processor(model, self.modality, self.revision)
            elif next(model.parameters()).dtype != dtype:
                model = copy.deepcopy(model).to(dtype)  # the caller's model stays as it is
            self._loaded = model
        return self._loaded

    def _inputs(
        self, values: Any, model: Any, rows: Sequence[int] | None = None, small: np.ndarray | None = None
    ) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
        """Positions in the batch and the model's inputs for them, in as few groups as can be; thumbnails go into `small`."""
        processor: Any = self.processor or self._stored_processor
        read, options = self._reader(processor, model)
        name = "row" if rows is not None else "row of the batch"
        found, places, skipped = decoding.read_rows(values, read, rows=rows, on_error=self.on_error, what=name)
        if small is not None:
            for place, picture in zip(places, found, strict=True):
                small[place] = thumbnail(picture)
        self.skipped |= skipped
        self._count("skipped", len(skipped), "rows cannot be read and get NaN (%s)", next(iter(skipped.items()), None))
        groups = []
        for group in _groups(found, together=self.modality != "audio" or _pads(processor)):
            part = [found[k] for k in group]
            if processor is None:
                made = {_KEYS[self.modality]: torch.from_numpy(decoding.stacked(part, [places[k] for k in group]))}
            else:
                made = dict(processor(part, return_tensors="pt", **options))
            groups.append(([places[k] for k in group], made))
        return groups

    def _reader(self, processor: Any, model: Any) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        """What reads one cell, and what the processor is told."""
        if processor is None:
            return (_ids if self.modality == "text" else decoding.read_array), {}
        if self.modality == "audio":
            rate = getattr(processor, "sampling_rate", None)
            options = {"sampling_rate": rate, **({"padding": True} if _pads(processor) else {})}
            return (lambda value: decoding.read_sound(value, rate)), options
        if self.modality == "image":
            mode = {1: "L", 3: "RGB"}.get(getattr(model.config, "num_channels", 3))
            return (lambda value: _picture(value, mode)), {}
        limit = _text_limit(processor, model)
        options = {"padding": True, "truncation": True, **({"max_length": limit} if limit else {})}
        return (lambda value: self._text(value, processor, limit)), options

    def _text(self, value: Any, tokenizer: Any, limit: int | None) -> Any:
        """A text with at least one token; too long and empty ones are counted."""
        if value is None:
            raise ValueError("holds no text")
        if not isinstance(value, str) or not hasattr(tokenizer, "convert_ids_to_tokens"):
            return value
        length = len(tokenizer(value, truncation=False, verbose=False)["input_ids"])
        if not length:
            raise ValueError("holds an empty text, which has no tokens")
        self._count("empty", not value.strip(), "texts are empty (%s)", None)
        if limit is not None:
            self._count(
                "truncated", length > limit, "texts are longer than the model takes and are cut to %s tokens", limit
            )
        return value

    def _count(self, what: str, more: int, message: str, detail: Any) -> None:
        if more:
            if not self.counts[what]:
                logger.warning(f"some {message}; counted in .counts[{what!r}]", detail)
            self.counts[what] += int(more)


def _stamp(model: Any) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of the files in a model's folder; None for a Hub name (its revision tells) or an object."""
    if not isinstance(model, str) or not Path(model).is_dir():
        return None
    found = ((path, path.stat()) for path in sorted(Path(model).iterdir()) if path.is_file())
    return [(path.name, about.st_size, about.st_mtime_ns) for path, about in found]


_KEYS = {"image": "pixel_values", "text": "input_ids", "audio": "input_values"}


def _picture(value: Any, mode: str | None) -> Any:
    """A picture in the model's mode, 16-bit arrays as pictures too; other arrays as they are."""
    if isinstance(value, np.ndarray | list | torch.Tensor):
        array = np.asarray(value)
        if array.dtype == np.uint16:
            return (decoding.read_array(array) / 257).round().astype(np.uint8)
        decoding.read_array(array)
        return array
    return decoding.read_picture(value, mode)


def _ids(value: Any) -> np.ndarray:
    """A row of token numbers."""
    decoding.read_array(value)
    return np.asarray(value)


def _groups(found: list[Any], *, together: bool) -> list[list[int]]:
    """Positions that go through the model at once: all, or those of one length."""
    if together:
        return [list(range(len(found)))] if found else []
    by_length: dict[int, list[int]] = {}
    for k, one in enumerate(found):
        by_length.setdefault(len(one), []).append(k)
    return list(by_length.values())


def _pads(processor: Any) -> bool:
    """Whether sounds of different length may share a batch: padded to a fixed length, or with an attention mask."""
    if processor is None:
        return True
    try:
        padding = inspect.signature(processor.__call__).parameters.get("padding")
    except (TypeError, ValueError):
        padding = None
    if padding is None or padding.default not in (False, None):
        return True
    return bool(getattr(processor, "return_attention_mask", False))


def _text_limit(tokenizer: Any, model: Any) -> int | None:
    """Tokens that tokenizer and model both take; positions kept for padding (RoBERTa) are none."""
    limits = [getattr(tokenizer, "model_max_length", None), positions_of(model.config)]
    table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None and limits[1] is not None:
        limits[1] -= table.padding_idx + 1
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known, default=None)


def _load_processor(model: Any, modality: str, revision: str | None) -> Any:
    """The processor that is stored beside a model, of the kind its modality needs."""
    import transformers

    kind = {"image": "AutoImageProcessor", "text": "AutoTokenizer", "audio": "AutoFeatureExtractor"}[modality]
    try:
        return getattr(transformers, kind).from_pretrained(model.name_or_path, revision=revision)
    except (OSError, ValueError) as error:
        if modality == "text":
            raise ValueError(f"no tokenizer beside {model.name_or_path!r}; pass one as processor=") from error
        return None  # the column holds tensors already


def _pooled(inputs: torch.Tensor, outputs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(n, d) head inputs; where the head saw every token, those of the token whose logits the model returned."""
    if inputs.ndim == 3 and outputs.shape[0] == logits.shape[0] and logits.ndim == 2:
        token = (outputs - logits[:, None]).abs().sum(dim=-1).argmin(dim=1)
        return inputs[torch.arange(len(inputs), device=inputs.device), token]
    return inputs.flatten(1)


def check_classifier(model: Any) -> int:
    """Number of labels of a classifier of transformers, or what acts as one.

    Raises:
        TypeError: a module whose config does not say it.
        ValueError: a module without weights.
    """
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if not isinstance(labels, int):
        raise TypeError(
            f"model must be a classifier with config.num_labels, got {brief(model)}; set it, or use transformers"
        )
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no weights; give a classifier")
    return labels


def _head(model: Any) -> torch.nn.Linear:
    """The last linear layer with as many outputs as the model has labels."""
    labels = check_classifier(model)
    if labels < 2:
        raise ValueError(f"{type(model).__name__} has {labels} output: a regression model has no class probabilities")
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == labels]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer of {labels} outputs; give a classifier")
    return linear[-1]
