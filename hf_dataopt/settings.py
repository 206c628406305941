"""What every method's settings share: a JSON round trip, and checks that say what was given and what is needed."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self


class Settings:
    """Base of the frozen, keyword-only config dataclasses."""

    METHOD: ClassVar[str] = ""  # what messages call the method

    def to_json_string(self) -> str:
        """The settings as one JSON object."""
        own: Any = self
        return json.dumps(asdict(own))

    @classmethod
    def from_json_string(cls, text: str) -> Self:
        """Settings from `to_json_string`'s output.

        Raises:
            ValueError: not JSON, or a field this version does not know.
        """
        known: Any = cls
        values: dict[str, Any] = json.loads(text)
        unknown = sorted(set(values) - {field.name for field in fields(known)})
        if unknown:
            raise ValueError(f"unknown {cls.METHOD} settings {unknown}; were they written by a newer version?")
        return cls(**values)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:  # NaN too
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def check_int(name: str, value: Any, least: int) -> None:
    """Refuse what is no integer, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
