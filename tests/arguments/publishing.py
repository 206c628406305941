"""Folders and the Hub."""

from __future__ import annotations

from typing import Any

from hf_dataopt.errors import HubError
from hf_dataopt.publishing.artifacts import fetch, push_folder
from hf_dataopt.publishing.info import describe
from hf_dataopt.publishing.kinds import KINDS

from .condensation import condensed, save_condensed
from .kvzip import FOLDER, HUB, LOAD
from .pool import Argument, Case, choice, saved


def _after_save(call: Any) -> Any:
    def saved_first(**arguments: Any) -> Any:
        saved("condensed", lambda folder: save_condensed(condensed(), folder))
        return call(**arguments)

    return saved_first


def cases() -> dict[str, Case]:
    """All of the room."""
    kind = Argument(lambda: "condensed_dataset", choice(*KINDS))
    return {
        "push_folder": Case(_after_save(push_folder), {"folder": FOLDER, **HUB}, (HubError,)),
        "fetch": Case(_after_save(fetch), {"source": FOLDER, "kind": kind, **LOAD}, (HubError,)),
        "describe": Case(_after_save(describe), {"source": FOLDER, **LOAD}, (HubError,)),
    }
