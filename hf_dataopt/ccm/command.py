"""`hf-dataopt ccm`: compress a conversation turn by turn, answer from the memory, show what it holds."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shell.data import STDIN, read_lines
from ..shell.models import load_language_model
from ..shell.options import (
    DTYPES,
    add_device,
    add_hub,
    add_publishing,
    add_seed,
    add_template,
    address,
    check_publishing,
    device_of,
    push_options,
    template_options,
)
from ..shell.usage import check_count, check_words, only, refusing

if TYPE_CHECKING:
    from .memory import CompressedContextMemory

HELP = "compress a conversation turn by turn into a small memory and answer from it (CCM)"
EXAMPLES = [
    "hf-dataopt ccm --adapter me/chat-ccm --model meta-llama/Llama-3.2-1B --turn 'My cat is Otto.' --question 'Its name?'",
    "hf-dataopt ccm --adapter me/chat-ccm --chat --turn 'My cat is Otto.' --turn 'A fine name.' --question 'Its name?' --json",
    "hf-dataopt ccm --turn 'My cat is Otto.' --turn 'He is grey.' --question 'Its name?' --memory merge   # sizes only",
]
# what the demo's user tells, and asks; the adapter's training data has such sentences, with none of these words in them
DEMO_TURNS = [
    "My name is Clara.",
    "I live in Lisbon.",
    "My cat is called Pepper.",
    "I work as a lawyer.",
    "I am learning Danish.",
    "My best friend is Hugo.",
    "I am allergic to honey.",
    "I put the lantern in the cellar.",
]
DEMO_QUESTIONS = {
    "What is my name?": "Clara",
    "Where do I live?": "Lisbon",
    "What is my cat called?": "Pepper",
    "What is my job?": "lawyer",
    "Which language am I learning?": "Danish",
    "Who is my best friend?": "Hugo",
    "What am I allergic to?": "honey",
    "Where is the lantern?": "cellar",
}
_PACKAGED = Path(__file__).resolve().parents[2] / "examples" / "adapters" / "facts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt ccm`."""
    parser.add_argument(
        "--model", default=None, help="Hub name or folder; default: the adapter's own, or the packaged SmolLM2"
    )
    parser.add_argument("--adapter", default=None, help="trained CCM adapter; without one the memory is untrained")
    parser.add_argument(
        "--turn", action="append", required=True, help="a context c(t); may be given several times; - for stdin's lines"
    )
    parser.add_argument("--question", required=True, help="asked behind the memory")
    parser.add_argument("--chat", action="store_true", help="turns are chat messages: user, assistant, user, ...")
    parser.add_argument("--memory", choices=["concat", "merge"], help="update of an untrained memory (default: concat)")
    parser.add_argument("--num-comp-tokens", type=int, help="slots per turn of an untrained memory (default: 2)")
    add_template(parser, "the turns (with --chat)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length of the answer")
    add_device(parser, dtypes=DTYPES)
    add_seed(parser)
    parser.add_argument("--output-dir", metavar="DIR", default=None, help="keep the memory in this folder")
    add_hub(parser, "of the model")
    add_publishing(parser, "the memory")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compress the turns one by one and answer.

    Returns:
        Sizes after every turn and the answer, ready for JSON.

    Raises:
        UsageError: options that do not go together, that have no effect, or are out of range.
        ValueError: model or adapter cannot be loaded.
    """
    template, turns = _checked(args)
    model, tokenizer = _load(args)
    question: Any = args.question
    if args.chat:
        turns = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        question = {"role": "user", "content": question}
    result, memory = converse(model, tokenizer, turns, question, args.max_new_tokens, template)
    result["trained"] = args.adapter is not None
    if args.output_dir:
        memory.save_pretrained(args.output_dir, adapter=args.adapter)
        result["folder"] = args.output_dir
    if args.push_to_hub:
        result["repository"] = address(memory.push_to_hub(args.push_to_hub, adapter=args.adapter, **push_options(args)))
    return result


def _checked(args: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The chat template's arguments and the turns, once everything that can be seen without a model is right."""
    from ..publishing.names import looks_like_repo
    from ..publishing.writer import check_target

    with refusing():
        check_publishing(args)
        only(args, args.chat, "belongs to chat messages; give --chat too", "system", "template_kwargs")
        only(
            args,
            args.adapter is None,
            "is for an untrained memory; the adapter has its own",
            "memory",
            "num_comp_tokens",
        )
        check_count("num_comp_tokens", 1 if args.num_comp_tokens is None else args.num_comp_tokens)
        check_count("max_new_tokens", args.max_new_tokens)
        check_words("question", args.question)
        if args.question == STDIN:
            raise ValueError("--question cannot be -; --turn can, for the lines of standard input")
        if args.adapter is not None and not Path(args.adapter).is_dir() and not looks_like_repo(args.adapter):
            raise ValueError(f"--adapter {args.adapter} is neither a folder nor a Hub name such as me/name")
        if args.output_dir:
            check_target(args.output_dir, "context_memory")
        device_of(args.device)
        return template_options(args), read_lines("turn", args.turn)


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    from .saved import base_of, load_adapter

    name = args.model if args.model or args.adapter is None else base_of(args.adapter)
    base, tokenizer = load_language_model(
        name, device=args.device, dtype=args.dtype, revision=args.revision, token=args.token
    )
    if args.adapter is not None:
        return load_adapter(base, args.adapter, token=args.token), tokenizer
    return _untrained(base, args.memory or "concat", args.num_comp_tokens or 2, args.seed), tokenizer


