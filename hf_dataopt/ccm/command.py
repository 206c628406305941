"""`hf-dataopt ccm`: compress a conversation turn by turn, answer from the memory, show what it holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "compress a conversation turn by turn into a small memory and answer from it (CCM)"
EXAMPLES = [
    "hf-dataopt ccm --adapter me/chat-ccm --model meta-llama/Llama-3.2-1B --turn 'My cat is Otto.' --question 'Its name?'",
    "hf-dataopt ccm --turn 'My cat is Otto.' --turn 'He is grey.' --question 'Its name?' --memory merge --json",
]
DEMO_TURNS = [
    "User: My name is Greta and I live in Trieste.\n",
    "User: My cat is called Bismarck and he is grey.\n",
    "User: On Thursdays I play chess with Omar.\n",
    "User: The train to Vienna leaves at half past six.\n",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt ccm`."""
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", default=None, help="trained CCM adapter; without one the memory is untrained")
    parser.add_argument("--turn", action="append", required=True, help="a context c(t); may be given several times")
    parser.add_argument("--question", required=True, help="asked behind the memory")
    parser.add_argument(
        "--memory", choices=["concat", "merge"], default="concat", help="update (untrained memory only)"
    )
    parser.add_argument("--num-comp-tokens", type=int, default=2, help="slots per turn (untrained memory only)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length of the answer")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compress the turns one by one and answer.

    Returns:
        Sizes after every turn and the answer, ready for JSON.
    """
    model, tokenizer = _load(args.model, args.adapter, args.memory, args.num_comp_tokens)
    return converse(model, tokenizer, args.turn, args.question, args.max_new_tokens)


def _load(name: str | None, adapter: str | None, memory: str, num_comp_tokens: int) -> tuple[Any, Any]:
    from peft import PeftModel, get_peft_model

    from ..demo_model import load_demo_model
    from .config import CCMConfig

    base, tokenizer = load_demo_model(name)
    if adapter is not None:
        return PeftModel.from_pretrained(base, adapter).eval(), tokenizer
    return get_peft_model(base, CCMConfig(num_comp_tokens=num_comp_tokens, memory=memory)).eval(), tokenizer


def converse(model: Any, tokenizer: Any, turns: list[str], question: str, max_new_tokens: int) -> dict[str, Any]:
    """Compress every turn, then answer from the memory.

    Args:
        model: with an active CCM adapter.
        tokenizer: of the model.
        turns: contexts c(1), c(2), ...
        question: the input I(t).
        max_new_tokens: length of the answer.

    Returns:
        Per turn tokens seen and bytes held, peak bytes, and the answer.
    """
    from .._compat import causal_model_of, text_config
    from .memory import CompressedContextMemory

    memory = CompressedContextMemory(model, tokenizer)
    config = text_config(causal_model_of(model))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = []
    for turn in turns:
        memory.append(turn)
        token_bytes = (
            2 * config.num_hidden_layers * config.num_key_value_heads * head * memory.layers[0][0].element_size()
        )
        seen = memory.tokens_seen[0]
        rows.append(
            {"turn": turn, "tokens_seen": seen, "full_bytes": seen * token_bytes, "memory_bytes": memory.nbytes}
        )
    answer = memory.generate(question, max_new_tokens=max_new_tokens, do_sample=False)
    return {
        "memory": memory.config.memory,
        "turns": rows,
        "peak_kv_bytes": memory.peak_kv_bytes,
        "question": question,
        "answer": answer,
    }


def show(result: dict[str, Any], console: Any) -> None:
    """One line per turn, then the answer."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Memory after each turn ({result['memory']})")
    for title in ("turn", "tokens seen", "full cache", "memory"):
        table.add_column(title)
    for row in result["turns"]:
        sizes = [f"{row[key] / 2**10:.0f} KiB" for key in ("full_bytes", "memory_bytes")]
        table.add_row(escape(row["turn"].strip()), str(row["tokens_seen"]), *sizes)
    console.print(table)
    console.print(f"peak of keys and values: {result['peak_kv_bytes'] / 2**10:.0f} KiB")
    console.print(f"[bold]{escape(result['question'])}[/bold] {escape(str(result['answer']))}")


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: four turns compressed by an untrained adapter, to show sizes; quality needs training."""
    turns = DEMO_TURNS[:2] if args.smoke else DEMO_TURNS
    model, tokenizer = _load(args.model, None, "concat", 2)
    result = converse(model, tokenizer, turns, "User: What is my cat called?\n", 4 if args.smoke else 16)
    show(result, args.console)
    args.console.print(
        "This adapter is untrained: sizes are real, the answer is not from the memory. See train_ccm_adapter.py."
    )
    return result
