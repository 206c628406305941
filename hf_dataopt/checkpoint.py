"""State of a long tile pass on disk: one safetensors file, replaced atomically, so that a kill costs one stripe at most."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)


class PassCheckpoint:
    """Named vectors and a counter of one pass, saved every few seconds and found again after a kill.

    Args:
        path: file to write; None keeps nothing.
        key: what the numbers depend on (data, settings, split over processes); another key starts afresh.
        every_seconds: least time between two writes.
    """

    def __init__(self, path: Path | None, key: str, every_seconds: float = 1.0) -> None:
        self.path, self.key, self.every_seconds = path, key, every_seconds
        self._written = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """(finished stripes, vectors) of an earlier run with the same key, or None."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
                if about.get("key") != self.key:
                    logger.warning("%s was written for other data or settings; starting afresh", self.path)
                    return None
                return int(about["done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            logger.warning("%s cannot be read (%s); starting afresh", self.path, error)
            return None

    def save(self, done: int, vectors: dict[str, Tensor], *, force: bool = False) -> None:
        """Write the state if `every_seconds` have passed since the last write, or when forced."""
        if self.path is None or not (force or time.monotonic() - self._written >= self.every_seconds):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}.tmp")
        save_file(vectors, draft, metadata={"about": json.dumps({"key": self.key, "done": done})})
        os.replace(draft, self.path)
        self._written = time.monotonic()


def clone(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors that own their memory (a loaded file's may be mapped)."""
    return {name: torch.clone(value) for name, value in vectors.items()}
