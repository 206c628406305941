"""Input-gradient saliency of any Hugging Face image or audio classifier: what in an input its loss hangs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .decoding import column_values, is_picture, read_array, read_picture, read_rows, stacked
from .distributed import Room, rows_of
from .settings import brief, check_array, check_callable, check_kind, check_shares, check_tensor, check_text, optional

_KEYS = ("pixel_values", "input_values", "input_features")


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module under `torch.compile` and data-parallel wrappers.

    Raises:
        ValueError: `nn.DataParallel`, which copies the model to threads at every forward.
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the classifier itself, a torch.nn.Module")
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "model is wrapped in nn.DataParallel, which copies it to threads at every forward: saliency and mixing "
                "would run on copies. Start one process per GPU (torchrun, accelerate launch), or show one GPU only "
                "(CUDA_VISIBLE_DEVICES=0)"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def main_input(model: nn.Module, names: Mapping[str, Any]) -> str:
    """The keyword under which images or sounds reach `model`.

    Args:
        model: a classifier; Hugging Face models name it in `main_input_name`.
        names: keywords at hand, in this order of preference after the model's own.

    Raises:
        ValueError: none of them holds a floating-point tensor.
    """
    for name in (getattr(model, "main_input_name", None), *_KEYS, *names):
        value = names.get(name) if name else None
        if isinstance(value, Tensor) and value.is_floating_point():
            return str(name)
    kinds = {name: getattr(value, "dtype", type(value).__name__) for name, value in names.items()}
    raise ValueError(f"no floating-point input among {kinds}; saliency needs pixel_values, input_values or the like")


@contextmanager
def undisturbed(model: nn.Module, inputs: Tensor) -> Iterator[None]:
    """Eval mode and gradients on inside; each module's own mode and the random number generators restored outside."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [inputs.device] if inputs.device.type not in ("cpu", "meta") else []
    kind = inputs.device.type if devices else "cuda"
    try:
        model.eval()
        with torch.random.fork_rng(devices, device_type=kind), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def class_logits(model: nn.Module, inputs: Mapping[str, Any], rows: int) -> Tensor:
    """(rows, classes) logits of a classifier, hooks on the model itself left out.

    Raises:
        ValueError: something else came out.
    """
    output = model.forward(**inputs)
    logits = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != rows:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} returned {shape} for {rows} labels; saliency needs a classifier with logits "
            "(batch, classes)"
        )
    return logits


