"""Every public callable with good arguments and the kind of each."""

from __future__ import annotations

from functools import lru_cache

from . import ccm, condensation, configs, kvzip, mixup, publishing, relation, shared
from .pool import Case


@lru_cache(maxsize=1)
def cases() -> dict[str, Case]:
    """By name, in the order of the rooms."""
    rooms = (configs, relation, mixup, kvzip, ccm, condensation, shared, publishing)
    return {name: case for room in rooms for name, case in room.cases().items()}
