"""Figure 8.9: answers from caches that each score evicts, without knowing the questions, at ratios from 0.1 to 1.0.

Sets, prompts, lengths and metrics are the reference code's (`eval_tasks.py`, `eval_metrics.py`); sets come from the Hub or
from a folder (`--source squad=FOLDER`), `records` and `prose` from packages. `--measure answers` generates greedily and
marks with the set's metric; `--measure nll` reads the right answer's mean negative log-likelihood off, a few times cheaper
and finer where a small model is wrong with the full cache already. Every context is read once, each score evicts from the
same full cache, under one budget over all layers and heads (section 8.4.1). Every cell (set, context, score, ratio) is kept
as it ends, so a run that was stopped goes on there.

    python benchmarks/kvzip_eval.py --tasks records prose --measure nll
    python benchmarks/kvzip_eval.py --model Qwen/Qwen3-0.6B --tasks squad gsm scbench_kv_tiny --examples 100
    python benchmarks/kvzip_eval.py --tasks squad gsm --samples        # on made-up files of the same columns
    python benchmarks/kvzip_eval.py --smoke
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import DATA, RESULTS, show, write
from eval_figure import draw
from eval_samples import write_samples
from eval_tasks import TASKS, Example, Task, examples_of, task_of
from kvzip_quality import heads_of_prose, interval, read_off

from hf_dataopt import KVzipCache, KVzipConfig, KVzipGates
from hf_dataopt.kvzip.prefill import prefill
from hf_dataopt.kvzip.prompt import build_prompt, question_ids
from hf_dataopt.kvzip.scores import NAMES
from hf_dataopt.kvzip.scoring import score_context
from hf_dataopt.progress import track
from hf_dataopt.text.demo_model import load_demo_model

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
FULL = ("full", 1.0)
Cell = tuple[str, int, str, float]  # task, context, score, ratio


class Cells:
    """What was measured, by cell; one line of a file each, written as it ends.

    Args:
        path: of the file, named after the settings that all of its cells share.
        restart: forget what is in it.
    """

    def __init__(self, path: Path, restart: bool = False) -> None:
        self.path, self.found = path, {}
        if restart:
            path.unlink(missing_ok=True)
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            self.found[self.key(row)] = row

    @staticmethod
    def key(row: dict[str, Any]) -> Cell:
        """Which cell a row is."""
        return row["task"], row["context"], row["score"], row["ratio"]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a cell."""
        self.found[self.key(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Asker:
    """Asks one cache the questions of an example, and marks.

    Args:
        model, tokenizer: the language model.
        task: how to ask and to mark.
        measure: `"answers"` or `"nll"`.
        most: questions of a context.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, measure: str, most: int) -> None:
        self.model, self.tokenizer, self.task, self.measure, self.most = model, tokenizer, task, measure, most

    def __call__(self, cache: KVzipCache, example: Example) -> tuple[list[float], list[str]]:
        """Marks (or NLLs) of all questions, and what was said."""
        marks, said, rows = [], [], []
        for index, (question, answer) in enumerate(zip(example.questions[: self.most], example.answers, strict=False)):
            begin = example.begins[index] if example.begins else ""
            ids = question_ids(self.tokenizer, cache.prompt.suffix_ids, self.task.ask.format(question), cache.config)
            ids = torch.cat([ids, self._ids(begin)])
            if self.measure == "nll":
                right = self._ids(answer)
                rows.append((torch.cat([ids, right]), right.numel()))
                continue
            inputs = cache.inputs(ids)
            output = self.model.generate(**inputs, max_new_tokens=self.task.max_new_tokens, do_sample=False)
            text = self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            marks.append(self.task.mark(text.strip(), answer, example))
            said.append(text)
        return (marks or [nll for nll, _ in read_off(self.model, cache, rows)]), said

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def one_context(
    cells: Cells,
    asker: Asker,
    name: str,
    index: int,
    example: Example,
    scores: list[str],
    ratios: list[float],
    gates: KVzipGates | None,
    config: KVzipConfig,
    heads: Any = None,
) -> None:
    """All cells of one context that are not there yet."""
    wanted = {score: [r for r in ratios if (name, index, score, r) not in cells.found] for score in scores}
    todo = {score: missing for score, missing in wanted.items() if missing}
    if (name, index, *FULL) not in cells.found:
        todo = {"full": [1.0], **todo}
    if not todo:
        return
    model, config = asker.model, replace(config, task_line=asker.task.task_line)
    prompt = build_prompt(asker.tokenizer, example.context, config)
    learned = None
    if gates is not None and "gates" in todo:
        prefilled, learned = gates.prefill(model, prompt, config, progress=False)
    else:
        prefilled = prefill(model, prompt, config, progress=False)
    for score, missing in todo.items():
        named = (
            "random_eviction" if score == "full" else score
        )  # of the full cache nothing is evicted, whatever the score
        budget = replace(config, level="head") if score == "heads" else config
        try:
            if score == "gates":
                values: Any = learned
            elif score == "heads":
                values = heads.to(model.device)[..., None].expand(*heads.shape, prefilled.n_context)
            else:
                values = score_context(prefilled, replace(config, score=named), progress=False)
        except RuntimeError as error:  # no room on the device: the other scores go on
            print(f"{name} {index}: no {score} ({error!s:.200})", flush=True)
            continue
        for ratio in missing:
            cache = KVzipCache.from_scores(
                prefilled, values, replace(budget, keep_ratio=ratio), tokenizer=asker.tokenizer
            )
            marks, said = asker(cache, example)
            row = {"task": name, "context": index, "score": score, "ratio": ratio, "tokens": prefilled.n_context}
            cells.add({**row, "bytes": cache.context_nbytes / cache.full_context_nbytes, "marks": marks, "said": said})


def means(cells: Cells) -> dict[tuple[str, str, float], dict[int, float]]:
    """By task, score and ratio: the mean over the questions of every context."""
    found: dict[tuple[str, str, float], dict[int, float]] = defaultdict(dict)
    for (task, index, score, ratio), row in cells.found.items():
        found[task, score, ratio][index] = float(np.mean(row["marks"]))
    return found


def paired(ours: dict[int, float], full: dict[int, float], divide: bool) -> tuple[float | None, list[float] | None]:
    """Ours over (or minus) the full cache's, with a 95 % bootstrap interval over the contexts that both have.

    Nothing is over a full cache whose marks are all 0.
    """
    both = sorted(set(ours) & set(full))
    a, b = np.array([ours[i] for i in both]), np.array([full[i] for i in both])
    if not divide:
        return float((a - b).mean()), interval(a - b, len(both))
    return (float(a.mean() / b.mean()), interval(a, len(both), b)) if b.any() else (None, None)


def table(cells: Cells, measure: str) -> list[dict[str, Any]]:
    """One row per task, score and ratio, beside the full cache; then the mean over tasks, as in Figure 8.10."""
    found, rows = means(cells), []
    relative = "over full" if measure == "answers" else "minus full"
    by_score: dict[tuple[str, float], list[float]] = defaultdict(list)
    for (task, score, ratio), values in sorted(found.items(), key=lambda one: (one[0][0], one[0][1], -one[0][2])):
        full = found.get((task, *FULL))
        if not full:
            continue
        value, spread = paired(values, full, measure == "answers")
        if value is not None:
            by_score[score, ratio].append(value)
        row = {"task": task, "score": score, "keep_ratio": ratio, "contexts": len(values)}
        rows.append(
            {**row, measure: float(np.mean(list(values.values()))), relative: value, "95 %": spread and str(spread)}
        )
    tasks = len({row["task"] for row in rows})
    for (score, ratio), shares in by_score.items() if tasks > 1 else ():
        row = {"task": f"mean of {len(shares)}", "score": score, "keep_ratio": ratio, "contexts": None}
        rows.append({**row, measure: None, relative: float(np.mean(shares)), "95 %": None})
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", default=["records", "prose"], metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "--scores",
        nargs="+",
        default=list(NAMES),
        metavar="SCORE",
        help="default: all of kvzip/scores; gates for --gates",
    )
    parser.add_argument("--gates", default=None, help="folder or Hub name of gates")
    parser.add_argument(
        "--heads",
        type=int,
        default=0,
        metavar="TOKENS",
        help="add heads: whole ones, by scores of so much of Python's help",
    )
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--measure", choices=["answers", "nll"], default="answers")
    parser.add_argument("--examples", type=int, default=12, help="contexts of each task")
    parser.add_argument("--questions", type=int, default=8, help="most questions of a context")
    parser.add_argument("--chunk-size", type=int, default=KVzipConfig().chunk_size)
    parser.add_argument("--source", action="append", default=[], metavar="TASK=FOLDER")
    parser.add_argument("--suffix", default="", help="of the names of table and figure")
    parser.add_argument("--samples", action="store_true", help="made-up files of the sets' columns instead of the Hub")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restart", action="store_true", help="forget the cells of an earlier run")
    parser.add_argument("--cells", type=Path, default=None, help="file that keeps what is measured, cell by cell")
    parser.add_argument("--gigabytes", type=float, default=None, help="most memory of the accelerator")
    parser.add_argument("--smoke", action="store_true", help="one short context, nothing written")
    args = parser.parse_args()
    if args.gates and "gates" not in args.scores:
        args.scores.append("gates")
    if args.heads and "heads" not in args.scores:
        args.scores.append("heads")
    if any("=" not in one for one in args.source):
        parser.error("--source is TASK=FOLDER, as in squad=my/files")
    unknown = set(args.scores) - {*NAMES, *(["gates"] if args.gates else []), *(["heads"] if args.heads else [])}
    if unknown:
        parser.error(f"no score {', '.join(sorted(unknown))}; known are {', '.join(NAMES)}, and gates with --gates")
    for task in args.tasks:
        task_of(task)
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    model, tokenizer = load_demo_model(args.model, dtype=getattr(torch, args.dtype))
    model.to(args.device)
    if args.gigabytes and args.device == "cuda":
        most = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.gigabytes * 2**30 / most)
    gates = KVzipGates.from_pretrained(args.gates) if args.gates else None
    sources = dict(one.split("=", 1) for one in args.source)
    config = KVzipConfig(chunk_size=args.chunk_size)
    if args.smoke:
        with tempfile.TemporaryDirectory() as scratch:
            sources = write_samples(Path(scratch) / "samples")
            cells = Cells(Path(scratch) / "cells.jsonl")
            [example] = examples_of("squad", sources, tokenizer, 1, 0)
            for measure in ("answers", "nll"):
                asker = Asker(model, tokenizer, replace(task_of("squad"), max_new_tokens=4), measure, 1)
                one_context(cells, asker, f"squad {measure}", 0, example, ["kvzip", "snapkv"], [0.5], None, config)
            show("smoke", table(cells, "answers"))
            draw(means(cells), "answers", Path(scratch) / "figure.png")
        return
    if args.samples:
        sources = {**write_samples(DATA / "samples", args.seed), **sources}
    kind = "samples_" if args.samples else ""
    name = f"{kind}{(args.model or 'smollm2').replace('/', '_')}_{args.measure}_{args.chunk_size}_{args.questions}_{args.seed}"
    cells = Cells(args.cells or DATA / f"kvzip_eval_{name}.jsonl", args.restart)
    heads, prose = heads_of_prose(model, tokenizer, args.heads) if args.heads else (None, 0)
    suffix = f"{'_samples' if args.samples else ''}{args.suffix}"
    about = {
        "model": args.model or "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised to float32)",
        "sets": "made up, of the columns of the sets (eval_samples.py)" if args.samples else "of the Hub or packages",
        "chunk_size": args.chunk_size,
        "questions_per_context": args.questions,
        "seed": args.seed,
        "fitted_gates": None if gates is None else gates.about,
        "tokens_that_heads_are_scored_by": prose or None,
    }
    for task in args.tasks:
        asker = Asker(model, tokenizer, task_of(task), args.measure, args.questions)
        examples = examples_of(task, sources, tokenizer, args.examples, args.seed)
        for index, example in enumerate(track(examples, f"Evaluating {task}", unit="context")):
            one_context(cells, asker, task, index, example, args.scores, args.ratios, gates, config, heads)
            write(f"kvzip_eval_{args.measure}{suffix}", table(cells, args.measure), quiet=True, **about)
    path = RESULTS / f"kvzip_eval_{args.measure}{suffix}.png"
    draw(means(cells), args.measure, path)
    write(f"kvzip_eval_{args.measure}{suffix}", table(cells, args.measure), **about, figure=path.name)


if __name__ == "__main__":
    main()
