"""Which gates scored the pairs of a cache: scores of others cannot be held against theirs."""

from __future__ import annotations

from typing import Any

from ..settings import check_kind, optional
from .gates import KVzipGates


class ScoredBy:
    """A cache that may have gates: those that scored its pairs, and score what comes after them.

    Attributes:
        scored_by: digest of the gates that scored the pairs; None for any other score.
    """

    scored_by: str | None = None
    _gates: KVzipGates | None = None

    def score_by(self, gates: KVzipGates) -> None:
        """Say that these gates have scored the pairs, and are at hand."""
        self.scored_by = gates.digest
        self.gates = gates

    @property
    def gates(self) -> KVzipGates | None:
        """Gates at hand; None for another score, or behind a file, which holds their scores and not the gates."""
        return self._gates

    @gates.setter
    def gates(self, gates: Any) -> None:
        """Give a cache that was read from a file its gates again.

        Raises:
            TypeError: no gates.
            ValueError: other gates than those that scored the cache.
        """
        optional(check_kind, "gates", gates, KVzipGates)
        if gates is not None and gates.digest != self.scored_by:
            who = "another score" if self.scored_by is None else f"gates {self.scored_by}"
            raise ValueError(
                f"the pairs of this cache were scored by {who}, not by these gates ({gates.digest}); give those, or read the "
                "context again with gates="
            )
        self._gates = gates
