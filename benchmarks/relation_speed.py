"""Time and memory of scoring all rows: ours, the bare products, the reference code's loop, cleanlab's Datalab.

    python benchmarks/relation_speed.py [--smoke] [--part scores|fit]

Synthetic clusters, C = 100 classes, float32, one thread. CPU-seconds, the median of `--repeats` runs in one process per
method and size; "bare" is f f^T + p p^T in row blocks of 1,000, nothing else. Working memory is the peak resident size above
what the process held with the inputs loaded. The reference loop is the transcription in tests/reference. Part `fit`: the
whole of `RelationCleaner.fit` (scores, nearest rows, near duplicates, probabilities, outliers), the same without nearest rows
and what is made of them ("plain"), Datalab's label, outlier and near-duplicate issues, on the same arrays, and the products of
each pair of rows alone ("half bare": the upper triangle of f f^T and p p^T in tiles of 512), that nothing exact does without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import write

HERE = Path(__file__).resolve().parent
CLASSES = 100
METHODS = ("ours", "bare", "reference", "datalab label", "datalab all")
FITS = ("fit", "plain", "datalab all", "half bare")
LARGEST = {"reference": 20_000, "datalab label": 20_000, "datalab all": 10_000, "bare": 50_000, "ours": 50_000}


def inputs(n: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clustered features after a ReLU, probabilities, labels with 5 % errors."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, n)
    centres = rng.standard_normal((CLASSES, d), np.float32)
    features = np.maximum(centres[labels] + rng.standard_normal((n, d), np.float32), 0)
    logits = rng.standard_normal((n, CLASSES), np.float32)
    logits[np.arange(n), labels] += 6
    probs = np.exp(logits)
    wrong = rng.random(n) < 0.05
    labels = np.where(wrong, rng.integers(0, CLASSES, n), labels)
    return features, probs / probs.sum(1, keepdims=True), labels


def job(method: str, features: np.ndarray, probs: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """What is timed."""
    f, p, y = torch.from_numpy(features), torch.from_numpy(probs), torch.from_numpy(labels)
    if method == "ours":
        from hf_dataopt.relation.config import RelationConfig
        from hf_dataopt.relation.graph import RelationGraph
        from hf_dataopt.relation.label_noise import find_label_noise
        from hf_dataopt.relation.rows import rows_of

        def ours() -> Any:
            graph = RelationGraph(rows_of(f, "features"), rows_of(p, "probs"), labels, RelationConfig())
            initial = -graph.relation_sums(quiet=True)
            if os.environ.get("RELATION_PASSES") == "0":
                return initial
            return find_label_noise(initial, lambda rows: -graph.sums_against(rows, quiet=True), graph.config)

        return ours
    if method in ("fit", "plain"):
        return whole_fit(features, probs, labels) if method == "fit" else plain_fit(features, probs, labels)
    if method == "half bare":

        def half_bare() -> None:
            unit, out = f / f.norm(dim=1, keepdim=True), torch.empty(512, 512)
            for i in range(0, len(f), 512):
                for j in range(i, len(f), 512):
                    for side in (unit, p):
                        a, b = side[i : i + 512], side[j : j + 512]
                        torch.mm(a, b.T, out=out[: len(a), : len(b)])

        return half_bare
    if method == "bare":

        def bare() -> None:
            for start in range(0, len(f), 1000):
                f[start : start + 1000] @ f.T
                p[start : start + 1000] @ p.T

        return bare
    if method == "reference":
        sys.path.insert(0, str(HERE.parent))
        from tests.reference.relation import reference_scores

        return lambda: reference_scores(f, p, y)
    from cleanlab import Datalab

    issues: dict[str, Any] = (
        {"label": {}} if method.endswith("label") else {"label": {}, "outlier": {}, "near_duplicate": {}}
    )

    def datalab() -> None:
        lab = Datalab({"label": labels}, label_name="label", verbosity=0)
        more = {} if method.endswith("label") else {"pred_probs": probs}
        lab.find_issues(features=features, issue_types=issues, **more)

    return datalab


def whole_fit(features: np.ndarray, probs: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """Everything that a report holds."""
    from relation_quality import dataset_of

    from hf_dataopt.relation.cleaner import RelationCleaner

    data = dataset_of(features, probs, labels)
    return lambda: RelationCleaner().fit(data, quiet=True)


def plain_fit(features: np.ndarray, probs: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """The dissertation's scores, Algorithm 4 and outlier scores, without nearest rows and what is made of them."""
    from hf_dataopt.relation.config import RelationConfig
    from hf_dataopt.relation.graph import RelationGraph
    from hf_dataopt.relation.label_noise import find_label_noise
    from hf_dataopt.relation.outlier import reference_rows, scores_of
    from hf_dataopt.relation.rows import rows_of
    from hf_dataopt.relation.tiles import ReferenceSums

    def plain() -> Any:
        graph = RelationGraph(rows_of(features, "features"), rows_of(probs, "probs"), labels, RelationConfig())
        reference = reference_rows(len(graph), graph.config)
        outside = ReferenceSums(len(graph), reference, graph.config.outlier_temperature)
        initial = -graph.relation_sums(outside=outside, quiet=True)
        found = find_label_noise(initial, lambda rows: -graph.sums_against(rows, quiet=True), graph.config)
        return found, scores_of(outside.sums.total(graph.device), graph.config)

    return plain


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(method: str, n: int, d: int, repeats: int) -> dict[str, float]:
    """Median CPU-seconds and peak memory above the inputs, in this process."""
    torch.set_num_threads(1)
    run = job(method, *inputs(n, d))
    job(method, *inputs(500, d))()  # loads and warms everything
    Path("/proc/self/clear_refs").write_text("5")
    before, taken = resident("VmRSS"), []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return {"cpu_s": statistics.median(taken), "mb": (resident("VmHWM") - before) / 1e6}


