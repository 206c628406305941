"""All families by name.

Every model is random and seeded, has two layers (more where a pattern of layers needs it) and a vocabulary of 264 tokens, so
that `byte_tokenizer` fits. Weights are scaled up: attention is not flat, and a lost key changes the logits.
"""

from __future__ import annotations

from .dense import DENSE
from .family import Family
from .hybrid import HYBRID
from .mixtures import MIXTURES
from .multimodal import MULTIMODAL
from .older import OLDER

FAMILIES: dict[str, Family] = {**DENSE, **MIXTURES, **OLDER, **HYBRID, **MULTIMODAL}


def available() -> dict[str, Family]:
    """The families that the installed transformers has."""
    return {name: family for name, family in FAMILIES.items() if family.available}
