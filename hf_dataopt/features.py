"""Embeddings and class probabilities of any Hugging Face classifier, as a `Dataset.map` callable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        processor: Maps a column's values to model inputs: an image processor, feature extractor or tokenizer. None:
            the column holds tensors already.
        column: Column to read.
        modality: "image", "text" or "audio": which keyword the inputs go by, and which class loads a name.
        revision: Hub revision, for names.
        dtype: "float32", "bfloat16" or "float16" for the forward pass; outputs are float32.

    Raises:
        ValueError: unknown modality or dtype, missing column, or a model without a head of `num_labels` outputs.

    Source: section 5.2 (features and predicted probabilities).
    Differs: a name hashes by name, revision, dtype, processor and column in `datasets`; a model object hashes with its
        weights (about 20 ms per million parameters and call).
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
    ) -> None:
        if modality not in _AUTO:
            raise ValueError(f"modality is {modality!r}; give one of {', '.join(_AUTO)}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; give 'float32', 'bfloat16' or 'float16'")
        self.model, self.processor, self.column = model, processor, column
        self.modality, self.revision, self.dtype = modality, revision, dtype
        self._loaded: torch.nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What pickling and `datasets` hashing see: never the lazily loaded weights of a named model."""
        return {**self.__dict__, "_loaded": None}

    @torch.inference_mode()
    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, np.ndarray]:
        """Features (n, d) and probs (n, C), float32, of one batch; `rank` picks the GPU where there is one."""
        if self.column not in batch:
            raise ValueError(f"the batch has columns {list(batch)}, not {self.column!r}; set column=")
        model = self._ready()
        device = torch.device("cuda", (rank or 0) % torch.cuda.device_count()) if torch.cuda.is_available() else None
        model.to(device or "cpu")
        caught: list[torch.Tensor] = []
        handle = _head(model).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            logits = model(**self._inputs(batch[self.column], device)).logits
        finally:
            handle.remove()
        probs = torch.softmax(logits.float(), dim=-1)
        return {"features": caught[-1].flatten(1).float().cpu().numpy(), "probs": probs.cpu().numpy()}

    def _ready(self) -> Any:
        if self._loaded is None:
            model = self.model
            if isinstance(model, str):
                import transformers

                model = getattr(transformers, _AUTO[self.modality]).from_pretrained(model, revision=self.revision)
            self._loaded = model.to(getattr(torch, self.dtype)).eval()
        return self._loaded

    def _inputs(self, values: Any, device: torch.device | None) -> dict[str, torch.Tensor]:
        if self.processor is None:
            key = {"image": "pixel_values", "text": "input_ids", "audio": "input_values"}[self.modality]
            made = {key: torch.as_tensor(np.asarray(values))}
        else:
            options = {"padding": True, "truncation": True} if self.modality == "text" else {}
            made = dict(self.processor(values, return_tensors="pt", **options))
        dtype = getattr(torch, self.dtype)
        return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in made.items()}


def _head(model: Any) -> torch.nn.Linear:
    """The last linear layer with as many outputs as the model has labels."""
    labels = model.config.num_labels
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == labels]
    if not linear:
        raise ValueError(f"{type(model).__name__} has no linear layer of {labels} outputs; give a classifier")
    return linear[-1]
