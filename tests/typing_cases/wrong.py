"""Mistakes that a type checker must catch, one a marked line, and complains of nothing else. It is read, never run."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from hf_dataopt import (
    CoMixupConfig,
    DatasetCondenser,
    FeatureExtractor,
    IDCConfig,
    KVzipCache,
    KVzipConfig,
    PuzzleMixConfig,
    RelationCleaner,
    RelationConfig,
    StreamingContextMemory,
    load_ccm,
)


def wrong(model: Any, tokenizer: Any, rows: Dataset, cache: KVzipCache) -> None:
    RelationCleaner(temprature=4)  # misuse: a letter is missing
    RelationCleaner(score="combind")  # misuse: no such score
    RelationConfig.reference(temperature="4")  # misuse: a text for a number
    KVzipConfig(keep_ratio="0.3")  # misuse: a text for a number
    KVzipConfig.reference(keepratio=0.3)  # misuse: another name
    KVzipCache.from_context(model, tokenizer, "text", ratio=0.3)  # misuse: another name
    cache.push_to_hub("me/cache", privat=True)  # misuse: a letter is missing
    KVzipCache.from_pretrained("me/cache", model, version="main")  # misuse: it is called revision
    IDCConfig.cifar10(image_per_class=10)  # misuse: a letter is missing
    IDCConfig(metric="l3")  # misuse: no such metric
    DatasetCondenser(IDCConfig(), methods="idc")  # misuse: another name
    PuzzleMixConfig.cifar100(clean_wheight=1.0)  # misuse: a letter too many
    CoMixupConfig.tiny_imagenet(grid="4")  # misuse: a text for a number
    FeatureExtractor("me/vit", colunm="image")  # misuse: letters in another order
    load_ccm("me/chat-ccm", device=["cpu"])  # misuse: a list for a device
    load_ccm("me/chat-ccm").memory.generate("Where?").strip()  # misuse: a memory without a tokenizer answers in ids
    StreamingContextMemory(model, tokenizer, max_kv="160")  # misuse: a text for a number
    RelationCleaner().fit(rows, on_error="ignore")  # misuse: no such word
