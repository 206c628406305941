"""Every version check and every private or easily moved symbol of transformers, peft and datasets that we touch.

Each with the reason why the public surface is not enough.
"""

from __future__ import annotations
