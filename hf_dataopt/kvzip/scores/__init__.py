"""Scores of key-value pairs, a file a method; `NAMES` is the one place that lists them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# name for `KVzipConfig(score=...)`, which is the file's too -> class in it
NAMES = {
    "kvzip": "KVzip",
    "kvzip_plus": "KVzipPlus",
    "kvzip_l2": "KVzipL2",
    "kvgrad": "KVgrad",
    "kvgrad_l2": "KVgradL2",
    "h2o": "H2O",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "streaming_llm": "StreamingLLM",
    "expected_attention": "ExpectedAttention",
    "duo_attention": "DuoAttention",
    "random_eviction": "RandomEviction",
}


def score_of(score: Any) -> Any:
    """The score that a name stands for, with its usual hyperparameters; a function stands for itself."""
    if not isinstance(score, str):
        return score
    return getattr(import_module(f".{score}", __package__), NAMES[score])()
