"""The README's block of condensation, from 39,000 images of CIFAR-10 to a pushed set on a local Hub.

As printed from its settings on, but for the side of the images (32, their own) and the epochs of the score (100).

    OMP_NUM_THREADS=2 python benchmarks/condensation_quick_start.py
    OMP_NUM_THREADS=2 python benchmarks/condensation_quick_start.py --smoke      # 600 images

The Hub is that of the tests, on this machine. CPU-seconds count all threads; divided by two they are what two free cores take.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measure(hub: Any, rows: int) -> dict[str, Any]:
    """Run the block once; the data are there before the clock starts."""
    import data as sources
    from datasets import ClassLabel, Dataset, Features, Image

    kinds = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    splits = []
    for start, stop in ((0, rows), (40_000 - 1_000, 40_000)):
        pixels, labels = sources.cifar10(start, stop)
        splits.append(Dataset.from_dict({"image": list(pixels), "label": labels.tolist()}, features=kinds))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [one for one in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "DatasetCondenser" in one]
    imports, own = block.split("\n\n")[0], block[block.index("config = ") :]
    for printed, here in {" image_size=16,": "", "evaluation_epochs=30": "evaluation_epochs=100"}.items():
        if printed not in own:
            raise SystemExit(f"README's block has no {printed!r} any more: adapt this script")
        own = own.replace(printed, here)
    block = f"{imports}\n{own}"
    names: dict[str, Any] = {"train": splits[0], "test": splits[1]}
    clock, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, "README.md", "exec"), names)
    seconds, used = time.perf_counter() - clock, time.process_time() - cpu
    files = hub.files("dataset", "me/digits-10")
    return {
        "data": f"CIFAR-10, {rows:,} images",
        "wall s": round(seconds, 1),
        "CPU s": round(used, 1),
        "accuracy": round(names["scores"]["condensed"][0].mean, 1),
        "random images": round(names["scores"]["random"][0].mean, 1),
        "stored": len(names["condensed"]),
        "pushed bytes": sum(map(len, files.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="600 images, nothing written")
    args = parser.parse_args()
    from tests.hub_server import HubServer

    with HubServer() as hub, tempfile.TemporaryDirectory() as home:
        os.environ |= {**hub.env("hf_dummy"), "HF_HOME": home}  # before anything reads them
        row = measure(hub, 600 if args.smoke else 39_000)
    if args.smoke:
        _report.show("quick start (smoke)", [row])
    else:
        _report.write("condensation_quick_start", [row], load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
