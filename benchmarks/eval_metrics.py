"""How a generated answer is marked: the metrics of KVzip's reference code (its `results/metric.py`, after SCBench's).

A metric takes (prediction, answer) and returns a number from 0 to 1; an empty prediction is 0 before any metric is asked.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter

_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_NUMBERS = {word: str(n) for n, word in enumerate(_WORDS)}


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, digits for the words zero to nine, single spaces."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    text = " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
    return re.sub(rf"\b({'|'.join(_NUMBERS)})\b", lambda found: _NUMBERS[found.group()], text)


def contains(prediction: str, answer: str) -> float:
    """Is the answer somewhere in what was said (both normalised)."""
    return float(normalised(answer) in normalised(prediction))


def contains_share(prediction: str, answer: str) -> float:
    """Share of the answers, parted by ", ", that were said, as written (SCBench's variable tracking)."""
    answers = answer.split(", ")
    return sum(one in prediction for one in answers) / len(answers)


def exact(prediction: str, answer: str) -> float:
    """Said that and nothing else (SCBench's math find)."""
    return float(prediction == answer)


def first_line_contains(prediction: str, answer: str) -> float:
    """`contains` without what follows the first line (SCBench's multiple choice on books)."""
    return contains(prediction.split("\n")[0], answer)


def number_after_answer(prediction: str, answer: str) -> float:
    """GSM8K: the number behind `####`, after the last "the answer is" of the prediction if it says so."""
    said = prediction.strip().lower().split("the answer is ")[-1]
    return float(answer.strip().split("#### ")[-1] in said)


def option(prediction: str, answer: str) -> float:
    """SCBench's many-shot: the letter where both begin with one, else the option's text."""
    if prediction.startswith("(") and answer.startswith("("):
        return float(_letter(prediction) == _letter(answer))
    return contains(prediction, answer.split(")", 1)[1].strip() if answer.startswith("(") else answer)


def _letter(text: str) -> str:
    return text.split("(", 1)[1].split(")")[0]


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of normalised words."""
    said, wanted = normalised(prediction).split(), normalised(answer).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def f1_or_contains(prediction: str, answer: str) -> float:
    """The better of both (SCBench's questions on books)."""
    return max(f1(prediction, answer), contains(prediction, answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F over sentences: union of the words of longest common subsequences, as the package `rouge` 1.0.1 counts them."""
    said, wanted = _sentences(prediction), _sentences(answer)
    if not said or not wanted:
        return 0.0
    union: set[str] = set()
    for sentence in wanted:
        for other in said:
            union |= set(_common(sentence, other))
    recall = len(union) / len({word for sentence in wanted for word in sentence})
    precision = len(union) / len({word for sentence in said for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    parts = [" ".join(part.split()) for part in text.split(".")]
    return [part.split(" ") for part in parts if part]


def _common(a: list[str], b: list[str]) -> list[str]:
    """A longest common subsequence."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, one in enumerate(a, 1):
        for j, other in enumerate(b, 1):
            lengths[i][j] = lengths[i - 1][j - 1] + 1 if one == other else max(lengths[i - 1][j], lengths[i][j - 1])
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def bleu(prediction: str, answer: str) -> float:
    """Sentence BLEU-4 of white-space tokens, smoothed by method 4 of Chen and Cherry as nltk does it (RepoQA's similarity)."""
    said, wanted = re.split(r"\s+", prediction.strip()), re.split(r"\s+", answer.strip())
    logs, zeros = 0.0, 0
    for n in range(1, 5):
        grams, right = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (said, wanted))
        hits, total = sum((grams & right).values()), max(sum(grams.values()), 1)
        if not hits and n == 1:
            return 0.0
        if not hits:
            if len(said) <= 1:
                continue
            zeros += 1
            logs += math.log(math.log(len(said)) / (2**zeros * 5) / total) / 4
        else:
            logs += math.log(hits / total) / 4
    brevity = 1.0 if len(said) > len(wanted) else math.exp(1 - len(wanted) / len(said))
    return brevity * math.exp(logs)


def right_function(prediction: str, answer: str, functions: list[str], threshold: float = 0.8) -> float:
    """RepoQA: of all the repository's functions, is the one asked for the most alike, and alike enough.

    Differs: the function is taken out of a fenced block by its fence, not by a parser, and comments count.
    """
    fenced = re.search(r"```[\w+]*\n(.*?)(?:```|\Z)", prediction, re.DOTALL)
    code = fenced.group(1) if fenced else prediction
    alike = {function: bleu(code, function) for function in functions}
    return float(max(alike, key=lambda function: alike[function]) == answer and alike[answer] >= threshold)
