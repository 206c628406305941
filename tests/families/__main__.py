"""`python -m tests.families --table`: what KVzip and CCM do with every family, as a Markdown table.

Exit code 1 where a family is silently wrong, fails with another error than a refusal, or is refused though it must not be.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from ..ccm.exactness import measure as ccm_exactness
from ..kvzip.exactness import measure as kvzip_exactness
from .family import EXACT, REFUSED, Family
from .models import available
from .plain import own_difference

TOLERANCE = 1e-5


@dataclass
class Verdict:
    """What one method does with one family.

    Args:
        difference: largest logit difference, None where there is none to measure.
        refusal: why it was refused.
        error: any other exception.
        fits: whether this is what the family's entry demands.
    """

    difference: float | None
    refusal: str | None
    error: str | None
    fits: bool

    def __str__(self) -> str:
        text = self.refusal or self.error or f"{self.difference:.1e}"
        if self.refusal or self.error:
            word = "refused" if self.refusal else "ERROR"
            text = f"{word}: {' '.join(text.replace('|', '/').split())[:90]}"
        return text if self.fits else f"**{text}**"


def verdict(kind: str, measure: Callable[[], Any]) -> Verdict:
    """Run one measurement and hold it against what is demanded."""
    try:
        found = measure()
    except Exception as error:  # noqa: BLE001 - the table shows every error
        return Verdict(None, None, f"{type(error).__name__}: {error}", False)
    if found.refusal is not None:
        return Verdict(None, found.refusal, None, kind != EXACT and getattr(found, "plain", 0.0) <= TOLERANCE)
    return Verdict(found.difference, None, None, kind != REFUSED and found.difference <= TOLERANCE)


def layers_of(family: Family) -> str:
    """Kinds of cache layers, in order."""
    layers = DynamicCache(config=family.model().config.get_text_config(decoder=True)).layers
    names = [type(layer).__name__.replace("Dynamic", "").replace("Layer", "") or "Full" for layer in layers]
    return " ".join(names)


def rows(names: list[str]) -> list[dict[str, Any]]:
    """One row a family."""
    found = []
    for name, family in available().items():
        if names and name not in names:
            continue
        row: dict[str, Any] = {"family": name, "layers": layers_of(family), "notes": family.notes}
        row["plain"] = own_difference(family) if family.kvzip != REFUSED else None
        row["kvzip"] = verdict(family.kvzip, lambda family=family: kvzip_exactness(family))
        for memory in ("concat", "merge"):
            row[f"ccm_{memory}"] = verdict(
                family.ccm, lambda family=family, memory=memory: ccm_exactness(family, memory)
            )
        found.append(row)
    return found


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "" if value is None else str(value)


def markdown(found: list[dict[str, Any]]) -> str:
    """The rows as a table; bold is what must not be."""
    columns = ("family", "layers", "plain", "kvzip", "ccm_concat", "ccm_merge", "notes")
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in found]
    return "\n".join(lines)


def main() -> int:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=__doc__)
    parser.add_argument("--table", action="store_true", help="measure and print (the default)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these families only")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = rows(options.only)
    print(markdown(found))
    methods = ("kvzip", "ccm_concat", "ccm_merge")
    for method in methods:
        verdicts = [row[method] for row in found]
        exact = [one for one in verdicts if one.difference is not None and one.difference <= TOLERANCE]
        wrong = [one for one in verdicts if one.difference is not None and one.difference > TOLERANCE]
        refused, failed = [one for one in verdicts if one.refusal], [one for one in verdicts if one.error]
        print(f"{method}: {len(exact)} exact, {len(wrong)} wrong, {len(refused)} refused, {len(failed)} errors")
    if options.json:
        plain = [{key: vars(value) if key in methods else value for key, value in row.items()} for row in found]
        options.json.write_text(json.dumps({"transformers": transformers.__version__, "families": plain}, indent=1))
    return 0 if all(row[method].fits for row in found for method in methods) else 1


if __name__ == "__main__":
    sys.exit(main())
