"""The share of full context that a memory recovers, over training samples: `docs/pictures/ccm_recovered.png`.

    python benchmarks/ccm_figure.py

Drawn from `results/ccm_quality.json` and `ccm_quality_sections.json` (a CPU, batches of 2) and `ccm_quality_gpu.json` (batches
of 64, all distilled); bars are 95 % bootstraps over test items. A run's base is fine-tuned on its own machine, so that points
of one machine are comparable, and those of two only roughly. Dotted: what was aimed for.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _report import HERE, RESULTS

FILES = {"ccm_quality": ("CPU", "o"), "ccm_quality_sections": ("CPU", "o"), "ccm_quality_gpu": ("GPU", "s")}
COLOURS = {"concat": "C3", "merge": "C0"}
AIMED = {"chitchat": 0.5, "sections": 0.7}
TICKS = (400, 1000, 4000, 16_000)
PICTURE = HERE.parent / "docs" / "pictures" / "ccm_recovered.png"
_NAME = re.compile(r"(concat|merge), (\d+) steps(, .*)?$")
OTHER = ", other memory"


def points() -> list[dict[str, Any]]:
    """Every trained adapter of the files, and the same with the memory of another item ("control")."""
    found = []
    for file, (where, marker) in FILES.items():
        record = json.loads((RESULTS / f"{file}.json").read_text())
        for row in record["rows"]:
            match = _NAME.match(row["method"].removesuffix(OTHER))
            if match is None:
                continue
            found.append({
                "task": row["task"], "kind": match[1], "samples": int(match[2]) * record["batch"], "where": where,
                "share": row["recovered"], "spread": json.loads(row["95 %"]), "marker": marker,
                "control": row["method"].endswith(OTHER), "faster": "lr 0.003" in (match[3] or ""),
            })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="draw, and keep nothing")
    smoke = parser.parse_args().smoke
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / PICTURE.name if smoke else PICTURE
        draw(path)
        print(f"drawn: {path.name}")


def draw(path: Path) -> None:
    """Both tasks side by side, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 3.1))
    axes, every = figure.subplots(1, 2, sharey=True), points()
    for axis, (task, aim) in zip(axes, AIMED.items(), strict=True):
        axis.axhline(1, color="0.4", linestyle="--", linewidth=0.9)
        axis.axhline(0, color="0.4", linewidth=0.9)
        axis.axhline(aim, color="C2", linestyle=":", linewidth=1.2)
        for one in (one for one in every if one["task"] == task):
            colour = "0.65" if one["control"] else COLOURS[one["kind"]]
            label = "another item's memory" if one["control"] else f"{one['kind']}, {one['where']}"
            label += ", lr 3e-3" if one["faster"] and not one["control"] else ""
            spread = [[one["share"] - one["spread"][0]], [one["spread"][1] - one["share"]]]
            axis.errorbar(
                one["samples"] * (1.06 if one["kind"] == "merge" else 1), one["share"], spread, color=colour, markersize=4.5,
                marker="^" if one["faster"] else one["marker"], capsize=2, linewidth=1, label=label,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
        axis.minorticks_off()
        axis.set_xlim(300, 26_000)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("training samples", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.93")
    axes[0].set_ylabel("recovered of the NLL gap", fontsize=8)
    handles = {}
    for axis in axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    edge = 0.77
    figure.legend(
        handles.values(), handles.keys(), loc="center left", bbox_to_anchor=(edge, 0.5), fontsize=7, frameon=False
    )
    figure.tight_layout(rect=(0, 0, edge, 1))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
