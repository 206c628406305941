"""Train a Compressed Context Memory adapter on conversations, and save it.

    python examples/train_ccm_adapter.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data dialogues.jsonl --output chat-ccm

Each line of the file is `{"messages": [{"role": ..., "content": ...}, ...]}`; settings are those of the reference code.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hf_dataopt import CCMConfig, DataCollatorForCCM
from hf_dataopt.demo_model import load_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--memory", choices=["concat", "merge"], default="concat")
    parser.add_argument("--num-comp-tokens", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    base, tokenizer = load_demo_model(args.model)
    model = get_peft_model(base, CCMConfig(r=8, num_comp_tokens=args.num_comp_tokens, memory=args.memory))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * args.max_steps),
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
    )
    collator = DataCollatorForCCM(tokenizer, model.peft_config["default"])
    data = load_dataset("json", data_files=args.data, split="train")
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
