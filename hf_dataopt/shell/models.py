"""The language model that a command names, where it shall run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..progress import told
from ..text.demo_model import load_demo_model
from .options import device_of
from .usage import check_revision


def load_language_model(
    name: str | None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Any, Any]:
    """Model and tokenizer, in evaluation mode.

    Args:
        name: Hub name or folder; None is the packaged one.
        device: where it shall run, default the first that is there.
        dtype: name of the weights' dtype.
        revision, token: of the Hub.

    Raises:
        UsageError: a revision of a model that is on this machine.
        ValueError: it cannot be loaded.
    """
    import torch

    check_revision(revision, name or "the packaged model", name is None or Path(name).is_dir())
    place = device_of(device)
    try:
        model, tokenizer = load_demo_model(name, dtype=getattr(torch, dtype), revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: cannot be loaded ({told(error)})") from error
    moved: Any = model
    return moved.to(torch.device(place)), tokenizer
