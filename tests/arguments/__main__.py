"""`python -m tests.arguments --count 2000 [--only PART] [--seed N]`: a table; exit 1 where something was not refused."""

from __future__ import annotations

import argparse
import logging
import re
import resource
import sys
import time

import torch

from .cases import cases
from .judge import good, run


def main() -> int:
    """Run and print; 1 where a callable did something else than refuse or rightly accept."""
    parser = argparse.ArgumentParser(prog="python -m tests.arguments", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="sets for each callable")
    parser.add_argument("--only", default="", help="callables whose name this pattern finds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(
        resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30)
    )  # what asks for more is a fault, and no dead machine
    logging.disable(logging.CRITICAL)
    print(f"{'callable':58} {'sets':>6} {'refused':>8} {'accepted':>9} {'other':>6} {'s':>6}")
    total = 0
    for name, case in cases().items():
        if not re.search(args.only, name):
            continue
        start = time.perf_counter()
        good(case)
        tally = run(name, case, args.count, args.seed)
        total += len(tally.other)
        taken = time.perf_counter() - start
        row = f"{name:58} {tally.sets:6} {tally.refused:8} {tally.accepted:9} {len(tally.other):6} {taken:6.1f}"
        print(row, flush=True)
        for why in tally.other:
            print("    ", why, flush=True)
    print("faults:", total)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
