"""What `cache.inputs` returns: keyword arguments that fit the installed transformers, under either name of the cache."""

from __future__ import annotations

from typing import Any

from .._compat import CACHE_NAMES, cache_keyword


class CallInputs(dict[str, Any]):
    """A dict of keyword arguments for `generate` and `forward`.

    Releases name the cache's keyword `past_key_values` or, from 5.24 on, `cache`. Stored is the installed release's name, so
    that `**inputs` fits; both names read and write the same entry.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(_stored(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_stored(key), value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(_stored(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_stored(key) if isinstance(key, str) else key)

    def __or__(self, other: Any) -> CallInputs:  # type: ignore[override]
        joined = self.copy()
        joined.update(other)
        return joined

    def __ror__(self, other: Any) -> CallInputs:  # type: ignore[override]
        joined = CallInputs(other)
        joined.update(self)
        return joined

    def __ior__(self, other: Any) -> CallInputs:  # type: ignore[override]
        self.update(other)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`, under either name."""
        return super().get(_stored(key), default)

    def pop(self, key: str, *default: Any) -> Any:
        """As `dict.pop`, under either name."""
        return super().pop(_stored(key), *default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As `dict.setdefault`, under either name."""
        return super().setdefault(_stored(key), default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As `dict.update`, under either name."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def copy(self) -> CallInputs:
        """A shallow copy that knows both names too."""
        return CallInputs(self)


def _stored(key: str) -> str:
    return cache_keyword() if key in CACHE_NAMES else key
