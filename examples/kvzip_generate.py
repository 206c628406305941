"""Compress a text's key-value cache once and ask it several questions with plain `generate`.

python examples/kvzip_generate.py                                  # packaged SmolLM2-135M-Instruct, made-up records
python examples/kvzip_generate.py --model Qwen/Qwen3-0.6B --context report.txt --question "Who wrote it?"
python examples/kvzip_generate.py --smoke                          # a tiny random model: seconds, nothing downloaded

The packaged model is small and errs; `--keep-ratio 1.0` shows what it answers when nothing is evicted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from hf_dataopt import KVzipCache
from hf_dataopt.text.demo_model import load_demo_model

CONTEXT = """Package: amber-tools
Version: 2.14.3-1
Installed-Size: 412
Maintainer: Noor Rahman

Package: birch-viewer
Version: 0.9.8-2
Installed-Size: 1377
Maintainer: Hugo Weber

Package: cedar-daemon
Version: 5.0.1-4
Installed-Size: 86
Maintainer: Ines Costa"""
QUESTIONS = [
    "What is the Version of the package birch-viewer?",
    "What is the Installed-Size of the package cedar-daemon?",
]


def tiny_model() -> tuple[Any, Any]:
    """A random Llama and a tokenizer with one token per byte: shows the calls, its answers mean nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<eos>": 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--context", type=Path, default=None, help="text file; default: three made-up package records")
    parser.add_argument("--question", action="append", help="may be given several times")
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    args = parser.parse_args()

    model, tokenizer = tiny_model() if args.smoke else load_demo_model(args.model)
    context = args.context.read_text(encoding="utf-8") if args.context else CONTEXT
    start = time.perf_counter()
    cache = KVzipCache.from_context(model, tokenizer, context, keep_ratio=args.keep_ratio)
    print(
        f"{cache.prompt.context_ids.numel()} context tokens in {time.perf_counter() - start:.1f} s: "
        f"{cache.full_nbytes / 2**20:.1f} MiB of keys and values became {cache.nbytes / 2**20:.1f} MiB"
    )

    questions = args.question or QUESTIONS
    # each call gets its own fork of the cache, so the questions do not see each other
    for question in questions:
        inputs = cache.inputs(question)
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question}\n  {answer.strip()!r}")

    # one batch for all of them: the compressed context is shared, not copied
    inputs = cache.inputs(questions)
    pad = tokenizer.pad_token_id
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False, pad_token_id=pad)
    print("in one batch:")
    for row in output[:, inputs["input_ids"].shape[1] :]:
        print(f"  {tokenizer.decode(row, skip_special_tokens=True).strip()!r}")


if __name__ == "__main__":
    main()
