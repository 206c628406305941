"""Chat in the terminal with a compressed memory; every line shows tokens seen, KV held and KV saved.

python examples/chat_with_ccm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter chat-ccm
"""

from __future__ import annotations

import argparse

from peft import PeftModel

from hf_dataopt import CompressedContextMemory
from hf_dataopt.demo_model import load_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--adapter", required=True)
    args = parser.parse_args()
    base, tokenizer = load_demo_model(args.model)
    memory = CompressedContextMemory(PeftModel.from_pretrained(base, args.adapter).eval(), tokenizer)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            break
        if not text:
            continue
        said = {"role": "user", "content": text}
        answer = memory.generate(said, max_new_tokens=64)
        print(answer)
        memory.append(said)
        memory.append({"role": "assistant", "content": str(answer)})
        slots = memory.layers[0][0].shape[2]
        seen = memory.tokens_seen[0]
        print(f"[{seen} tokens seen, {slots} held ({memory.nbytes / 2**10:.0f} KiB), {1 - slots / seen:.0%} saved]")


if __name__ == "__main__":
    main()
