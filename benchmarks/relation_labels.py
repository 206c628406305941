"""What `RelationCleaner` ranks and drops, beside cleanlab and Datalab in the same run: labels, rare classes, copies.

    python benchmarks/relation_labels.py [--smoke] [--part labels|rare|copies|duplicates]

Labels: rows 0-9,999 and 20,000-29,999 of CIFAR-10 (EfficientNet-Lite0 features, logistic probe fitted on the noisy labels,
in-sample and out of 4 folds) with confusable flips and three columns of CIFAR-10N, and VADER tweets with one vote as label.
The mixture's constants were chosen on the even rows; `report` figures are those of the odd rows, over the same graph. F1 is
of the rows that `filter()` drops; `F1 at the true rate` of the same ranking, cut where the truth has its count. Rare: 8 % flips
in classes of 1,000 to 20 rows; what is done for small classes was chosen on rows 20,000-29,999. Copies: 20 wrong rows of which
0, 5 or 30 exact copies are added; the probe is fitted without them, or with them: out of 4 folds that they are dealt to as any
row, or by `out_of_sample_probs`, which keeps them together. Near duplicates: 300 copies of 5,000
CIFAR-10 rows, the same, encoded again or in another size, by features alone and by features and thumbnails; of Fashion-MNIST
rows by thumbnails alone. Pairs that are found before any is planted are not counted, nor copies of one of such with the other.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from _report import write
from data import (
    DataMissingError,
    cifar10,
    cifar10n,
    cifar_features,
    fashion_mnist,
    image_features,
    tweet_features,
    tweets,
)
from relation_quality import dataset_of, fit, folded, top2_flips

from hf_dataopt.metrics import average_precision
from hf_dataopt.relation import baselines
from hf_dataopt.relation.cleaner import RelationCleaner
from hf_dataopt.relation.cut import groups_of
from hf_dataopt.relation.picture_copies import joined, picture_copies
from hf_dataopt.relation.probe import out_of_sample_probs
from hf_dataopt.relation.rows import rows_of
from hf_dataopt.thumbnails import COLUMN, thumbnail

Array = np.ndarray
UNARY = ("loss", "margin", "jsd", "cwe", "tracin")
RARE = (1000, 800, 600, 400, 300, 200, 120, 80, 40, 20)


def f1(flagged: Array, wrong: Array) -> float:
    """Of a set of flagged rows."""
    return float(2 * (flagged & wrong).sum() / max(1, flagged.sum() + wrong.sum()))


def top(scores: Array, count: int) -> Array:
    """The `count` highest."""
    found = np.zeros(len(scores), bool)
    found[np.argsort(-scores, kind="stable")[: int(count)]] = True
    return found


def columns(n: int) -> Iterator[tuple[str, Array, Array, Array, float]]:
    """Name, features, given labels, true labels, C of the probe."""
    human = cifar10n()
    for start in (0, 20_000):
        features = cifar_features(start, start + 10_000)[:n]
        clean = np.asarray(human["clean_label"][start : start + n], np.int64)
        place = f"rows {start:,}"
        for seed in (0, 1) if start == 0 else (0,):
            yield f"flips {seed}, {place}", features, top2_flips(features, clean, seed), clean, 0.003
        for name in ("aggre_label", "random_label3", "worse_label"):
            yield f"{name}, {place}", features, np.asarray(human[name][start : start + n], np.int64), clean, 0.003
    votes = tweets()[1]
    mean = np.array([np.mean(v) for v in votes])
    keep = np.flatnonzero(np.abs(mean) >= 0.5)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        given = np.array([int(rng.choice(votes[i]) > 0) for i in keep])
        yield f"tweets {seed}", tweet_features()[keep], given, (mean[keep] > 0).astype(np.int64), 0.9


def label_rows(n: int) -> list[dict[str, Any]]:
    """Ranking and cut, ours and theirs."""
    from cleanlab import Datalab
    from cleanlab.filter import find_label_issues

    rows = []
    for name, features, labels, clean, c in columns(n):
        wrong = labels != clean
        late, rng = np.arange(len(labels)) % 2 == 1, np.random.default_rng(0)
        lab = Datalab({"label": labels}, label_name="label", verbosity=0)
        lab.find_issues(features=features, issue_types={"label": {}})
        theirs = -lab.get_issues("label")["label_score"].to_numpy()
        for kind in ("in-sample", "4-fold"):
            probs = fit(features, labels, c).predict_proba(features).astype(np.float32)
            probs = probs if kind == "in-sample" else folded(features, labels, c, 0)
            report = RelationCleaner(outlier_reference=100).fit(dataset_of(features, probs, labels), quiet=True)
            scores = {
                "ours": report.label_noise_score,
                "relation": report.parts["label_noise"],
                "loss": baselines.loss(probs, labels),
                "margin": baselines.margin(probs, labels),
                "jsd": baselines.jensen_shannon(probs, labels),
                "cwe": baselines.cwe(probs, labels),
                "tracin": baselines.tracin(features, probs, labels),
                "datalab": theirs,
            }
            ap = {key: average_precision(wrong[late], value[late]) for key, value in scores.items()}
            best = max((*UNARY, "datalab"), key=lambda key: ap[key])
            draws = [rng.choice(np.flatnonzero(late), late.sum()) for _ in range(100)]
            leads = [
                average_precision(wrong[d], scores["ours"][d]) - average_precision(wrong[d], scores[best][d])
                for d in draws
            ]
            issues = find_label_issues(labels, probs)
            row: dict[str, Any] = {"labels": name, "probs": kind, "noise": wrong.mean(), "estimated": report.noise_rate}
            row |= {"AP report": ap["ours"], "relation": ap["relation"], "best of the others": best, "its AP": ap[best]}
            row |= {f"AP {key}": ap[key] for key in ("loss", "margin", "jsd", "datalab")}
            row |= {"lead, 2.5 %": np.percentile(leads, 2.5), "lead, 97.5 %": np.percentile(leads, 97.5)}
            row |= {"flagged": int(report.is_label_error.sum()), "F1": f1(report.is_label_error, wrong)}
            row |= {"F1 at the true rate": f1(top(report.label_noise_score, wrong.sum()), wrong)}
            row |= {"F1 report": f1(report.is_label_error[late], wrong[late])}
            row["F1 report, true rate"] = f1(top(report.label_noise_score[late], wrong[late].sum()), wrong[late])
            row |= {"F1 cleanlab": f1(issues, wrong), "F1 report, cleanlab": f1(issues[late], wrong[late])}
            rows.append({key: round(float(v), 4) if isinstance(v, float) else v for key, v in row.items()})
            print(rows[-1], flush=True)
    return rows


def rare_rows() -> list[dict[str, Any]]:
    """Clean rows dropped, in classes of at most 120 rows and in the others: sets that were chosen on, and the others."""
    from cleanlab.filter import find_label_issues

    rows = []
    for start, seeds in ((20_000, 5), (0, 6)):
        features = cifar_features(start, start + 10_000)
        clean = np.asarray(cifar10n()["clean_label"][start : start + 10_000], np.int64)
        pooled: dict[tuple[str, str], list[Array]] = {}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            order = rng.permutation(10)
            keep = [rng.permutation(np.flatnonzero(clean == c))[:size] for c, size in zip(order, RARE, strict=True)]
            rows_kept = np.sort(np.concatenate(keep))
            part, truth = features[rows_kept], clean[rows_kept]
            labels = top2_flips(part, truth, seed)
            few = np.isin(labels, order[[size <= 120 for size in RARE]])
            for kind in ("in-sample", "4-fold"):
                probs = fit(part, labels, 0.003).predict_proba(part).astype(np.float32)
                probs = probs if kind == "in-sample" else folded(part, labels, 0.003, seed)
                report = RelationCleaner(outlier_reference=100).fit(dataset_of(part, probs, labels), quiet=True)
                for who, flagged in (("ours", report.is_label_error), ("cleanlab", find_label_issues(labels, probs))):
                    right = labels == truth
                    counts = np.array(
                        [
                            (flagged & right & few).sum(),
                            (right & few).sum(),
                            (flagged & right & ~few).sum(),
                            (right & ~few).sum(),
                        ]
                    )
                    pooled.setdefault((kind, who), []).append(np.append(counts, f1(flagged, ~right)))
                    rows.append(_rare_row(start, str(seed), kind, who, pooled[kind, who][-1]))
                    print(rows[-1], flush=True)
        for (kind, who), found in pooled.items():
            rows.append(
                _rare_row(start, "all", kind, who, np.append(np.sum(found, axis=0)[:4], np.mean(found, axis=0)[4]))
            )
            print(rows[-1], flush=True)
    return rows


def _rare_row(start: int, seed: str, kind: str, who: str, counts: Array) -> dict[str, Any]:
    shares = counts[0] / counts[1], counts[2] / counts[3]
    row = {"rows": f"{start:,}", "seed": seed, "probs": kind, "who": who, "clean rare rows": int(counts[1])}
    row |= {"dropped of them": round(shares[0], 4), "dropped of clean common": round(shares[1], 4)}
    return row | {"times": round(shares[0] / max(shares[1], 1e-9), 2), "F1": round(counts[4], 4)}


def copy_rows(seeds: int) -> list[dict[str, Any]]:
    """Wrong rows found among their own copies."""
    features, clean = cifar_features()[:5000], np.asarray(cifar10n()["clean_label"][:5000], np.int64)
    rows = []
    for seed in range(seeds):
        labels = top2_flips(features, clean, seed)
        wrong = np.random.default_rng(seed).permutation(np.flatnonzero(labels != clean))[:20]
        in_sample = fit(features, labels, 0.003).predict_proba(features).astype(np.float32)
        out = folded(features, labels, 0.003, seed)
        for count in (0, 5, 30):
            again = np.concatenate([np.arange(5000), np.repeat(wrong, count)])
            data = dataset_of(features[again], in_sample[again], labels[again])
            said = {"in-sample, without the copies": in_sample[again], "4-fold, without the copies": out[again]}
            said["4-fold, each row in any fold"] = folded(features[again], labels[again], 0.003, seed)
            kept = out_of_sample_probs(data.remove_columns("probs"), seed=seed, quiet=True)
            said["out_of_sample_probs"] = kept.with_format("numpy")["probs"][:]
            for probe, probs in said.items():
                found = RelationCleaner(outlier_reference=100).fit(
                    dataset_of(features[again], probs, labels[again]), quiet=True
                )
                row = {"seed": seed, "copies": count, "probs": probe, "of": 20}
                row["found"] = int(found.is_label_error[wrong].sum())
                rows.append(row | {"F1 of the 5,000": round(f1(found.is_label_error[:5000], labels != clean), 4)})
                print(rows[-1], flush=True)
    return rows


def jpeg(images: Array, quality: int) -> Array:
    """The same pictures, encoded again."""
    from PIL import Image

    found = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(buffer)))
    return np.stack(found)


def resized(images: Array, side: int) -> Array:
    """The same pictures in another size."""
    from PIL import Image

    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in images])


REENCODED: dict[str, Callable[[Array], Array]] = {
    "exact": lambda images: images,
    **{f"JPEG {quality}": partial(jpeg, quality=quality) for quality in (95, 90, 75, 50)},
    "28 x 28": partial(resized, side=28),
    "48 x 48": partial(resized, side=48),
}
PLANTED = 300


def thumbnails(images: Array) -> Array:
    """As `Thumbnails` has them."""
    return np.stack([thumbnail(image) for image in images])


def pairs_of(groups: list[Array]) -> set[tuple[int, int]]:
    """All pairs within groups."""
    return {(int(a), int(b)) for rows in groups for a in rows for b in rows if a < b}


def tally(name: str, who: str, found: set[tuple[int, int]], there: set[tuple[int, int]], n: int) -> dict[str, Any]:
    """Precision and recall on planted pairs; pairs of the set itself, by their own rows or copies of them, do not count."""
    planted = {(k, n + k) for k in range(PLANTED)}
    old = {pair for pair in found if tuple(sorted(row if row < n else row - n for row in pair)) in there}
    found, right = found - old, len(found & planted)
    row = {"copies": name, "who": who, "pairs before": len(there), "planted": PLANTED, "pairs": len(found)}
    return row | {"precision": round(right / max(1, len(found)), 4), "recall": round(right / PLANTED, 4)}


def duplicate_rows() -> list[dict[str, Any]]:
    """Planted copies: pairs found, and pairs of unplanted rows that are called copies."""
    from cleanlab import Datalab

    n, rows = 5000, []
    images, features = cifar10(0, n)[0], cifar_features()[:n]
    labels = np.asarray(cifar10n()["clean_label"][:n], np.int64)
    probs, small = fit(features, labels, 0.003).predict_proba(features).astype(np.float32), thumbnails(images)
    there: dict[str, set[tuple[int, int]]] = {}
    for name, again in {"none": lambda some: some[:0], **REENCODED}.items():
        copies = again(images[:PLANTED])
        file = f"cifar_{name.replace('JPEG ', 'jpeg').replace(' x ', 'x')}"
        made = (
            features[: len(copies)] if name in ("none", "exact") else image_features(file, lambda c=copies: c, PLANTED)
        )
        both, place = np.concatenate([features, made]), np.concatenate([np.arange(n), np.arange(len(copies))])
        data = dataset_of(both, probs[place], labels[place])
        shown = data.add_column(COLUMN, [*small, *thumbnails(copies)] if len(copies) else list(small))
        found = {"features": pairs_of(RelationCleaner(outlier_reference=100).fit(data, quiet=True).near_duplicates())}
        found["ours"] = pairs_of(RelationCleaner(outlier_reference=100).fit(shown, quiet=True).near_duplicates())
        lab = Datalab({"label": labels[place]}, label_name="label", verbosity=0)
        lab.find_issues(features=both, issue_types={"near_duplicate": {}})
        sets = lab.get_issues("near_duplicate")["near_duplicate_sets"]
        found["datalab"] = {(min(a, int(b)), max(a, int(b))) for a, near in enumerate(sets) for b in near}
        if name == "none":  # CIFAR-10 has copies of its own
            there = found
            continue
        for who, pairs in found.items():
            rows.append(tally(f"{name}, CIFAR-10", who, pairs, there[who], n))
            print(rows[-1], flush=True)
    images = fashion_mnist(10_000)[n:]
    for name, again in {"none": lambda some: some[:0], **REENCODED}.items():
        every = thumbnails(images) if name == "none" else np.concatenate([small, thumbnails(again(images[:PLANTED]))])
        left, right = picture_copies(rows_of(every, COLUMN))
        group = joined(np.arange(len(every)), left, right)
        pairs = pairs_of(groups_of(group))
        if name == "none":
            small, there = every, {"pictures": pairs}
            continue
        rows.append(tally(f"{name}, Fashion-MNIST", "pictures", pairs, there["pictures"], n))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the parts and write `results/relation_labels*.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="2,000 rows, labels only")
    parser.add_argument("--part", choices=("labels", "rare", "copies", "duplicates"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "labels": lambda: label_rows(2000 if args.smoke else 10_000),
        "rare": rare_rows,
        "copies": lambda: copy_rows(2),
        "duplicates": duplicate_rows,
    }
    try:
        for name in ("labels",) if args.smoke else (args.part,) if args.part else parts:
            write(f"relation_{name}_smoke" if args.smoke else f"relation_{name}", parts[name]())
    except DataMissingError as error:
        print(f"skipped: {error}")


if __name__ == "__main__":
    main()
