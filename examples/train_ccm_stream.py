"""Train a Compressed Context Memory adapter to read streams: text without end in a cache of fixed size, and save it.

    python examples/train_ccm_stream.py --data texts.jsonl --output stream-adapter      # rows with a long `text` each
    python examples/train_ccm_stream.py --model NAME --data HUB/DATASET --push-to-hub me/stream-adapter
    python examples/train_ccm_stream.py --smoke      # a tiny model made and taught here, nothing downloaded

One pass over a row equals the stream that reads it step by step, so that the adapter learns what it will do: the oldest
tokens of the window become a few slots, and the window goes on. Perplexity is shown before and after, beside a window of the
same size that drops tokens instead (StreamingLLM's, with --sink 4). Rows should be several times --max-kv long.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from hf_dataopt import CCMConfig, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt.ccm.saved import push_adapter
from hf_dataopt.text.demo_model import load_demo_model

TOPICS, FILLER = (
    ["oslo", "rome", "lima", "bern", "kyiv", "riga", "cairo", "delhi"],
    ["and", "then", "so", "it", "went", "on"],
)


def tiny_texts(count: int) -> Dataset:
    """A text names its place once, and comes back to it after windows of other words."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        place, words = draw.choice(TOPICS), []
        for _ in range(6):
            words += ["in", place, *draw.choices(FILLER, k=14)]
        rows.append({"text": " ".join(words)})
    return Dataset.from_list(rows)


def tiny_model(data: Dataset) -> tuple[Any, Any]:
    """A small Llama taught on the whole texts, and a tokenizer of one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["<eos>", "in", *TOPICS, *FILLER])}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    model, ids = LlamaForCausalLM(config), torch.tensor(tokenizer(list(data["text"]))["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        rows = ids[step * 32 % len(ids) :][:32]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


def perplexity(model: Any, tokenizer: Any, rows: Dataset, **sizes: Any) -> float:
    """Over the texts, one stream each."""
    stream = StreamingContextMemory(model.eval(), tokenizer, **sizes)
    return math.exp(sum(math.log(stream.perplexity(row["text"])) for row in rows) / len(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=None, help="JSON lines file, or data set on the Hub, with a `text` column")
    parser.add_argument("--output", default="stream-adapter")
    parser.add_argument("--max-kv", type=int, default=160, help="tokens and slots in the cache")
    parser.add_argument("--compress-tokens", type=int, default=64, help="tokens that become slots at a time")
    parser.add_argument("--memory-size", type=int, default=8, help="slots at most")
    parser.add_argument("--sink", type=int, default=1, help="first tokens kept")
    parser.add_argument("--max-length", type=int, default=768, help="tokens of a row in training")
    parser.add_argument("--max-steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--eval-rows", type=int, default=8)
    parser.add_argument("--push-to-hub", default=None, metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and made-up texts")
    args = parser.parse_args()
    set_seed(0)
    if args.smoke:
        data = tiny_texts(512)
        base, tokenizer = tiny_model(data)
        args.max_kv, args.compress_tokens, args.memory_size, args.max_steps, args.learning_rate = 16, 8, 6, 60, 1e-2
    elif args.data is None:
        parser.error("--data is needed: a JSON lines file or the name of a data set")
    else:
        files = {"path": "json", "data_files": args.data} if Path(args.data).is_file() else {"path": args.data}
        data = load_dataset(**files, split="train")
        base, tokenizer = load_demo_model(args.model)
    data = data.train_test_split(test_size=min(args.eval_rows, len(data) // 2), seed=0)

    stream = {name: getattr(args, name) for name in ("max_kv", "compress_tokens", "memory_size", "sink")}
    line = tokenizer("\n", add_special_tokens=False)["input_ids"] or None
    model = get_peft_model(base, CCMConfig(r=8, num_comp_tokens=2, stream=stream, comp_init_token_ids=line))
    model.print_trainable_parameters()
    collator = DataCollatorForCCM(
        tokenizer, model.peft_config["default"], layout="stream", max_length=args.max_length, completion_only_loss=False
    )
    print(f"window, perplexity: {perplexity(model, tokenizer, data['test'], compress=False):.3f}")
    print(f"before training, perplexity: {perplexity(model, tokenizer, data['test']):.3f}")
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
    print(f"after training, perplexity: {perplexity(model, tokenizer, data['test']):.3f}")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    if args.push_to_hub:
        print(push_adapter(model, args.push_to_hub))  # with a card, in one commit


if __name__ == "__main__":
    main()
