"""`hf-dataopt kvzip`: compress one context, answer several questions from the small cache."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import KVzipCache

HELP = "compress a context's key-value cache once, answer several questions from it (KVzip)"
EXAMPLES = [
    "hf-dataopt kvzip --context report.txt --question 'Who wrote it?' --question 'When?'",
    "hf-dataopt kvzip --model Qwen/Qwen3-0.6B --context report.txt --question 'Who wrote it?' --keep-ratio 0.3",
    "hf-dataopt kvzip --context report.txt --question 'Who wrote it?' --max-kv-tokens 512 --replay local --json",
]

_WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "iris",
    "kelp",
    "lotus",
    "otter",
    "pine",
]
_KINDS = ["tools", "viewer", "daemon", "utils", "mapper", "player", "server", "parser"]
_PEOPLE = ["Noor Rahman", "Hugo Weber", "Ines Costa"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt kvzip`."""
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--context", required=True, metavar="FILE", help="text file with the context")
    parser.add_argument("--question", action="append", required=True, help="may be given several times")
    parser.add_argument("--keep-ratio", type=float, default=0.3, help="share of the context's pairs that stays, (0, 1]")
    parser.add_argument("--max-kv-tokens", type=int, default=None, help="budget in tokens per head instead of a ratio")
    parser.add_argument("--chunk-size", type=int, default=2000, help="context tokens repeated at a time")
    parser.add_argument("--replay", choices=["exact", "local"], default="exact", help="local: faster, approximate")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument("--device", default=None, help="cuda, mps, cpu; default: the first that is there")
    parser.add_argument("--compare-full", action="store_true", help="answer from the full cache too")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compress and answer.

    Args:
        args: the parsed command line.

    Returns:
        Sizes, seconds and answers, ready for JSON.

    Raises:
        ValueError: the context file cannot be read as text, or a setting is out of range.
    """
    from .config import KVzipConfig

    # settings and file first: a typo should not cost a model download
    config = KVzipConfig(
        keep_ratio=args.keep_ratio,
        max_kv_tokens=args.max_kv_tokens,
        chunk_size=args.chunk_size,
        replay=args.replay,
    )
    try:
        context = Path(args.context).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the context as UTF-8 text: {error}") from error
    model, tokenizer = _load(args.model, args.dtype, args.device)
    return answer(model, tokenizer, context, args.question, config, args.max_new_tokens, args.compare_full)


def answer(
    model: Any,
    tokenizer: Any,
    context: str,
    questions: list[str],
    config: Any,
    max_new_tokens: int = 64,
    compare_full: bool = False,
) -> dict[str, Any]:
    """Prefill, compress and answer every question, with times and sizes."""
    from .cache import KVzipCache
    from .config import KVzipConfig
    from .prompt import build_prompt
    from .scoring import check_supported, prefill, score_context

    check_supported(model)
    start = time.perf_counter()
    prefilled = prefill(model, build_prompt(tokenizer, context, config), config)
    prefilled_at = time.perf_counter()
    scores = score_context(prefilled, config)
    full: KVzipCache | None = None
    if compare_full:
        full = KVzipCache.from_scores(prefilled, scores, KVzipConfig(keep_ratio=1.0), tokenizer=tokenizer)
    cache = KVzipCache.from_scores(prefilled, scores, config, tokenizer=tokenizer, free=True)
    compressed_at = time.perf_counter()
    rows = []
    for question in questions:
        row = {"question": question, "answer": _generate(model, tokenizer, cache, question, max_new_tokens)}
        if full is not None:
            row["answer_full"] = _generate(model, tokenizer, full, question, max_new_tokens)
        rows.append(row)
    return {
        "context_tokens": cache.prompt.context_ids.numel(),
        "prefix_tokens": cache.prompt.prefix_ids.numel(),
        "full_bytes": cache.full_nbytes,
        "compressed_bytes": cache.nbytes,
        "prefill_seconds": round(prefilled_at - start, 2),
        "compress_seconds": round(compressed_at - prefilled_at, 2),
        "config": config.to_json_string(),
        "answers": rows,
    }


def _load(name: str | None, dtype: str, device: str | None) -> tuple[Any, Any]:
    import torch

    from ..demo_model import load_demo_model

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    loaded: tuple[Any, Any] = load_demo_model(name, dtype=getattr(torch, dtype))
    model, tokenizer = loaded
    return model.to(torch.device(device)), tokenizer


def _generate(model: Any, tokenizer: Any, cache: KVzipCache, question: str, max_new_tokens: int) -> str:
    inputs = cache.inputs(question)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def show(result: dict[str, Any], console: Any) -> None:
    """Sizes and times in one table, answers in another."""
    from rich.markup import escape
    from rich.table import Table

    sizes = Table(title="One context, compressed once", show_header=False)
    share = result["compressed_bytes"] / result["full_bytes"]
    sizes.add_row("context tokens", f"{result['context_tokens']:,} (+ {result['prefix_tokens']} of the prompt)")
    sizes.add_row("full cache", f"{result['full_bytes'] / 2**20:.1f} MiB")
    sizes.add_row("compressed cache", f"{result['compressed_bytes'] / 2**20:.1f} MiB ({share:.0%})")
    sizes.add_row("prefill", f"{result['prefill_seconds']:.1f} s")
    sizes.add_row("scoring and eviction", f"{result['compress_seconds']:.1f} s, once for all questions")
    console.print(sizes)
    rows = result["answers"]
    table = Table(title="Answers")
    titles = {
        "question": "question",
        "expected": "right answer",
        "answer_full": "full cache",
        "answer": "compressed cache",
    }
    keys = [key for key in titles if key in rows[0]]
    for key in keys:
        table.add_column(titles[key])
    for row in rows:
        table.add_row(*(escape(str(row[key])) for key in keys))
    console.print(table)


def demo_context(n_records: int, n_questions: int, seed: int) -> tuple[str, list[tuple[str, str]]]:
    """Records of made-up software packages, and questions on them with their answers.

    Versions and sizes cannot be guessed, so a right answer has come out of the context.
    """
    rng = random.Random(seed)
    names = rng.sample([f"{word}-{kind}" for word in _WORDS for kind in _KINDS], n_records)
    records, questions = [], []
    for name in names:
        version = f"{rng.randrange(1, 9)}.{rng.randrange(20)}.{rng.randrange(9)}-{rng.randrange(1, 9)}"
        size = str(rng.randrange(100, 9999))
        maintainer = rng.choice(_PEOPLE)
        records.append(f"Package: {name}\nVersion: {version}\nInstalled-Size: {size}\nMaintainer: {maintainer}")
        field, value = rng.choice([("Version", version), ("Installed-Size", size)])
        questions.append((f"What is the {field} of the package {name}?", value))
    return "\n\n".join(records), rng.sample(questions, n_questions)


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: one context, six questions (two with `--smoke`), full and compressed cache side by side."""
    from .config import KVzipConfig

    context, asked = demo_context(10, 2 if args.smoke else 6, args.seed)
    args.console.print("loading the language model (a minute at most) ...")
    model, tokenizer = _load(args.model, "float32", None)
    config = KVzipConfig(keep_ratio=0.3)
    result = answer(model, tokenizer, context, [question for question, _ in asked], config, 24, compare_full=True)
    for row, (_, expected) in zip(result["answers"], asked, strict=True):
        row["expected"] = expected
    show(result, args.console)
    if args.model is None:
        args.console.print("A model of 135M parameters errs with the full cache too; compare the last two columns.")
    return result
