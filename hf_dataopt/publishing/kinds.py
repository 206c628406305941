"""The kinds of artifacts: where each lives on the Hub, what it must hold, and the code that uses it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# stand for names in cards until there are some
PLACEHOLDER = "OWNER/NAME"
MODEL = "OWNER/MODEL"
ADAPTER = "OWNER/ADAPTER"

_MODEL = """
model = AutoModelForCausalLM.from_pretrained({model}, dtype={dtype})
tokenizer = AutoTokenizer.from_pretrained({model})
"""
_TRANSFORMERS = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
# hf_dataopt before the adapter: PEFT alone does not know this type
_ADAPTED = (
    "import hf_dataopt\nfrom peft import PeftModel\n" + _TRANSFORMERS + _MODEL.replace("model = Auto", "base = Auto")
)


@dataclass(frozen=True)
class Kind:
    """One kind of artifact: its names, where it lives on the Hub, what it must hold, and the code that uses it."""

    title: str
    short: str
    repo_type: str
    needs: tuple[str, ...]
    usage: str


KINDS = {
    "relation_report": Kind(
        "report of a neural relation graph",
        "report",
        "",  # goes to the Hub inside the cleaned set that it tells of
        ("report.json", "report.safetensors"),
        """from hf_dataopt import RelationReport

report = RelationReport.load({repo})
print(len(report), "rows,", report.is_label_error.sum(), "label errors")
""",
    ),
    "multi_label_report": Kind(
        "report of a neural relation graph, several labels a row",
        "report",
        "",
        ("report.json", "report.safetensors"),
        """from hf_dataopt.relation.multi_label import MultiLabelReport

report = MultiLabelReport.load({repo})
print(report.summary())
""",
    ),
    "condensed_dataset": Kind(
        "condensed data set (IDC)",
        "condensed set",
        "dataset",
        (),
        """from datasets import load_dataset
from hf_dataopt import MultiFormation

condensed = load_dataset({repo}, split="train")
train = condensed.map(MultiFormation.from_dataset(condensed), batched=True)
print(len(condensed), "stored rows,", len(train), "training rows")
""",
    ),
    "cleaned_dataset": Kind(
        "cleaned data set (neural relation graph)",
        "cleaned set",
        "dataset",
        (),
        """from datasets import load_dataset

dataset = load_dataset({repo}, split={split})
print(dataset)
""",
    ),
    "ccm_adapter": Kind(
        "compressed-context-memory adapter (PEFT)",
        "adapter",
        "model",
        ("adapter_config.json", "adapter_model.safetensors"),
        """from hf_dataopt import load_ccm

model, tokenizer, memory = load_ccm({repo}, base={model})
for context in {contexts}:
    memory.append(context)
print(memory.generate({question}, max_new_tokens={new_tokens}, do_sample=False))
""",
    ),
    "head_scores": Kind(
        "KVzip head scores",
        "head scores",
        "model",
        ("head_scores.safetensors",),
        "from hf_dataopt import KVzipCache\nfrom hf_dataopt.kvzip.head_scores import load_head_scores\n"
        + _TRANSFORMERS
        + _MODEL
        + """scores, _ = load_head_scores({repo})
cache = KVzipCache.from_context(model, tokenizer, "Anna lives in Oslo.", keep_ratio=0.6, head_scores=scores)
output = model.generate(**cache.inputs("Where does Anna live?"), max_new_tokens=16)
print(tokenizer.decode(output[0, cache.ids.shape[1] :]))
""",
    ),
    "kvzip_gates": Kind(
        "KVzip gates",
        "gates",
        "model",
        ("gates.safetensors",),
        "from hf_dataopt import KVzipCache, KVzipGates\n"
        + _TRANSFORMERS
        + _MODEL
        + """gates = KVzipGates.from_pretrained({repo})
cache = KVzipCache.from_context(model, tokenizer, "Anna lives in Oslo.", keep_ratio=0.5, gates=gates)
output = model.generate(**cache.inputs("Where does Anna live?"), max_new_tokens=16)
print(tokenizer.decode(output[0, cache.ids.shape[1] :]))
""",
    ),
    "kvzip_cache": Kind(
        "compressed KVzip cache",
        "cache",
        "model",
        ("cache.safetensors",),
        "from hf_dataopt import KVzipCache\n"
        + _TRANSFORMERS
        + _MODEL
        + """cache = KVzipCache.from_pretrained({repo}, model, tokenizer)
output = model.generate(**cache.inputs("What is this about?"), max_new_tokens=32)
print(tokenizer.decode(output[0, cache.ids.shape[1] :]))
""",
    ),
    "context_memory": Kind(
        "compressed context memory",
        "memory",
        "model",
        ("memory.json", "memory.safetensors"),
        _ADAPTED
        + """model = PeftModel.from_pretrained(base, {adapter}).eval()
memory = hf_dataopt.CompressedContextMemory.from_pretrained(model, {repo}, tokenizer)
print(memory.tokens_seen, memory.generate("What do you remember?", max_new_tokens=32))
""",
    ),
    "streaming_memory": Kind(
        "streaming context memory",
        "memory",
        "model",
        ("memory.json", "memory.safetensors"),
        _ADAPTED
        + """model = PeftModel.from_pretrained(base, {adapter}).eval()
stream = hf_dataopt.StreamingContextMemory.from_pretrained(model, {repo}, tokenizer)
print(stream.tokens_seen, stream.feed(tokenizer("And then", add_special_tokens=False)["input_ids"]).shape)
""",
    ),
}


def usage(kind: str, repo: str = PLACEHOLDER, **values: Any) -> str:
    """The code that uses an artifact; values go in as Python literals, which JSON strings, lists and numbers are."""
    literals = {name: json.dumps(value) for name, value in {"repo": repo, **values}.items()}
    return KINDS[kind].usage.format(**literals)