def _untrained(base: Any, memory: str, num_comp_tokens: int, seed: int = 0) -> Any:
    """A model with a fresh adapter, whose weights are drawn from a stream of their own."""
    from peft import get_peft_model

    from ..seeding import generator, layers_draw_from
    from .config import CCMConfig

    with warnings.catch_warnings(), layers_draw_from(generator(seed), base.device):
        # peft 0.21 asks transformers 5.24 for a property by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(base, CCMConfig(num_comp_tokens=num_comp_tokens, memory=memory)).eval()


def converse(
    model: Any,
    tokenizer: Any,
    turns: list[Any],
    question: Any,
    max_new_tokens: int,
    template: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], CompressedContextMemory]:
    """Compress every turn, then answer from the memory.

    Args:
        model: with an active CCM adapter.
        tokenizer: of the model.
        turns: contexts c(1), c(2), ..., text or messages.
        question: the input I(t), text or message.
        max_new_tokens: length of the answer.
        template: `system` and `template_kwargs` of the memory.

    Returns:
        Per turn tokens seen and bytes held, peak bytes, the answer, the largest logit difference between this memory and one
        parallel forward over everything, and the largest logit there, for scale; and the memory.
    """
    from .memory import CompressedContextMemory

    memory = CompressedContextMemory(model, tokenizer, **(template or {}))
    rows = []
    for turn in turns:
        memory.append(turn)
        size = {"full_bytes": memory.full_nbytes, "memory_bytes": memory.nbytes}
        said = turn["content"] if isinstance(turn, dict) else turn
        rows.append({"turn": said, "tokens_seen": memory.tokens_seen[0], **size})
    answer = memory.generate(question, max_new_tokens=max_new_tokens, do_sample=False)
    difference, largest = _difference(model, tokenizer, turns, question, memory)
    found = {
        "memory": memory.config.memory,
        "turns": rows,
        "peak_kv_bytes": memory.peak_kv_bytes,
        "question": question["content"] if isinstance(question, dict) else question,
        "answer": answer,
        "one_pass_difference": difference,
        "largest_logit": largest,
    }
    return found, memory


def _difference(model: Any, tokenizer: Any, turns: list[Any], question: Any, memory: Any) -> tuple[float, float]:
    """Largest difference of the memory's logits from those of one parallel forward, and the largest of the latter."""
    import torch

    from .turns import encode_turn

    contexts = [encode_turn(tokenizer, turn, index == 0, memory.chat) for index, turn in enumerate(turns)]
    if memory.config.memory == "gist":
        contexts = [sum(contexts, [])]
    asked = memory.inputs(question)["input_ids"]
    ids = [token for context in contexts for token in [*context, *memory.config.comp_token_ids]]
    with torch.no_grad():
        whole = model(torch.cat([torch.tensor([ids], device=asked.device), asked], dim=1)).logits[:, len(ids) :]
    return float((whole - memory.logits(question)).abs().max()), float(whole.abs().max())


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
    console.print(
        f"peak of keys and values: {result['peak_kv_bytes'] / 2**10:.0f} KiB; step by step and one parallel forward differ by "
        f"{result['one_pass_difference']:.0e} in the logits"
    )
    if result["trained"]:
        console.print(f"[bold]{escape(result['question'])}[/bold] {escape(str(result['answer']))}")
    else:
        console.print(
            "This adapter is untrained: sizes are real, but no answer comes from the memory. Train one with "
            "examples/train_ccm_adapter.py and pass it as --adapter; examples/adapters/facts is one of the packaged model."
        )
    for name in ("folder", "repository"):
        if name in result:
            console.print(f"{name}: {escape(str(result[name]))}", soft_wrap=True)


