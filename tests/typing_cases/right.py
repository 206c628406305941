"""How the package is meant to be called, for type checkers: not one complaint. It is read, never run."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_dataopt import (
    CCMConfig,
    CoMixupConfig,
    CompressedContextMemory,
    DataCollatorForCCM,
    DataCollatorForCoMixup,
    DataCollatorForMixup,
    DataCollatorForPuzzleMix,
    DatasetCondenser,
    FeatureExtractor,
    IDCConfig,
    KVzipCache,
    KVzipConfig,
    KVzipGates,
    MixupSchedule,
    MultiFormation,
    PuzzleMixConfig,
    RelationCleaner,
    RelationConfig,
    RelationReport,
    StreamingContextMemory,
    load_ccm,
    payback,
    plot_mixup,
    plot_retention,
    puzzle_mix,
    soft_target_loss,
)
from hf_dataopt.condensation.saved import load_condensed, push_condensed


def kvzip(context: str, questions: list[str]) -> list[str]:
    model: Any = AutoModelForCausalLM.from_pretrained("me/model")
    tokenizer = AutoTokenizer.from_pretrained("me/model")
    config = KVzipConfig(keep_ratio=0.3, chunk_size=512, replay="local", score="kvgrad", system="Be brief.")
    theirs = KVzipConfig.reference(keep_ratio=0.5, level="head")
    cache = KVzipCache.from_context(model, tokenizer, context, config=config)
    small = KVzipCache.from_context(model, tokenizer, context, 0.1)
    gates = KVzipGates.fit(model, tokenizer, [context])
    gated = KVzipCache.from_context(model, tokenizer, context, keep_ratio=theirs.keep_ratio, gates=gates)
    answers: list[str] = []
    for question in questions:
        inputs = cache.inputs(question)
        output = model.generate(**inputs, max_new_tokens=64)
        answers.append(str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    cache.save_pretrained("folder", license="mit")
    again = KVzipCache.from_pretrained("me/cache", model, tokenizer, revision="main", token=True)
    made = again.push_to_hub("me/cache", private=True, commit_message="A context")
    print(made.oid, made.pr_url, small.nbytes, gated.full_nbytes, cache.fork())
    print(payback(model, tokenizer, context).line(tokens=32))
    plot_retention(cache)
    gates.push_to_hub("me/gates", license="apache-2.0", create_pr=True)
    return answers


def relation(rows: Dataset) -> RelationReport:
    rows = rows.map(FeatureExtractor("me/vit", column="image", dtype="bfloat16"), batched=True)
    cleaner = RelationCleaner(temperature=4, score="label_noise", cut="algorithm4", partition_size=None)
    settings = RelationConfig(cut=0.05, max_memory_gb=0.1)
    print(RelationConfig.dissertation(0.1, edge_cutoff=0.0), RelationConfig.reference(seed=3))
    report = RelationCleaner(settings).fit(rows, "label", features_column=["f5", "f10"], probs_column=["p5", "p10"])
    report = cleaner.fit(rows, label_column="label", output_dir="run", on_error="skip")
    clean = report.filter(rows, outliers=True, near_duplicates=True)
    report.relation_map(17)
    print(len(clean), report.evidence(17), report.worst(10))
    return report.rethreshold(noise_rate=0.05)


def mixup(model: Any, rows: Dataset, images: torch.Tensor, targets: torch.Tensor, saliency: torch.Tensor) -> None:
    config = PuzzleMixConfig.cifar100(clean_weight=1.0, image_mean=(0.5,), image_std=(0.2,))
    collator = DataCollatorForPuzzleMix(model, config)
    DataCollatorForCoMixup(model, CoMixupConfig.imagenet(grid=(4, 4), part_size=16), seed=1)
    DataCollatorForMixup(model, MixupSchedule(probabilities={"puzzle_mix": 0.5, "cutmix": 0.5}))
    args = TrainingArguments(output_dir="run", remove_unused_columns=False)
    Trainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()
    result = puzzle_mix(images, targets, saliency, config, torch.Generator())
    plot_mixup(result, images, config, rows=4).savefig("mixed.png")
    loss: torch.Tensor = soft_target_loss(model(pixel_values=images), targets)
    print(loss.item(), collator.statistics)


def condensation(train: Dataset, test: Dataset) -> Dataset:
    config = IDCConfig(images_per_class=10, factor=2, width=32, metric="l1", storage="uint8", mean=(0.5, 0.5, 0.5))
    preset = IDCConfig.imagenet_subset(20, images_per_class=1, dtype="bfloat16")
    condenser = DatasetCondenser(config, method="mosaic", device="cpu")
    condensed = condenser.condense(train, image_column="image", label_column="label", output_dir="run")
    scores = condenser.evaluate(condensed, test, seeds=1)
    made = push_condensed(condensed, "me/ten", about={"config": preset, "scores": scores}, revision="dev", token="hf_x")
    print(str(made), made.commit_url, condenser.estimate(train))
    found: Dataset = load_condensed("me/ten")
    return found.map(MultiFormation.from_dataset(found), batched=True)


def memory(base: Any) -> Any:
    config = CCMConfig(r=8, num_comp_tokens=2, memory="concat")
    model, tokenizer, held = load_ccm("me/chat-ccm", dtype="bfloat16", device="cpu")
    DataCollatorForCCM(tokenizer, config)
    held.append("Anna lives in Oslo.")
    held.append([{"role": "user", "content": "Her cat is called Tom."}])
    held.undo()
    other = CompressedContextMemory(model, tokenizer, system="Be brief.")
    other.reset()
    stream = StreamingContextMemory(model, tokenizer, max_kv=160)
    print(stream.perplexity("a long text"), held.nbytes, held.inputs("Where?")["input_ids"].shape)
    held.push_to_hub("me/memory", adapter="me/chat-ccm", private=True)
    answer = held.generate("Where does Anna live?", max_new_tokens=16)
    return answer.strip() if isinstance(answer, str) else answer
