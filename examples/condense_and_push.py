"""Condense a data set to a few images per class, publish it, load it again, and train on the formed images.

    python examples/condense_and_push.py                          # scikit-learn digits, saved to a folder
    python examples/condense_and_push.py --repo me/digits-idc-1   # ... and pushed to the Hub
    python examples/condense_and_push.py --smoke                  # tiny, a few seconds, offline

A minute or two on one CPU core. The pushed data set is plain: anyone can load the stored images without hf_dataopt; the
recipe that turns each into four training images is in its column `formation`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset

from hf_dataopt import DatasetCondenser, MultiFormation
from hf_dataopt.condensation.command import digits, digits_config
from hf_dataopt.condensation.saved import load_condensed, save_condensed
from hf_dataopt.publishing.artifacts import push_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", default=None, help="name on the Hub")
    parser.add_argument("--output-dir", default="condensed_digits", help="checkpoints, preview.png, artifact/")
    parser.add_argument(
        "--method", default="idc", help="mosaic takes a second, rded half a minute; also dm, dsa, herding, ..."
    )
    parser.add_argument("--outer-iterations", type=int, default=8)
    parser.add_argument("--smoke", action="store_true", help="one short outer iteration, one short scoring run")
    args = parser.parse_args()

    train, test = digits()
    config = digits_config(outer_iterations=args.outer_iterations)
    if args.smoke:
        config = digits_config(outer_iterations=1, inner_iterations=2, evaluation_epochs=20)
    condenser = DatasetCondenser(config, method=args.method)
    print(condenser.estimate(train))
    condensed = condenser.condense(train, output_dir=args.output_dir)  # run it again after a kill: it goes on

    scores = condenser.evaluate(condensed, test, seeds=1 if args.smoke else 2)
    for name, (first, *_) in scores.items():
        print(f"{name:10s} {first.mean:.1f} % +- {first.spread:.1f}")

    # data, preview and a card with these scores: one folder, and one commit
    folder = save_condensed(
        condensed,
        Path(args.output_dir) / "artifact",
        config=condenser.config,
        scores=scores,
        name=args.repo,
    )
    if args.repo:
        print(push_folder(folder, args.repo))
        loaded = load_dataset(args.repo, split="train")
    else:
        loaded = load_condensed(folder)

    formed = loaded.map(MultiFormation.from_dataset(loaded), batched=True)
    print(f"{len(loaded)} stored images, {len(formed)} training images; card and preview: {folder}")


if __name__ == "__main__":
    main()
