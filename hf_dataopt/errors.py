"""Exceptions a caller may want to handle by name; bad arguments raise plain `ValueError` or `TypeError`."""


class UnsupportedModelError(ValueError):
    """The model's architecture is not one the method was written and tested for. Nothing was computed."""


class DroppedTokensError(ValueError):
    """A call with a compressed cache would silently lose prompt tokens or misplace them."""


class MissingExtraError(ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'hf-dataopt[{extra}]'")


class HubError(RuntimeError):
    """A call to the Hub failed; where it was an upload, the repository holds what it held before."""


class FolderInUseError(RuntimeError):
    """Another job is writing to the same output folder. Nothing was read or written there."""


class BadRowError(ValueError):
    """A row of a data set cannot be read.

    Args:
        row: its number.
        why: what is wrong, as in "holds no image".
        what: what the number counts.
    """

    def __init__(self, row: int, why: str, what: str = "row") -> None:
        super().__init__(f"{what} {row} {why} (on_error='skip' leaves such rows out and counts them)")
        self.row, self.why = row, why
