"""The hash that tells models apart: by values, names and shapes, not by storage."""

from __future__ import annotations

import torch

from hf_dataopt.publishing.identity import weight_digest


def test_equal_values_hash_equal_and_every_change_shows() -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    found = weight_digest([("w", weight)])
    assert len(found) == 16 and int(found, 16) >= 0
    assert found == weight_digest([("w", weight.T.contiguous().T)])
    assert found == weight_digest([("w", weight), ("away", torch.empty(3, device="meta"))])
    away = ("away", torch.empty(3, device="meta"))  # offloaded, whatever comes first
    assert weight_digest([away, ("w", weight)]) == found and len(weight_digest([away])) == 16
    changed = weight.clone()
    changed[0, 0] += 1
    others = [[("v", weight)], [("w", weight.view(50, 6))], [("w", changed)], [("w", weight.half())], []]
    assert len({found, *(weight_digest(other) for other in others)}) == 6