def packaged_adapter() -> Path | None:
    """The adapter of the packaged language model that a checkout of this package holds (`make adapters`), or None."""
    return _PACKAGED if _PACKAGED.is_dir() else None


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: a user tells facts, and asks about them; answers from memory beside full and no context.

    With another model than the packaged one there is no adapter: then sizes only.
    """
    from .saved import load_adapter

    adapter = packaged_adapter() if args.model is None else None
    turns = [{"role": "user", "content": turn} for turn in (DEMO_TURNS[:2] if args.smoke else DEMO_TURNS)]
    questions = [{"role": "user", "content": question} for question in DEMO_QUESTIONS]
    base, tokenizer = args.language_model()
    model = load_adapter(base, adapter) if adapter else _untrained(base, "concat", 2, args.seed)
    result, memory = converse(model, tokenizer, turns, questions[0], 16 if adapter else 4)
    result["trained"] = adapter is not None
    show(result, args.console)
    if adapter is None:
        return {**result, "claims": _claims(result)}
    asked = questions[:3] if args.smoke else questions
    result["questions"] = answers(model, tokenizer, turns, asked, memory)
    _show_answers(result["questions"], args.console)
    return {**result, "claims": [_right(result["questions"]), *_claims(result)]}


def answers(
    model: Any,
    tokenizer: Any,
    turns: list[dict[str, str]],
    questions: list[dict[str, str]],
    memory: CompressedContextMemory,
) -> list[dict[str, str]]:
    """Each question answered with no context, with all turns before it, and from the memory of them.

    Args:
        model: with the adapter; without compression tokens it is the plain base model.
        tokenizer: of the model.
        turns: chat messages that the memory holds.
        questions: chat messages, keys of `DEMO_QUESTIONS`.
        memory: of the turns.

    Returns:
        Rows of question, needed word, and answers `none`, `full` and `memory`.
    """
    import torch

    rows = []
    for question in questions:
        row = {"question": question["content"], "needed": DEMO_QUESTIONS[question["content"]]}
        for name, before in (("none", []), ("full", turns)):
            ids = tokenizer.apply_chat_template([*before, question], add_generation_prompt=True, return_dict=False)
            given = torch.tensor([ids], device=memory.steps.device)
            output = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=16, do_sample=False
            )
            row[name] = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        row["memory"] = str(memory.generate(question, max_new_tokens=16, do_sample=False)).strip()
        rows.append(row)
    return rows


def _is_right(row: dict[str, str], name: str) -> bool:
    return row["needed"].lower() in row[name].lower()


def _right(rows: list[dict[str, str]]) -> dict[str, str]:
    """How many answers hold the word asked for, for the demo's last table."""
    right = {name: sum(_is_right(row, name) for row in rows) for name in ("none", "full", "memory")}
    return {
        "claim": f"right answers of {len(rows)}, from memory alone",
        "baseline": f"no context {right['none']}, full context {right['full']}",
        "ours": str(right["memory"]),
    }


def _show_answers(rows: list[dict[str, str]], console: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Answers (green: the word asked for is in it)")
    for title in ("question", "no context", "full context", "memory"):
        table.add_column(title)
    for row in rows:
        cells = [escape(row[name]) for name in ("none", "full", "memory")]
        marked = [
            f"[green]{cell}[/green]" if _is_right(row, name) else cell
            for cell, name in zip(cells, ("none", "full", "memory"), strict=True)
        ]
        table.add_row(escape(row["question"]), *marked)
    console.print(table)


def _claims(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for the demo's last table."""
    last = result["turns"][-1]
    return [
        {
            "claim": f"keys and values held after {len(result['turns'])} turns",
            "baseline": f"full cache {last['full_bytes'] / 2**10:,.0f} KiB",
            "ours": f"{last['memory_bytes'] / 2**10:,.0f} KiB",
        },
        {
            "claim": "most held while a turn is compressed",
            "baseline": f"full cache {last['full_bytes'] / 2**10:,.0f} KiB",
            "ours": f"{result['peak_kv_bytes'] / 2**10:,.0f} KiB",
        },
        {
            "claim": "turn by turn equals the parallel form it is trained in",
            "baseline": f"one pass: largest logit {result['largest_logit']:.1f}",
            "ours": f"differs by {result['one_pass_difference']:.0e}",
        },
    ]
