"""Embeddings and class probabilities of any Hugging Face classifier, as a `Dataset.map` callable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_AUTO = {
    "image": "AutoModelForImageClassification",
    "text": "AutoModelForSequenceClassification",
    "audio": "AutoModelForAudioClassification",
}


class FeatureExtractor:
    """Adds "features" (the input of the classifier head) and "probs" (softmax) to a batch.

    The embedding is what the model's last linear layer of `num_labels` outputs receives, read by a forward hook.

    Args:
        model: A classifier, or a hub name or folder (loaded once per process, on first use).
        processor: Maps a column's values to model inputs: an image processor, feature extractor or tokenizer. None: the
            one that is stored beside a named model, else the column holds tensors already.
        column: Column to read.
        modality: "image", "text" or "audio": which keyword the inputs go by, and which class loads a name.
        revision: Hub revision, for names.
        dtype: "float32", "bfloat16" or "float16" for the forward pass; outputs are float32.
        suffix: put behind both column names, to keep the columns of several checkpoints apart.

    Raises:
        ValueError: unknown modality or dtype, missing column, or a model without a head of `num_labels` outputs.

    Source: section 5.2 (features and predicted probabilities).
    Differs: a name hashes by name, revision, dtype, processor and column in `datasets`, a folder also by its files' sizes and
        times, since a checkpoint may be trained on; a model object hashes with its weights (about 20 ms per million
        parameters and call).
    Cost: one forward pass a row.

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
    ) -> None:
        if modality not in _AUTO:
            raise ValueError(f"modality is {modality!r}; give one of {', '.join(_AUTO)}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; give 'float32', 'bfloat16' or 'float16'")
        self.model, self.processor, self.column = model, processor, column
        self.modality, self.revision, self.dtype, self.suffix = modality, revision, dtype, suffix
        self._loaded: torch.nn.Module | None = None
        self._stored_processor: Callable[..., Any] | None = None
        self._stamp: list[tuple[str, int, int]] | None = None  # of the folder that was loaded

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and `datasets` hashing see: never the lazily loaded weights of a named model."""
        return {**self.__dict__, "_loaded": None, "_stored_processor": None, "_stamp": _stamp(self.model)}

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, np.ndarray]:
        """Features (n, d) and probs (n, C), float32, of one batch; `rank` picks the GPU where there is one."""
        if self.column not in batch:
            raise ValueError(f"the batch has columns {list(batch)}, not {self.column!r}; set column=")
        model = self._ready()
        if torch.cuda.is_available() and (rank is not None or isinstance(self.model, str)):
            model.to(torch.device("cuda", (rank or 0) % torch.cuda.device_count()))
        caught: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = _head(model).register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
        modes = [(module, module.training) for module in model.modules()]
        try:
            logits = model.eval()(**self._inputs(batch[self.column], model)).logits
        finally:
            handle.remove()
            for module, mode in modes:
                module.training = mode
        probs = torch.softmax(logits.float(), dim=-1)
        features = _pooled(*caught[-1], logits).float().cpu().numpy()
        return {f"features{self.suffix}": features, f"probs{self.suffix}": probs.cpu().numpy()}

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

    def _inputs(self, values: Any, model: Any) -> dict[str, torch.Tensor]:
        processor = self.processor or self._stored_processor
        if processor is None:
            key = {"image": "pixel_values", "text": "input_ids", "audio": "input_values"}[self.modality]
            made = {key: torch.as_tensor(np.asarray(values))}
        else:
            options: dict[str, Any] = {}
            if self.modality == "text":
                options = {"padding": True, "truncation": True}
            elif self.modality == "audio":
                values, rate = _waveforms(values, getattr(processor, "sampling_rate", None))
                options = {"sampling_rate": rate}
            elif getattr(model.config, "num_channels", 3) == 3:
                values = [one.convert("RGB") if hasattr(one, "convert") else one for one in values]
            made = dict(processor(values, return_tensors="pt", **options))
        dtype, device = getattr(torch, self.dtype), model.device
        return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in made.items()}


def _stamp(model: Any) -> list[tuple[str, int, int]] | None:
    """Names, sizes and times of the files in a model's folder; None for a Hub name (its revision tells) or an object."""
    if not isinstance(model, str) or not Path(model).is_dir():
        return None
    found = ((path, path.stat()) for path in sorted(Path(model).iterdir()) if path.is_file())
    return [(path.name, about.st_size, about.st_mtime_ns) for path, about in found]


def _waveforms(values: Any, expected: int | None) -> tuple[list[Any], int | None]:
    """Samples of an audio batch and their rate: what `Audio` columns decode to (dictionaries or decoders), or bare arrays."""
    plain = (np.ndarray, list, tuple, torch.Tensor)
    rates = {int(one["sampling_rate"]) for one in values if not isinstance(one, plain)}
    if rates - {expected}:
        raise ValueError(
            f"the audio has sampling rates {sorted(rates)}, the model needs {expected}; cast the column: "
            f"dataset.cast_column(column, Audio({expected}))"
        )
    return [np.asarray(one if isinstance(one, plain) else one["array"]) for one in values], expected


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


def _head(model: Any) -> torch.nn.Linear:
    """The last linear layer with as many outputs as the model has labels."""
    labels = model.config.num_labels
    if labels < 2:
        raise ValueError(f"{type(model).__name__} has {labels} output: a regression model has no class probabilities")
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == labels]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer of {labels} outputs; give a classifier")
    return linear[-1]
