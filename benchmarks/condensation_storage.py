"""What storing condensed images in 8 bits costs: accuracy, and bytes on disk, against float16 and float32.

    OMP_NUM_THREADS=1 python benchmarks/condensation_storage.py          # a few minutes on one core
    OMP_NUM_THREADS=1 python benchmarks/condensation_storage.py --smoke

One condensation of the digits per storage size; the three storages hold the same optimised images (a run with another
storage continues from the same checkpoint) and are scored with the same networks and seeds. "largest change" is that of a
pixel in [0, 1]. Parquet files, as the Hub keeps them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import _report
import torch

from hf_dataopt.condensation.command import digits, digits_config
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.condensation.multi_formation import stack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-class", nargs="+", type=int, default=[1, 10])
    parser.add_argument("--smoke", action="store_true", help="one tiny run, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = digits()
    rows = []
    for per_class in args.per_class[: 1 if args.smoke else None]:
        changes = {"images_per_class": per_class, "learning_rate": 0.002 * per_class}
        changes |= {"evaluation_epochs": 3, "outer_iterations": 1, "inner_iterations": 1} if args.smoke else {}
        changes |= {"evaluation_epochs": 120, "outer_iterations": 4} if per_class > 1 else {}
        with tempfile.TemporaryDirectory() as folder:
            exact = None
            for storage in ("float32", "float16", "uint8"):
                condenser = DatasetCondenser(digits_config(storage=storage, **changes))
                condensed = condenser.condense(train, output_dir=folder)
                found = condenser.evaluate(condensed, test, seeds=1 if args.smoke else 5)["condensed"][0]
                values = stack(condensed[:]["image"])
                exact = values if exact is None else exact
                path = Path(folder) / f"{storage}.parquet"
                condensed.to_parquet(path)
                rows.append(
                    {
                        "per class": per_class,
                        "storage": storage,
                        "accuracy": found.mean,
                        "spread": found.spread,
                        "largest change": float((values - exact).abs().max()),
                        "kB": path.stat().st_size / 1000,
                    }
                )
    if args.smoke:
        _report.show("condensation storage (smoke)", rows)
    else:
        _report.write("condensation_storage", rows, data="scikit-learn digits, 16x16", seeds=5)


if __name__ == "__main__":
    main()
