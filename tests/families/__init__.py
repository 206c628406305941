"""Tiny models of many families; `python -m tests.families --table` shows what each method does with every one of them."""

from .family import EITHER, EXACT, REFUSED, Family
from .models import FAMILIES, available

__all__ = ["EITHER", "EXACT", "FAMILIES", "REFUSED", "Family", "available"]