def summed_cross_entropy(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Cross entropy of the model's own logits, summed over the batch, so that each sample's gradient stands alone."""
    logits = class_logits(model, inputs, labels.shape[0])
    if not labels.is_floating_point() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, "
            f"the model has {logits.shape[1]} classes; check num_labels"
        )
    if labels.is_floating_point() and labels.shape != logits.shape:
        raise ValueError(
            f"soft labels are {tuple(labels.shape)}, logits {tuple(logits.shape)}; give a share for each class"
        )
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def objective_gradient(
    model: nn.Module, inputs: Mapping[str, Any], objective: Callable[[nn.Module, Mapping[str, Any]], Tensor]
) -> Tensor:
    """Gradient of `objective(model, inputs)`, a scalar, with respect to the main input; see `input_gradient`."""
    name = main_input(model, inputs)
    with undisturbed(model, inputs[name]):
        leaf = inputs[name].detach().clone().requires_grad_()
        return torch.autograd.grad(objective(model, {**inputs, name: leaf}), leaf)[0]


def input_gradient(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Gradient of the cross entropy with respect to the images or sounds.

    Taken in eval mode: no dropout, no update of batch statistics. No parameter gets a gradient, no random number is
    used up, and every module's mode is restored, also when the model raises. Hooks on `model` itself do not run.

    Args:
        model: a classifier whose output has `.logits` (B, classes); wrappers of DDP and `torch.compile` are looked through
            (the pass is not compiled).
        inputs: the model's keyword arguments without labels; the main input is a floating-point tensor.
        labels: (B,) int64 classes or (B, classes) float soft labels.

    Returns:
        Tensor like the main input, detached: each sample's own gradient, not divided by the batch size.

    Raises:
        ValueError: no floating-point input, no logits (batch, classes), or `nn.DataParallel`.

    Source: section 3.4.
    Cost: one forward, and one backward to the inputs only.

    Example:
        >>> head = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> input_gradient(head, {"input": torch.ones(3, 1, 2, 2)}, torch.tensor([0, 1, 1])).shape
        torch.Size([3, 1, 2, 2])
    """
    model = unwrapped(model)
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be the model's keyword arguments by name, got {brief(inputs)}")
    name = main_input(model, inputs)
    check_tensor(f"inputs[{name!r}]", inputs[name])
    check_tensor("labels", labels, floating=None)
    if labels.is_floating_point():
        check_shares("soft labels", labels, (len(inputs[name]), "classes"))
    else:
        labels = check_tensor("labels", labels, (len(inputs[name]),), floating=False).long()
    return objective_gradient(model, inputs, lambda module, given: summed_cross_entropy(module, given, labels))


def saliency_map(gradient: Tensor) -> Tensor:
    """Size of the gradient at each place: root mean square over channels.

    Args:
        gradient: (B, C, H, W) images, (B, time, mel) spectrograms or (B, samples) waveforms.

    Returns:
        (B, H, W), (B, time, mel) or (B, samples) float32, >= 0.

    Raises:
        ValueError: another number of dimensions.

    Source: section 3.4.
    Differs: the text's l2 norm is this times the root of the number of channels (reference code: mean); maps are
        normalized before use.
    """
    check_tensor("gradient", gradient)
    if gradient.ndim not in (2, 3, 4):
        raise ValueError(
            f"gradient has shape {tuple(gradient.shape)}; give (B, C, H, W), (B, time, mel) or (B, samples)"
        )
    gradient = gradient.float()
    return gradient.square().mean(dim=1).sqrt() if gradient.ndim == 4 else gradient.abs()


def input_saliency(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Saliency maps of a batch: `saliency_map(input_gradient(...))`.

    Args:
        model, inputs, labels: as `input_gradient`.

    Returns:
        (B, H, W), (B, time, mel) or (B, samples) float32, >= 0, not normalized.

    Raises:
        ValueError: as `input_gradient` and `saliency_map`.

    Source: section 3.4.

    Example:
        >>> head = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> input_saliency(head, {"input": torch.ones(1, 3, 2, 2)}, torch.tensor([1])).shape
        torch.Size([1, 2, 2])
    """
    return saliency_map(input_gradient(model, inputs, labels))


class SaliencyExtractor:
    """Adds a column of saliency maps to a data set, as a batched `Dataset.map` callable.

    For collators that take their saliency from a column (`saliency="saliency"`): maps of a trained model, made once.

    Args:
        model: a classifier. It is hashed with its weights by `datasets`.
        processor: maps a column's values to model inputs. None: the column holds arrays of the model's input already.
        column: column to read.
        label_column: column of int classes.
        key: the model's keyword, for a column of arrays. None: the model's `main_input_name`.
        output: name of the new column.

    Raises:
        ValueError: a column is missing.

    Source: section 3.4.
    Differs: the text takes the gradient of the model in training, at every step.
    Cost: one forward and one backward to the inputs per row; 4 bytes a pixel. Where a batch does not fit the device, it goes on
        in halves of it, and says so.

    Example:
        >>> dataset.map(SaliencyExtractor(model), batched=True, batch_size=64)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Callable[..., Any] | None = None,
        *,
        column: str = "pixel_values",
        label_column: str = "labels",
        key: str | None = None,
        output: str = "saliency",
    ) -> None:
        self.model, self.processor = unwrapped(model), optional(check_callable, "processor", processor)
        if next(self.model.parameters(), None) is None:
            raise ValueError(f"{type(self.model).__name__} has no weights; give a classifier")
        self.column = check_text("column", column, empty=False)
        self.label_column = check_text("label_column", label_column, empty=False)
        self.output = check_text("output", output, empty=False)
        key = optional(check_text, "key", key, empty=False)
        self.key = str(key or getattr(model, "main_input_name", "pixel_values"))
        self._room = Room("parts of {} rows")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One float32 map per row of the batch."""
        check_kind("batch", batch, Mapping, "use dataset.map(..., batched=True)")
        for name in (self.column, self.label_column):
            if name not in batch:
                raise ValueError(f"the batch has columns {list(batch)}, not {name!r}; set column= or label_column=")
        weight = next(self.model.parameters())
        values = column_values(batch, self.column)
        if self.processor is None:
            made = {self.key: torch.from_numpy(stacked(*read_rows(values, read_array, what="row of the batch")[:2]))}
        else:
            shown = read_rows(values, lambda value: read_picture(value) if is_picture(value) else value)[0]
            made = dict(self.processor(shown, return_tensors="pt"))
        given = check_array(self.label_column, batch[self.label_column], 1, kinds="iu", rows=len(values))
        labels, total = torch.from_numpy(given.astype(np.int64)), len(given)
        maps: list[np.ndarray] = []

        def work(start: int, stop: int) -> None:
            part = rows_of(made, start, stop, total, weight.device, weight.dtype)
            maps.append(input_saliency(self.model, part, labels[start:stop].to(weight.device)).cpu().numpy())

        self._room.parts(total, work, weight.device)
        return {self.output: np.concatenate(maps)}
