"""`hf-dataopt kvzip`: compress one context, answer several questions from the small cache."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..shell.data import STDIN, read_lines, read_text
from ..shell.models import load_language_model
from ..shell.options import (
    DTYPES,
    add_device,
    add_hub,
    add_publishing,
    add_template,
    address,
    check_publishing,
    device_of,
    push_options,
    template_options,
)
from ..shell.usage import check_count, only, refusing
from .scores import NAMES, score_of

if TYPE_CHECKING:
    from .cache import KVzipCache
    from .config import KVzipConfig
    from .gates import KVzipGates

HELP = "compress a context's key-value cache once, answer several questions from it (KVzip)"
EXAMPLES = [
    "hf-dataopt kvzip --context report.txt --question 'Who wrote it?' --question 'When?'",
    "hf-dataopt kvzip --model Qwen/Qwen3-0.6B --context report.txt --question 'Who wrote it?' --keep-ratio 0.3",
    "hf-dataopt kvzip --context report.txt --question 'Who wrote it?' --max-kv-tokens 512 --score kvgrad --json",
    "hf-dataopt kvzip --context report.txt --question 'Who wrote it?' --gates examples/gates",
    "hf-dataopt kvzip --context report.txt --question 'Who?' --system 'Be brief.' --template-kwargs '{\"tone\": \"dry\"}'",
    "hf-dataopt kvzip --context report.txt --question 'Who wrote it?' --push-to-hub me/report-cache --private",
]

# A made-up text, so that a right answer has come out of the context and not out of the model.
DEMO_CONTEXT = """Maria Lopez works on the third floor and her phone is 4471. John Smith sits on the second floor, phone 2093. \
The kitchen code is 8842. Lunch is at 12:30 on weekdays. The printer is called Gutenberg and stands beside Maria's desk. The \
cat of the house is called Bismarck. The wireless password is seahorse77. The office opened in 1987. The founder of the \
company is Greta Lindqvist. The garden has a pond with 14 turtles. The yearly party is in October. The bus to the station is \
number 36. The bicycle of Omar Haddad is yellow. The meeting room on the first floor is called Vesuvius. The coffee machine \
was bought in Trieste. The plant in the corridor is a lemon tree. The guard at night is Pavel Novak."""
DEMO_QUESTIONS = [
    ("What is the name of the printer?", "Gutenberg"),
    ("What is the wireless password?", "seahorse77"),
    ("Who is the founder of the company?", "Greta Lindqvist"),
    ("What is the number of the bus to the station?", "36"),
    ("Where was the coffee machine bought?", "Trieste"),
    ("What is the name of the meeting room?", "Vesuvius"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `hf-dataopt kvzip`."""
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--context", required=True, metavar="FILE", help="text file with the context; - for stdin")
    parser.add_argument(
        "--question", action="append", required=True, help="may be given several times; - for the lines of stdin"
    )
    parser.add_argument(
        "--keep-ratio", type=float, help="share of the context's pairs that stays, (0, 1] (default: 0.3)"
    )
    parser.add_argument("--max-kv-tokens", type=int, help="budget in tokens per head instead of a ratio")
    parser.add_argument("--chunk-size", type=int, help="context tokens repeated at a time (default: 512)")
    parser.add_argument(
        "--replay", choices=["exact", "local"], help="exact: the whole cache in sight, slower (default: local)"
    )
    parser.add_argument("--score", choices=list(NAMES), default="kvzip", help="how pairs are ranked")
    parser.add_argument(
        "--gates",
        metavar="FOLDER_OR_REPO",
        default=None,
        help="learned gates of this model: they rank pairs while the context is read, instead of --score and --replay",
    )
    parser.add_argument(
        "--storage",
        choices=["model", "int8", "int4"],
        default="model",
        help="how the cache is held: as made, or in few bits",
    )
    add_template(parser, "the context")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of an answer")
    add_device(parser, dtypes=DTYPES)
    parser.add_argument("--compare-full", action="store_true", help="answer from the full cache too")
    parser.add_argument("--payback", action="store_true", help="measure after how many questions compressing has paid")
    parser.add_argument("--output-dir", metavar="DIR", default=None, help="keep the compressed cache in this folder")
    add_hub(parser, "of the model")
    add_publishing(parser, "the compressed cache (it holds the context's tokens)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compress and answer.

    Args:
        args: the parsed command line.

    Returns:
        Sizes, seconds and answers, ready for JSON.

    Raises:
        UsageError: the context file cannot be read as text, template arguments are no JSON object, a setting is out of range,
            there are no gates where they are asked for, or nothing can be saved where it is asked for.
        ValueError: the model cannot be loaded or is not supported, or is not the one that the gates were fitted on.
    """
    from ..publishing.writer import check_target
    from .config import KVzipConfig
    from .gates import KVzipGates

    # settings and files first: a typo should not cost a model download
    with refusing():
        check_publishing(args)
        check_count("max_new_tokens", args.max_new_tokens)
        only(args, args.max_kv_tokens is None, "and --max-kv-tokens are two budgets; give one", "keep_ratio")
        repeats = score_of(args.score).looks_at == "repeat"
        only(args, repeats, f"is for scores that repeat the context, not {args.score}", "chunk_size", "replay")
        only(args, not args.gates, "is for scores that repeat the context, not --gates", "chunk_size", "replay")
        names = ("keep_ratio", "max_kv_tokens", "chunk_size", "replay", "score", "storage")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        config = KVzipConfig(**given, **template_options(args))
        if [args.context, *args.question].count(STDIN) > 1:
            raise ValueError("--context and --question cannot both be -: standard input is read once")
        context = read_text("--context", args.context)
        questions = read_lines("question", args.question)
        if not context.strip():
            raise ValueError(f"--context: there is no text in {args.context}")
        if args.output_dir:
            check_target(args.output_dir, "kvzip_cache")
        device_of(args.device)
        if args.gates and args.score != "kvzip":
            raise ValueError("--score and --gates are two ways to rank pairs; give one of them")
        gates = KVzipGates.from_pretrained(args.gates, token=args.token) if args.gates else None
    model, tokenizer = load_language_model(
        args.model, device=args.device, dtype=args.dtype, revision=args.revision, token=args.token
    )
    if gates is not None:
        gates.check(model)
    compare = ("full",) if args.compare_full else ()
    result, cache = answer(model, tokenizer, context, questions, config, args.max_new_tokens, compare, gates)
    if args.payback:
        result["payback"] = _payback(model, tokenizer, context, config, gates, args.max_new_tokens)
    if args.output_dir:
        cache.save_pretrained(args.output_dir)
        result["folder"] = args.output_dir
    if args.push_to_hub:
        result["repository"] = address(cache.push_to_hub(args.push_to_hub, **push_options(args)))
    return result


def answer(
    model: Any,
    tokenizer: Any,
    context: str,
    questions: list[str],
    config: KVzipConfig,
    max_new_tokens: int = 64,
    compare: Sequence[str] = (),
    gates: KVzipGates | None = None,
) -> tuple[dict[str, Any], KVzipCache]:
    """Prefill, compress and answer every question, with times and sizes.

    Args:
        model, tokenizer: a supported language model.
        context: the text the questions are about.
        questions: asked one by one, each of a fork of its own.
        config: how to compress.
        max_new_tokens: length of an answer.
        compare: `"full"` answers from the full cache too, `"random"` from one evicted at random to the same size.
        gates: rank pairs while the context is read; without a comparison the full cache is then never there, and
            `prefill_seconds` are those of reading, ranking and evicting.

    Returns:
        Sizes, seconds and answers, ready for JSON; and the compressed cache.
    """
    from ..progress import track
    from .proof import prove

    prove(model)  # once per class, no part of compressing
    start = time.perf_counter()
    cache, others, prefilled_at = _compress(model, tokenizer, context, config, compare, gates)
    compressed_at = time.perf_counter()
    rows = [
        {"question": question}
        | {
            name: _generate(model, tokenizer, one, question, max_new_tokens)
            for name, one in {"answer": cache, **others}.items()
        }
        for question in track(questions, "Answering", unit="question")
    ]
    found = {
        "context_tokens": cache.prompt.context_ids.numel(),
        "prefix_tokens": cache.prompt.prefix_ids.numel(),
        "full_bytes": cache.full_nbytes,
        "compressed_bytes": cache.nbytes,
        "prefill_seconds": round(prefilled_at - start, 2),
        "compress_seconds": round(compressed_at - prefilled_at, 2),
        "config": config.to_json_string(),
        "answers": rows,
    }
    return found, cache


def _compress(
    model: Any, tokenizer: Any, context: str, config: KVzipConfig, compare: Sequence[str], gates: KVzipGates | None
) -> tuple[KVzipCache, dict[str, KVzipCache], float]:
    """The compressed cache, those it is compared with by the name of their answers, and when the prefill had ended."""
    from .cache import KVzipCache
    from .prefill import prefill
    from .prompt import build_prompt
    from .scoring import score_context

    if gates is not None and not compare:
        cache = KVzipCache.from_context(model, tokenizer, context, config=config, gates=gates)
        return cache, {}, time.perf_counter()
    prompt = build_prompt(tokenizer, context, config)
    if gates is None:
        prefilled = prefill(model, prompt, config)
        prefilled_at = time.perf_counter()
        scores = score_context(prefilled, config)
    else:
        prefilled, scores = gates.prefill(model, prompt, config)
        prefilled_at = time.perf_counter()
    others = {}
    if "full" in compare:
        everything = replace(config, keep_ratio=1.0, max_kv_tokens=None, storage="model")
        others["answer_full"] = KVzipCache.from_scores(prefilled, scores, everything, tokenizer=tokenizer)
    if "random" in compare:
        noise = score_context(prefilled, replace(config, score="random_eviction"), progress=False)
        others["answer_random"] = KVzipCache.from_scores(prefilled, noise, config, tokenizer=tokenizer)
    cache = KVzipCache.from_scores(prefilled, scores, config, tokenizer=tokenizer, free=True)
    if gates is not None:
        cache.score_by(gates)
    return cache, others, prefilled_at


def _generate(model: Any, tokenizer: Any, cache: KVzipCache, question: str, max_new_tokens: int) -> str:
    inputs = cache.inputs(question)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def _payback(
    model: Any, tokenizer: Any, context: str, config: KVzipConfig, gates: KVzipGates | None, tokens: int
) -> dict[str, Any]:
    """Measured on this context: questions until compressing has paid (None: never), and the line that says so."""
    from .payback import payback

    found = payback(model, tokenizer, context, config, gates=gates)
    questions = found.break_even(tokens)
    return {"questions": None if questions == math.inf else questions, "tokens": tokens, "line": found.line(tokens)}


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
        "answer_random": "as small, random",
    }
    keys = [key for key in titles if key in rows[0]]
    for key in keys:
        table.add_column(titles[key])
    for row in rows:
        table.add_row(*(escape(str(row[key])) for key in keys))
    console.print(table)
    if "payback" in result:
        console.print(result["payback"]["line"], soft_wrap=True)
    for name in ("folder", "repository"):
        if name in result:
            console.print(f"{name}: {escape(str(result[name]))}", soft_wrap=True)


def demo(args: argparse.Namespace, output_dir: Path) -> dict[str, Any]:
    """The demo's section: one context, six questions (two with `--smoke`), full and compressed cache side by side.

    A third column answers from a cache of the same size whose pairs were chosen at random.
    """
    from .config import KVzipConfig

    asked = DEMO_QUESTIONS[:2] if args.smoke else DEMO_QUESTIONS
    model, tokenizer = args.language_model()
    config = KVzipConfig(keep_ratio=0.3)
    questions = [question for question, _ in asked]
    result, _ = answer(model, tokenizer, DEMO_CONTEXT, questions, config, 20, compare=("full", "random"))
    for row, (_, expected) in zip(result["answers"], asked, strict=True):
        row["expected"] = expected
    show(result, args.console)
    if args.model is None:
        args.console.print(
            "A model of 135M parameters errs with the full cache too: compare the columns with each other."
        )
    return {**result, "claims": _claims(result)}


def _claims(result: dict[str, Any]) -> list[dict[str, str]]:
    """Rows for the demo's last table; a right answer has the expected words in it."""
    rows = result["answers"]

    def right(column: str) -> int:
        return sum(bool(re.search(rf"\b{re.escape(row['expected'])}\b", row[column], re.IGNORECASE)) for row in rows)

    wait = result["prefill_seconds"]
    return [
        {
            "claim": f"cache of {result['prefix_tokens'] + result['context_tokens']:,} tokens",
            "baseline": f"full {result['full_bytes'] / 2**20:.1f} MiB",
            "ours": f"{result['compressed_bytes'] / 2**20:.1f} MiB",
        },
        {
            "claim": f"right answers to {len(rows)} questions",
            "baseline": f"full {right('answer_full')}; as small, at random {right('answer_random')}",
            "ours": str(right("answer")),
        },
        {
            "claim": "seconds until the first question can be asked",
            "baseline": f"full {wait:.1f}",
            "ours": f"{wait + result['compress_seconds']:.1f}",
        },
    ]
