"""Every artifact, made from seeds: `push_all` in one process, `load_all` in another; both return the same digests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..condensation.conftest import as_dataset, synthetic_images
from ..kvzip.conftest import CONTEXT
from ..models import byte_tokenizer, tiny_model

BASE = "me/tiny"
QUESTION = "What colour is the key of room 12?"
TURNS = ["My cat is called Otto. ", "He is grey. "]
STREAM = list(range(10, 90))
STORAGES = ("uint8", "float16", "float32")


def digest(*values: Any) -> str:
    """A hash of tensors and arrays, dtype and shape included."""
    found = hashlib.sha256()
    for value in values:
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        found.update(str((array.dtype, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def rows_digest(dataset: Any) -> str:
    """A hash of all columns of a data set, pictures as pixels, with its features."""
    plain = dataset.with_format(None)
    columns = [np.stack([np.asarray(value) for value in plain[:][name]]) for name in plain.column_names]
    return digest(*columns) + str(plain.features)


def adapted(base: Any, memory: str = "concat") -> Any:
    """A CCM adapter with weights that do something."""
    from peft import get_peft_model

    from hf_dataopt import CCMConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base, CCMConfig(num_comp_tokens=2, memory=memory))
        own = torch.Generator().manual_seed(3)
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.data.copy_(torch.randn(weight.shape, generator=own) * 0.3)
    return model.eval()


def condensed_sets() -> dict[str, Any]:
    """One condensed set per storage type."""
    from hf_dataopt import DatasetCondenser, IDCConfig

    train = as_dataset(*synthetic_images(60))
    small = {"images_per_class": 2, "width": 4.0, "depth": 2, "outer_iterations": 0, "network_images": 16}
    return {
        storage: DatasetCondenser(IDCConfig(storage=storage, **small)).condense(train)  # type: ignore[arg-type]
        for storage in STORAGES
    }


def base_model() -> tuple[Any, Any]:
    """The base model as users get it: by its Hub name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(BASE)


def cache_logits(model: Any, cache: Any) -> str:
    """Digest of the logits of a question behind a compressed context."""
    inputs = cache.inputs(QUESTION)
    inputs["input_ids"] = inputs["input_ids"][:, cache.ids.shape[1] :]
    with torch.no_grad():
        return digest(model(**inputs, use_cache=True).logits)


def push_all(folder: Path) -> dict[str, str]:
    """Push one artifact of every kind; returns what they hold."""
    from huggingface_hub import HfApi, metadata_update

    from hf_dataopt import CompressedContextMemory, KVzipCache, KVzipGates, StreamingContextMemory
    from hf_dataopt.ccm.saved import push_adapter
    from hf_dataopt.cli import main
    from hf_dataopt.condensation.saved import push_condensed
    from hf_dataopt.kvzip.gate_fit import GateConfig
    from hf_dataopt.kvzip.head_scores import head_scores, push_head_scores
    from hf_dataopt.publishing.dataset_files import read_parquet

    found: dict[str, str] = {}
    tiny_model("llama", max_position_embeddings=4096).save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    (folder / "tiny" / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n# a base model\n")
    HfApi().create_repo(BASE)
    HfApi().upload_folder(repo_id=BASE, folder_path=folder / "tiny")

    for storage, condensed in condensed_sets().items():
        push_condensed(condensed, f"me/idc-{storage}", private=storage == "float16")
        condensed.push_to_hub(f"me/plain-{storage}")
        found[f"idc-{storage}"] = found[f"plain-{storage}"] = rows_digest(condensed)
        found[f"dtype-{storage}"] = str(condensed.features["image"])

    rng = np.random.default_rng(0)
    table = as_dataset(*synthetic_images(80))
    features = (
        rng.normal(size=(80, 6)).astype(np.float32) + 3 * np.eye(6, dtype=np.float32)[np.asarray(table["label"][:])]
    )
    probs = np.full((80, 3), 0.1, np.float32)
    probs[np.arange(80), np.asarray(table["label"][:])] = 0.8
    table = table.add_column("features", list(features)).add_column("probs", list(probs))  # type: ignore[call-arg]
    table.push_to_hub("me/source")
    metadata_update("me/source", {"license": "odc-by"}, repo_type="dataset")
    out = folder / "cleaned"
    call = ["clean", "me/source", "--output-dir", str(out), "--rows", "3", "--noise-rate", "0.05"]
    assert main([*call, "--push-to-hub", "me/cleaned", "--commit-message", "Four rows less"]) == 0
    found["cleaned"] = rows_digest(read_parquet(out))

    model, tokenizer = base_model()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.4, progress=False)
    cache.push_to_hub("me/cache")
    found["cache"] = digest(model.generate(**cache.inputs(QUESTION), max_new_tokens=8, do_sample=False))
    found["cache-logits"] = cache_logits(model, cache)
    scores = head_scores(model, tokenizer, CONTEXT)
    push_head_scores(scores, "me/heads", model_id=BASE)
    found["heads"] = digest(scores)
    gates = KVzipGates.fit(model, tokenizer, [CONTEXT, QUESTION * 3], GateConfig(steps=2, hidden=4), progress=False)
    gates.push_to_hub("me/gates")
    found["gates"] = digest(*gates.weights.tensors.values())

    adapter = adapted(model)
    push_adapter(adapter, "me/ccm", tokenizer, about={"example": (TURNS, QUESTION)})
    adapter.save_pretrained(str(folder / "plain-ccm"))
    assert main(["push", str(folder / "plain-ccm"), "me/plain-ccm"]) == 0
    memory = CompressedContextMemory(adapter, tokenizer)
    for turn in TURNS:
        memory.append(turn)
    memory.push_to_hub("me/memory", adapter="me/ccm")
    found["memory"] = digest(memory.logits(QUESTION))
    found["adapter"] = digest(*[weight for name, weight in adapter.named_parameters() if ".lora_" in name])
    stream = StreamingContextMemory(adapter, tokenizer, max_kv=40, compress_tokens=16, memory_size=6)
    stream.feed(STREAM)
    stream.push_to_hub("me/stream", adapter="me/ccm")
    found["stream"] = digest(stream.feed(STREAM[:30]))

    (folder / "context.txt").write_text(CONTEXT)
    few = ["--max-new-tokens", "2", "--json"]
    asked = ["kvzip", "--model", BASE, "--context", str(folder / "context.txt"), "--question", QUESTION, *few]
    assert main([*asked, "--push-to-hub", "me/shell-cache", "--private"]) == 0
    talk = ["ccm", "--model", BASE, "--adapter", "me/ccm", "--turn", TURNS[0], "--question", QUESTION, *few]
    assert main([*talk, "--push-to-hub", "me/shell-memory"]) == 0
    small = [
        "--width",
        "4",
        "--depth",
        "2",
        "--outer-iterations",
        "1",
        "--inner-iterations",
        "1",
        "--images-per-class",
        "1",
    ]
    small += [
        "--network-images",
        "16",
        "--evaluation-epochs",
        "1",
        "--seeds",
        "1",
        "--evaluate",
        "--test",
        "me/source-test",
    ]
    as_dataset(*synthetic_images(30, seed=1)).push_to_hub("me/source-test", split="test")
    condense = ["condense", "me/source", "--output-dir", str(folder / "run"), *small, "--json"]
    assert main([*condense, "--push-to-hub", "me/shell-idc"]) == 0
    return found


