"""A page with two of the methods: questions about one long text, and wrong labels in a folder of images.

    pip install "hf-dataopt[app,demo]"
    python examples/app.py                                   # http://127.0.0.1:7860, the packaged SmolLM2
    python examples/app.py --model meta-llama/Llama-3.2-1B-Instruct --port 8000

Left: the answers of the full KV cache and of one that KVzip compressed without knowing the questions, and the bytes of both.
Right: a folder with a folder of images per class is read; labels in doubt are shown with the rows that speak against them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset

from hf_dataopt import KVzipCache, KVzipConfig, RelationCleaner, out_of_sample_probs
from hf_dataopt.kvzip.command import DEMO_CONTEXT
from hf_dataopt.text.demo_model import load_demo_model

SIDE = 16  # pixels that images are compared by; features of a trained network are better ones
QUESTIONS = "What is the wireless password?\nWhat is the name of the printer?\nWhere was the coffee machine bought?"


def answers(model: Any, tokenizer: Any, text: str, questions: str, keep_ratio: float) -> tuple[list[list[str]], str]:
    """Answers to questions, a line each, and what the caches weigh.

    Args:
        model, tokenizer: a supported language model.
        text: what the questions are about.
        questions: one a line.
        keep_ratio: share of the text's pairs that the compressed cache keeps.

    Returns:
        Rows of question, answer of the full cache, answer of the compressed one; and a sentence.
    """
    asked = [line.strip() for line in questions.splitlines() if line.strip()]
    if not text.strip() or not asked:
        return [], "Give a text and a question."
    full = KVzipCache.from_context(model, tokenizer, text, config=KVzipConfig(keep_ratio=1.0))
    small = full.fork()
    small.compress_again(keep_ratio)  # the scores are there already

    def said(cache: KVzipCache, question: str) -> str:
        inputs = cache.inputs(question)
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        told: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return told.strip()

    rows = [[question, said(full, question), said(small, question)] for question in asked]
    kib, whole = small.nbytes / 2**10, full.nbytes / 2**10
    return rows, f"{kib:,.0f} KiB of keys and values are kept of {whole:,.0f} ({kib / whole:.0%})."


def doubts(folder: str, count: int) -> tuple[list[tuple[Any, str]], str]:
    """Labels in doubt in a folder of images, with the rows that contradict them.

    Args:
        folder: holds a folder of images for every class.
        count: labels shown at most.

    Returns:
        Pictures with captions, a doubtful row before the three rows that contradict it most; and a sentence.
    """
    if not Path(folder).is_dir():
        return [], f"There is no folder {folder!r} on this machine."
    rows = load_dataset("imagefolder", data_dir=folder, split="train")
    names, images = rows.features["label"].names, rows["image"]
    seen = Dataset.from_dict({"label": rows["label"], "features": [pixels(image) for image in images]})
    seen = seen.cast_column("label", rows.features["label"])
    report = RelationCleaner().fit(
        out_of_sample_probs(seen, quiet=True), features_column="features", probs_column="probs"
    )
    found: list[tuple[Any, str]] = []
    worst = [int(row) for row in report.worst(len(seen)) if report.is_label_error[row]]
    for row in worst[: int(count)]:
        proof = report.evidence(row, 3)
        found.append((images[row], f"row {row}: {names[proof.label]}?"))
        for other, label, relation in zip(
            proof.conflicting, proof.conflicting_labels, proof.conflicting_relations, strict=True
        ):
            found.append((images[int(other)], f"against it: {names[int(label)]}, {relation:+.2f}"))
    return found, f"{len(worst)} of {len(seen)} labels are in doubt; beside each, the rows that contradict it most."


def pixels(image: Any) -> np.ndarray:
    """What an image is compared by: (3 SIDE SIDE,) values of its colours, small."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE)), np.float32).reshape(-1) / 255


def page(model: Any, tokenizer: Any) -> Any:
    """The Gradio page."""
    import gradio as gr

    with gr.Blocks(title="hf_dataopt") as blocks:
        with gr.Tab("Questions about a text"):
            text = gr.Textbox(DEMO_CONTEXT, label="Text", lines=8)
            questions = gr.Textbox(QUESTIONS, label="Questions, one a line", lines=3)
            ratio = gr.Slider(0.1, 1.0, 0.3, step=0.1, label="Share of the keys and values that is kept")
            ask = gr.Button("Ask", variant="primary")
            kept = gr.Markdown()
            told = gr.Dataframe(
                headers=["question", "full cache", "compressed"], wrap=True, column_widths=["20%", "40%", "40%"]
            )
            ask.click(lambda *given: answers(model, tokenizer, *given), [text, questions, ratio], [told, kept])
        with gr.Tab("Wrong labels in a folder"):
            folder = gr.Textbox(label="Folder on this machine, with a folder of images for every class")
            count = gr.Slider(1, 20, 6, step=1, label="Labels shown")
            look = gr.Button("Examine", variant="primary")
            summary = gr.Markdown()
            shown = gr.Gallery(columns=4, show_label=False, height="auto")
            look.click(doubts, [folder, count], [shown, summary])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="Hub name or folder; default: the packaged SmolLM2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    model, tokenizer = load_demo_model(args.model)
    page(model.to(args.device), tokenizer).launch(server_port=args.port)


if __name__ == "__main__":
    main()
