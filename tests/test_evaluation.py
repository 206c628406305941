"""Sets and metrics of `benchmarks/kvzip_eval.py`: marks as the reference packages give them, files read back by column."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dataopt import KVzipCache

from .conftest import REPO
from .models import byte_tokenizer, tiny_model


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Any:
    sys.path.insert(0, str(REPO / "benchmarks"))
    yield
    sys.path.remove(str(REPO / "benchmarks"))


# recorded from the packages rouge 1.0.1 and nltk 3.9
@pytest.mark.parametrize(
    ("said", "wanted", "mark"),
    [
        ("the cat sat on the mat. it ran.", "a cat sat on a red mat. it was fast.", 0.6249999950781252),
        ("the cat sat", "the cat sat on the mat", 0.7499999953125),
        ("one two. three four five", "five four three. two one", 0.3999999950000001),
        ("", "the cat", 0.0),
    ],
)
def test_rouge_l(said: str, wanted: str, mark: float) -> None:
    from eval_metrics import rouge_l

    assert rouge_l(said, wanted) == pytest.approx(mark, abs=1e-12)


@pytest.mark.parametrize(
    ("said", "wanted", "mark"),
    [
        ("def f(x): return x + 1", "def f(x): return x + 2", 0.7598356856515925),
        ("a b c d", "a b c d e f g h", 0.36787944117144233),
        ("x y z w v u", "x q z r v s", 0.049475702907177795),
        ("p q", "a b", 0.0),
    ],
)
def test_bleu(said: str, wanted: str, mark: float) -> None:
    from eval_metrics import bleu

    assert bleu(said, wanted) == pytest.approx(mark, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "mark"),
    [
        ("contains", "It is THE seven-eleven, of Oslo!", "7eleven of oslo", 0.0),
        ("contains", "He owns seven, an old cat.", "7 old cat", 1.0),
        ("contains_share", "VAR A and C", "A, B, C, D", 0.5),
        ("exact", "41", "41", 1.0),
        ("exact", "41.", "41", 0.0),
        ("first_line_contains", "Lima\nnot Oslo", "Oslo", 0.0),
        ("number_after_answer", "First 12. The answer is 30. No, the answer is 41.", "adds\n#### 41", 1.0),
        ("number_after_answer", "The answer is 30.", "41 - 11\n#### 41", 0.0),
        ("option", "(B) long", "(B) round", 1.0),
        ("option", "It is round", "(B) round", 1.0),
        ("option", "(A) round", "(B) round", 0.0),
        ("f1", "a red cat sat", "red cat ran", 2 / 3),
        ("f1_or_contains", "so it was a red cat", "red cat", 1.0),
    ],
)
def test_metrics(metric: str, said: str, wanted: str, mark: float) -> None:
    import eval_metrics

    assert getattr(eval_metrics, metric)(said, wanted) == pytest.approx(mark)


def test_right_function_needs_the_one_asked_for() -> None:
    from eval_metrics import right_function

    one, other = "def f(x, y): return x + y * 2 - 1", "def g(a): return [b for b in a if b]"
    said = f"Here:\n```python\n{one}\n```\nDone."
    assert right_function(said, one, [one, other]) == 1
    assert right_function(said, other, [one, other]) == 0  # the wrong one was repeated
    assert right_function("def f(x, y): pass", one, [one, other]) == 0  # not alike enough


def test_sets_are_read_from_files_of_their_columns(tmp_path: Path) -> None:
    from eval_samples import SCBENCH, write_samples
    from eval_tasks import TASKS, examples_of, task_of

    sources, tokenizer = write_samples(tmp_path), byte_tokenizer()
    names = ["squad", "gsm", *(f"scbench_{name}" for name in SCBENCH)]
    assert set(names) | {"needle", "records", "prose", "lengths"} == set(TASKS)
    for name in names:
        task, examples = task_of(name), examples_of(name, sources, tokenizer, 2, 0)
        assert len(examples) == 2
        for example in examples:
            assert len(example.questions) == len(example.answers) > 0
            marks = [task.mark(answer, answer, example) for answer in example.answers]
            assert marks == pytest.approx([1.0] * len(marks), abs=1e-6)
            assert task.mark("  ", example.answers[0], example) == 0
    [squad, _] = examples_of("squad", sources, tokenizer, 2, 0)
    assert len(squad.questions) == 8 and all(answer in squad.context for answer in squad.answers)
    [gsm, _] = examples_of("gsm", sources, tokenizer, 2, 0)
    assert gsm.questions[0].startswith("How many") and "How many" not in gsm.context
    [shots, _] = examples_of("scbench_many_shot", sources, tokenizer, 2, 0)
    assert all(answer in shots.context for answer in shots.answers)


def test_contexts_of_a_file_are_those_that_were_saved(tmp_path: Path) -> None:
    from eval_tasks import Example, examples_of, save_examples

    made = [Example(f"text {i}", ["who?", "when?"], ["I", "now"], begins=["It is"] * 2) for i in range(3)]
    save_examples(made, tmp_path / "contexts.jsonl")
    assert examples_of("lengths", {"lengths": str(tmp_path / "contexts.jsonl")}, None, 2, 0) == made[:2]


def test_answers_of_several_questions_are_read_in_one_forward() -> None:
    from kvzip_quality import read_off

    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, "Anna lives in Oslo, Bo in Bergen.", 0.5, progress=False)
    rows = [(torch.arange(3, 3 + n), size) for n, size in ((9, 2), (4, 3), (12, 1))]
    together = read_off(model, cache, rows)
    for row, (nll, match) in zip(rows, together, strict=True):
        [(alone, same)] = read_off(model, cache, [row])
        assert nll == pytest.approx(alone, abs=1e-5) and match == same
    # beside the model's own loss over nothing evicted
    whole = KVzipCache.from_context(model, tokenizer, "Anna lives in Oslo, Bo in Bergen.", 1.0, progress=False)
    ids = torch.cat([whole.prompt.ids, rows[0][0]])
    labels = torch.full_like(ids, -100)
    labels[-2:] = ids[-2:]
    assert read_off(model, whole, rows)[0][0] == pytest.approx(
        float(model(ids[None], labels=labels[None]).loss), abs=1e-5
    )


def test_needle_stands_at_its_depth() -> None:
    from eval_tasks import NEEDLE, load_needle

    tokenizer = byte_tokenizer()
    found = load_needle("", tokenizer, 99, 0, lengths=(4000,))
    places = [example.context.index(NEEDLE.strip()) for example in found]
    assert len(found) == 11 and places[0] == 0
    assert places[-1] + len(NEEDLE.strip()) == len(found[-1].context)
    straw = 4000 - len(NEEDLE)
    for depth, (place, example) in enumerate(zip(places, found, strict=True)):
        assert place <= depth * straw / 10 + 1 and len(example.context) <= 4000
        assert place == 0 or depth == 10 or example.context[: place - 1].rstrip().endswith(".")


def test_unknown_task_and_short_forms() -> None:
    from eval_tasks import task_of

    assert task_of("scbench_kv_tiny").max_new_tokens == 96
    with pytest.raises(ValueError, match="no task 'triviaqa'"):
        task_of("triviaqa")


def test_cells_go_on_and_relative_table(tmp_path: Path) -> None:
    from kvzip_eval import Cells, means, paired, table

    cells = Cells(tmp_path / "cells.jsonl")
    for context, (full, ours) in enumerate([([1.0, 1.0], [1.0, 0.0]), ([1.0, 0.0], [0.0, 0.0])]):
        row = {"task": "squad", "context": context, "tokens": 9}
        cells.add({**row, "score": "full", "ratio": 1.0, "marks": full})
        cells.add({**row, "score": "kvzip", "ratio": 0.3, "marks": ours})
    again = Cells(tmp_path / "cells.jsonl")
    assert again.found == cells.found
    assert means(again)["squad", "kvzip", 0.3] == {0: 0.5, 1: 0.0}
    [_, row] = table(again, "answers")
    assert (row["score"], row["answers"], row["over full"], row["contexts"]) == ("kvzip", 0.25, pytest.approx(1 / 3), 2)
    # the same loss in every context: no doubt about it
    assert paired({0: 0.5, 1: 0.0}, {0: 1.0, 1: 0.5}, divide=False) == (-0.5, [-0.5, -0.5])
    assert paired({0: 0.5, 1: 0.0}, {0: 1.0, 1: 0.0}, divide=True) == (0.5, [0.5, 0.5])
    assert paired({0: 0.5}, {0: 0.0}, divide=True) == (None, None)
    assert not Cells(tmp_path / "cells.jsonl", restart=True).found
