"""The language model that a command names, where it shall run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..progress import told
from ..text.demo_model import load_demo_model
from .options import device_of
from .usage import UsageError


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

    if revision is not None and (name is None or Path(name).is_dir()):
        raise UsageError(
            f"--revision {revision}: {name or 'the packaged model'} is on this machine and has no revisions"
        )
    place = device_of(device)
    try:
        model, tokenizer = load_demo_model(name, dtype=getattr(torch, dtype), revision=revision, token=token)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: cannot be loaded ({told(error)})") from error
    moved: Any = model
    return moved.to(torch.device(place)), tokenizer
