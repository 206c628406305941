"""The picture of what mixing is worth: points over plain training, by images, width, epochs and resolution.

    python benchmarks/mixup_figure.py    # from results/mixup_accuracy.json and mixup_gpu.json to docs/pictures/mixup_curve.png

Each point is the mean over seeds of the difference to the plain network of the same seed; bars are standard deviations over
seeds, a hollow mark is one seed. A method has its best learning rate where rates were tried (500 and 2,000 images of 16 x 16
at 30 epochs, 2,000 of 32 x 32), else 0.3, at 32 x 32 the best one at 2,000 images.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from _report import RESULTS
from mixup_accuracy import CURVE, CURVE_RATE, FEW, Setting, best_rates, rate_of
from mixup_gpu import SMALL, tuned_at

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "mixup_curve.png"
METHODS = {
    "input mixup": ("input mixup", "0.55", "v"),
    "cutmix": ("CutMix", "C0", "s"),
    "puzzle": ("Puzzle Mix", "C3", "o"),
    "comixup + clean": ("Co-Mixup + clean loss", "C2", "D"),
}
WIDTHS = {8: CURVE["width 8"], 16: Setting(), 32: CURVE["width 32"]}
MANY = "10000 images, 15 epochs"
PANELS: dict[str, dict[str, Setting]] = {
    "images (16 x 16, 30 epochs)": {
        "500": FEW,
        "1,000": CURVE["1000 images"],
        "2,000": Setting(),
        "10,000,\n15 epochs": CURVE[MANY],
    },
    "width (2,000 images)": {str(width): setting for width, setting in WIDTHS.items()},
    "epochs (2,000 images)": {"30": Setting(), "60": CURVE["60 epochs"]},
    "32 x 32 pixels": {
        "2,000 images,\n60 epochs": SMALL,
        "10,000 images,\n20 epochs": replace(SMALL, images=10_000, epochs=20),
    },
}

Runs = list[dict[str, Any]]


def by_seed(runs: Runs, setting: Setting, method: str, rate: float) -> dict[int, float]:
    """Accuracies in percent."""
    about = {"setting": asdict(setting), "method": method, "rate": rate}
    return {run["seed"]: 100 * run["accuracy"] for run in runs if about.items() <= run.items()}


def rates_of(runs: Runs, setting: Setting) -> dict[str, float]:
    """Each method's rate in a setting; empty: none was chosen there."""
    return best_rates(runs, tuned_at(setting) if setting.side == SMALL.side else setting)


def points(runs: Runs, setting: Setting) -> tuple[float, dict[str, list[float]]] | None:
    """Accuracy of plain training, and every method's differences to it; None: it was not run."""
    tuned = rates_of(runs, setting)
    tried = len({run["rate"] for run in runs if run["setting"] == asdict(setting)}) > 1

    def rate(method: str) -> float:
        return rate_of(method, tuned) if tried or setting.side == SMALL.side else CURVE_RATE

    plain = by_seed(runs, setting, "plain", rate("plain"))
    found = {}
    for method in METHODS:
        theirs = by_seed(runs, setting, method, rate(method))
        found[method] = [value - plain[seed] for seed, value in theirs.items() if seed in plain]
    return (statistics.mean(plain.values()), found) if plain else None


def panel(axis: Any, found: dict[str, tuple[float, dict[str, list[float]]]]) -> None:
    """A line a method over the panel's settings."""
    for index, (method, (label, color, marker)) in enumerate(METHODS.items()):
        there = [(place, gains[method]) for place, (_, gains) in enumerate(found.values()) if gains[method]]
        shift = 0.07 * (index - 1.5)
        means = [statistics.mean(values) for _, values in there]
        axis.plot([place + shift for place, _ in there], means, color=color, linewidth=1.3, label=label)
        for (place, values), mean in zip(there, means, strict=True):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            face = color if spread else "white"
            axis.errorbar(
                place + shift, mean, spread, color=color, marker=marker, markersize=5, markerfacecolor=face, capsize=2
            )
    axis.axhline(0, color="0.3", linewidth=0.9, linestyle="--")
    axis.set_xticks(range(len(found)), [f"{name}\n({plain:.1f})" for name, (plain, _) in found.items()], fontsize=8)
    axis.set_xlim(-0.4, len(found) - 0.6)
    axis.grid(axis="y", color="0.92")


def draw(runs: Runs, full: Runs, path: Path) -> None:
    """Write the picture.

    Args:
        runs: of `mixup_accuracy`.
        full: of `mixup_gpu`.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    widths = [len(settings) + 0.4 for settings in PANELS.values()]
    figure = Figure(figsize=(11, 3.3))
    axes = figure.subplots(1, len(PANELS), sharey=True, gridspec_kw={"width_ratios": widths})
    for axis, (title, settings) in zip(axes, PANELS.items(), strict=True):
        measured = ((name, points(full if one.side == SMALL.side else runs, one)) for name, one in settings.items())
        panel(axis, {name: one for name, one in measured if one is not None})
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("points over plain training", fontsize=9)
    axes[0].legend(
        fontsize=8, frameon=False, loc="lower left", title="in brackets: plain training, %", title_fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the results, draw."""
    runs, full = (
        json.loads((RESULTS / f"{name}.json").read_text())["runs"] for name in ("mixup_accuracy", "mixup_gpu")
    )
    draw(runs, full, PICTURE)


if __name__ == "__main__":
    main()