def load_all() -> dict[str, str]:
    """Load every artifact as a user would; returns what they hold."""
    from datasets import load_dataset
    from peft import PeftModel

    import hf_dataopt
    from hf_dataopt import CompressedContextMemory, KVzipCache, KVzipGates, MultiFormation, StreamingContextMemory
    from hf_dataopt.ccm.saved import load_adapter
    from hf_dataopt.condensation.saved import load_condensed
    from hf_dataopt.kvzip.head_scores import load_head_scores

    found: dict[str, str] = {}
    for storage in STORAGES:
        for name in (f"idc-{storage}", f"plain-{storage}"):
            loaded = load_dataset(f"me/{name}", split="train")
            found[name] = rows_digest(loaded)
            assert len(loaded.map(MultiFormation.from_dataset(loaded), batched=True)) == 4 * len(loaded)
        assert rows_digest(load_condensed(f"me/idc-{storage}")) == found[f"idc-{storage}"]
        found[f"dtype-{storage}"] = str(loaded.features["image"])
    found["cleaned"] = rows_digest(load_dataset("me/cleaned", split="train"))

    model, tokenizer = base_model()
    cache = KVzipCache.from_pretrained("me/cache", model, tokenizer)
    found["cache"] = digest(model.generate(**cache.inputs(QUESTION), max_new_tokens=8, do_sample=False))
    found["cache-logits"] = cache_logits(model, cache)
    scores, model_id = load_head_scores("me/heads")
    assert model_id == BASE
    found["heads"] = digest(scores)
    gates = KVzipGates.from_pretrained("me/gates")
    gates.check(model)
    found["gates"] = digest(*gates.weights.tensors.values())
    adapter = PeftModel.from_pretrained(model, "me/ccm").eval()
    found["adapter"] = digest(*[weight for name, weight in adapter.named_parameters() if ".lora_" in name])
    memory = CompressedContextMemory.from_pretrained(adapter, "me/memory", tokenizer)
    found["memory"] = digest(memory.logits(QUESTION))
    stream = StreamingContextMemory.from_pretrained(adapter, "me/stream")
    found["stream"] = digest(stream.feed(STREAM[:30]))
    again, _ = base_model()
    other = load_adapter(again, "me/plain-ccm")
    assert found["adapter"] == digest(*[weight for name, weight in other.named_parameters() if ".lora_" in name])
    names = ("model", "tokenizer", "memory")
    three = hf_dataopt.load_ccm("me/ccm")
    assert three._fields == names and three.memory.model is three.model and three.memory.tokenizer is three.tokenizer
    assert found["adapter"] == digest(*[weight for name, weight in three.model.named_parameters() if ".lora_" in name])
    return found


def run_cards(names: list[str]) -> dict[str, str]:
    """What the first code block of each repository's card prints, as written."""
    import contextlib
    import io

    from huggingface_hub import hf_hub_download

    from hf_dataopt.publishing.cards import first_block

    found = {}
    for name in names:
        kind = "dataset" if "idc" in name or name == "me/cleaned" else "model"
        text = Path(hf_hub_download(name, "README.md", repo_type=kind)).read_text(encoding="utf-8")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(first_block(text), name, "exec"), {})
        found[name] = said.getvalue()
    return found


def infos(names: list[str]) -> dict[str, Any]:
    """`describe` of every repository, and how many bytes that took."""
    import os

    from hf_dataopt.publishing.info import describe

    found = {name: describe(name) for name in names}
    blobs = list(Path(os.environ["HF_HOME"]).rglob("blobs/*"))
    return found | {"bytes": sum(path.stat().st_size for path in blobs)}
