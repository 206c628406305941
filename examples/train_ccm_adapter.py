"""Train a Compressed Context Memory adapter on conversations, see how much of the context it keeps, and save it.

    python examples/train_ccm_adapter.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data dialogues.jsonl --output chat-ccm
    python examples/train_ccm_adapter.py --model NAME --data HUB/DATASET --output chat-ccm --push-to-hub me/chat-ccm
    python examples/train_ccm_adapter.py --smoke      # a tiny model made and taught here: half a minute, nothing downloaded

Each row has `messages` (`[{"role": ..., "content": ...}, ...]`) or `texts` (strings); the last turn is what the model learns
to say, the one before it the question, all earlier ones go through the memory. Settings are those of the reference code and
what short runs need (benchmarks/README.md): a sink, compression tokens that start as a line break, a higher learning rate.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from hf_dataopt import CCMConfig, CompressedContextMemory, DataCollatorForCCM
from hf_dataopt.ccm.saved import push_adapter
from hf_dataopt.text.demo_model import load_demo_model

FACTS = {"name": "ada bob cyd dan eve fay", "city": "oslo rome lima bern kyiv riga", "pet": "cat dog owl bee fox ant"}


def tiny_conversations(count: int) -> Dataset:
    """Three facts, one turn each; then one of them is asked for."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        facts = {kind: draw.choice(values.split()) for kind, values in FACTS.items()}
        asked = draw.choice(list(facts))
        turns = [f"{kind} is {value} " for kind, value in draw.sample(list(facts.items()), 3)]
        rows.append({"texts": [*turns, f"which {asked} ? ", facts[asked]]})
    return Dataset.from_list(rows)


def tiny_model(data: Dataset) -> tuple[Any, Any]:
    """A small Llama that has learned to answer from its full context, and a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", "is", "which", "?", *FACTS, *" ".join(FACTS.values()).split()]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    )
    ids = torch.tensor([tokenizer("".join(row) + " <eos>")["input_ids"] for row in data["texts"]])
    labels = torch.cat([torch.full_like(ids[:, :-2], -100), ids[:, -2:]], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(150):
        rows = slice(step * 64 % len(ids), step * 64 % len(ids) + 64)
        model(ids[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


@torch.no_grad()
def mean_nll(model: Any, collator: DataCollatorForCCM, rows: Dataset, context: str = "memory") -> float:
    """Mean loss of the answers with the memory, with the full context, or with the question alone."""
    losses = []
    for row in rows:
        kind = next(name for name in ("messages", "texts") if row.get(name))
        batch = collator([{kind: row[kind][-2:] if context == "none" else row[kind]}])
        if context == "full":  # compression tokens take no position: without them this is the plain conversation
            text = batch["input_ids"][0] < min(collator.config.comp_token_ids or [])
            batch = {name: values[:, text] for name, values in batch.items()}
        losses.append(float(model.eval()(**{name: values.to(model.device) for name, values in batch.items()}).loss))
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=None, help="JSON lines file, or data set on the Hub")
    parser.add_argument("--output", default="ccm-adapter")
    parser.add_argument("--memory", choices=["concat", "merge"], default="concat")
    parser.add_argument("--num-comp-tokens", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024, help="tokens; longer ones lose their oldest turns")
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--every-turn", action="store_true", help="loss on all turns, each behind the memory before it")
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--push-to-hub", default=None, metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and made-up conversations")
    args = parser.parse_args()
    set_seed(0)
    if args.smoke:
        data = tiny_conversations(2048)
        base, tokenizer = tiny_model(data)
        args.max_steps, args.batch_size, args.learning_rate, args.eval_rows = 100, 32, 1e-2, 16
    else:
        if args.data is None:
            parser.error("--data is needed: a JSON lines file or the name of a data set")
        files = {"path": "json", "data_files": args.data} if Path(args.data).is_file() else {"path": args.data}
        data = load_dataset(**files, split="train")
        base, tokenizer = load_demo_model(args.model)
    data = data.train_test_split(test_size=min(args.eval_rows, len(data) // 2), seed=0)

    line = tokenizer("\n", add_special_tokens=False)["input_ids"] or None
    slots = {"num_comp_tokens": args.num_comp_tokens, "comp_init_token_ids": line}
    model = get_peft_model(base, CCMConfig(r=8, memory=args.memory, sink=True, **slots))
    model.print_trainable_parameters()
    config, length = model.peft_config["default"], args.max_length
    collator = DataCollatorForCCM(tokenizer, config, max_length=length, completion_only_loss=not args.every_turn)
    answers = DataCollatorForCCM(tokenizer, config, max_length=length)  # to measure
    for context in ("none", "memory", "full"):
        print(f"before training, {context} context: {mean_nll(model, answers, data['test'], context):.3f} nats a token")
    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * args.max_steps),
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=args.smoke,
        logging_steps=max(args.max_steps // 5, 1),
    )
    Trainer(model=model, args=arguments, train_dataset=data["train"], data_collator=collator).train()
    print(f"after training, memory context: {mean_nll(model, answers, data['test']):.3f} nats a token")
    if collator.cut_samples:
        print(f"{collator.cut_samples} times a conversation was too long: {collator.cut_turns} oldest turns left out")

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    if args.push_to_hub:
        print(push_adapter(model, args.push_to_hub))  # with a card, in one commit
    model = PeftModel.from_pretrained(model.unload(), args.output)  # what a reader does, after `import hf_dataopt`
    memory = CompressedContextMemory(model, tokenizer)
    turns = data["test"][0].get("messages") or data["test"][0]["texts"]
    for turn in turns[:-2]:
        memory.append(turn)
    print(f"{memory.tokens_seen[0]} tokens in {memory.nbytes / 2**10:.1f} KiB; asked {turns[-2]!r}, it says")
    print(memory.generate(turns[-2], max_new_tokens=32))


if __name__ == "__main__":
    main()
