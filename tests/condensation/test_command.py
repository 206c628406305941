"""What `hf-dataopt condense` and the demo show of accuracies."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hf_dataopt.condensation.command import show
from hf_dataopt.condensation.evaluation import Score, scores_as_rows


def _shown(networks: list[str]) -> tuple[str, list[dict[str, Any]]]:
    rows = scores_as_rows(
        {
            name: [
                Score(accuracies=(accuracy, accuracy + 1), network=network, epochs=300, images=images)
                for network in networks
            ]
            for name, images, accuracy in (("random images", 10, 60.83), ("mosaics before", 40, 79.44))
        }
    )
    out = io.StringIO()
    show({"images": 10, "classes": 10, "losses": [], "scores": rows}, Console(file=out, width=80))
    return out.getvalue(), rows


@pytest.mark.parametrize("networks", [["convnet-3"], ["convnet-3", "resnet10"]])
def test_accuracies_can_be_read_on_80_characters(networks: list[str]) -> None:
    text, rows = _shown(networks)
    assert "…" not in text and "hard-label" not in text  # which no row has
    for row in rows:
        assert all(str(row[name]) in text for name in ("trained on", "images", "accuracy", "spread", "network"))
    below = text.splitlines()[-1].strip()
    assert below == ("network convnet-3, epochs 300, seeds 2" if len(networks) == 1 else "epochs 300, seeds 2")