def apart(method: str, n: int, d: int, repeats: int, **environment: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--one", method, str(n), str(d), str(repeats)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{method} at {n} x {d} failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fit_rows(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Whole fits beside plain ones and Datalab."""
    rows = []
    for n in sizes:
        found = {method: apart(method, n, 384, repeats) for method in FITS}
        row: dict[str, Any] = {"n": n, "d": 384, "repeats": repeats}
        row |= {f"{method} s": one["cpu_s"] for method, one in found.items()}
        row |= {f"fit / {peer}": found["fit"]["cpu_s"] / found[peer]["cpu_s"] for peer in FITS[1:]}
        rows.append(row | {f"{method} MB": round(one["mb"], 1) for method, one in found.items()})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    """Measure every method and size, write `results/relation_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2,000 rows, once, no file")
    parser.add_argument("--part", choices=("scores", "fit"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, *numbers = args.one
        print(json.dumps(measure(method, *map(int, numbers))))
        return
    if args.part != "scores":
        fits = fit_rows([2_000] if args.smoke else [5_000, 10_000, 20_000], 1 if args.smoke else args.repeats)
        write(
            "relation_speed_fit_smoke" if args.smoke else "relation_speed_fit", fits, classes=CLASSES, note="one thread"
        )
    if args.part == "fit":
        return
    sizes = [(2_000, 384)] if args.smoke else [(n, d) for n in (5_000, 10_000, 20_000, 50_000) for d in (384, 768)]
    rows = []
    for n, d in sizes:
        repeats = 1 if args.smoke or n > 20_000 else args.repeats
        found = {m: apart(m, n, d, repeats) for m in METHODS if n <= LARGEST[m]}
        sums = apart("ours", n, d, repeats, RELATION_PASSES="0")
        row: dict[str, Any] = {"n": n, "d": d, "repeats": repeats, "sums only s": sums["cpu_s"]}
        row |= {f"{m} s": found[m]["cpu_s"] if m in found else None for m in METHODS}
        for peer in METHODS[1:]:
            row[f"ours / {peer}"] = found["ours"]["cpu_s"] / found[peer]["cpu_s"] if peer in found else None
        row |= {f"{m} MB": round(found[m]["mb"], 1) if m in found else None for m in METHODS}
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    write(
        "relation_speed_smoke" if args.smoke else "relation_speed",
        rows,
        classes=CLASSES,
        note="one thread, CPU-seconds",
    )


if __name__ == "__main__":
    main()
