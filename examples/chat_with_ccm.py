"""Chat in the terminal with a compressed memory; every answer shows tokens seen, KV held and KV saved.

    python examples/chat_with_ccm.py             # packaged SmolLM2, examples/adapters/facts: tell it facts, ask for them
    python examples/chat_with_ccm.py --model HuggingFaceTB/SmolLM2-135M-Instruct --adapter me/chat-ccm
    python examples/chat_with_ccm.py --adapter ccm-adapter --memory user42    # goes on where `user42` left off, and saves it
    python examples/chat_with_ccm.py --smoke     # a tiny random model and four lines of its own: shows sizes, says nothing

Each message, yours and the model's, is compressed into `num_comp_tokens` slots; the model answers from those and from your
last message alone. `/forget` starts afresh, an empty line or end of file ends the chat.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from hf_dataopt import CCMConfig, CompressedContextMemory
from hf_dataopt.ccm.saved import base_of, load_adapter
from hf_dataopt.text.demo_model import load_demo_model

SMOKE_LINES = ["My name is Greta and I live in Trieste.", "My cat Bismarck is grey.", "/forget", "Who am I?"]


def tiny_model() -> tuple[Any, Any]:
    """A random Llama with an untrained adapter, and a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<eos>": 0} | {byte: i + 1 for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=257, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes))
    return get_peft_model(base, CCMConfig(num_comp_tokens=2)).eval(), tokenizer


def lines(smoke: bool) -> Iterator[str]:
    """What the user says."""
    if smoke:
        yield from SMOKE_LINES
        return
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        yield text


def state(memory: CompressedContextMemory) -> str:
    """Tokens seen, and what the memory holds of them."""
    seen, slots = memory.tokens_seen[0], memory.layers[0][0].shape[2]
    return (
        f"[{seen} tokens seen; {slots} slots, {memory.nbytes / 2**10:.1f} KiB of keys and values held; "
        f"{(memory.full_nbytes - memory.nbytes) / 2**10:.1f} KiB saved ({1 - memory.nbytes / memory.full_nbytes:.0%})]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="Hub name or folder; default: the adapter's own, or the packaged SmolLM2"
    )
    parser.add_argument(
        "--adapter", default=None, help="trained by train_ccm_adapter.py; default: the packaged model's"
    )
    parser.add_argument("--memory", type=Path, default=None, help="folder to read the memory from, and to save it to")
    parser.add_argument(
        "--max-slots", type=int, default=None, help="of the memory; beyond them the oldest turns are merged"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model")
    args = parser.parse_args()
    if args.smoke:
        model, tokenizer = tiny_model()
        args.max_new_tokens = 8
    elif args.adapter is None and args.model is not None:
        parser.error("--adapter is needed: train one for this model with train_ccm_adapter.py")
    else:
        args.adapter = args.adapter or str(Path(__file__).resolve().parent / "adapters" / "facts")
        base, tokenizer = load_demo_model(args.model or base_of(args.adapter))
        model = load_adapter(base, args.adapter)
    if args.memory is not None and (args.memory / "memory.json").is_file():
        if args.max_slots is not None:
            parser.error("--max-slots is for a new memory; the saved one keeps its own budget")
        memory = CompressedContextMemory.from_pretrained(model, args.memory, tokenizer)
        print(state(memory))
    else:
        memory = CompressedContextMemory(model, tokenizer, max_slots=args.max_slots)
    for text in lines(args.smoke):
        if args.smoke:
            print(f"> {text}")
        if text == "/forget":
            memory.reset()
            continue
        said = {"role": "user", "content": text}
        answer = str(memory.generate(said, max_new_tokens=args.max_new_tokens, do_sample=False)).strip()
        print(answer)
        memory.append(said)
        memory.append({"role": "assistant", "content": answer or "..."})
        print(state(memory))
    if args.memory is not None:
        memory.save_pretrained(args.memory)


if __name__ == "__main__":
    main()
