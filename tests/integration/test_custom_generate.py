"""KVzip through transformers' custom generation: from a folder and from a Hub, in a process that knows nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..conftest import REPO
from ..hub.conftest import python
from ..hub_server import HubServer

FOLDER = REPO / "examples" / "custom_generate_kvzip"

START = f"""
import json, sys
sys.path.insert(0, {str(REPO)!r})
from huggingface_hub import HfApi
from hf_dataopt import KVzipCache
from tests.models import byte_tokenizer, tiny_model
model, tokenizer = tiny_model("llama", num_hidden_layers=2), byte_tokenizer()
text, question = "The key of room 12 is blue. Its lock is red.", "Which key is blue?"
asked = {{"tokenizer": tokenizer, "question": question, "max_new_tokens": 6, "do_sample": False}}

def refused(call):
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
"""


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_custom_generation(source: str, tmp_path: Path) -> None:
    code = START + (
        f"source = {str(FOLDER)!r}\n"
        if source == "folder"
        else f"""
api, source = HfApi(), "me/kvzip"
api.create_repo(source)
api.upload_folder(repo_id=source, folder_path={str(FOLDER)!r})
"""
    )
    code += """
own = {"custom_generate": source, "trust_remote_code": True}
cache = KVzipCache.from_context(model, tokenizer, text, keep_ratio=0.5, progress=False)
expected = model.generate(**cache.inputs(question), max_new_tokens=6, do_sample=False)
compressed = model.generate(**own, **asked, context=text, keep_ratio=0.5)
again = model.generate(**own, **asked, context=cache)
batch = model.generate(**own, **{**asked, "question": [question, "Who?"]}, context=cache)
print(json.dumps({
    "same": bool((compressed == expected).all()) and bool((again == expected).all()),
    "batch": list(batch.shape),
    "length": expected.shape[1],
    "untrusted": refused(lambda: model.generate(custom_generate=source, trust_remote_code=False, **asked, context=text)),
    "nothing": refused(lambda: model.generate(**own, **asked)),
    "ids": refused(lambda: model.generate(expected, **own, **asked, context=text)),
    "late": refused(lambda: model.generate(**own, **asked, context=cache, keep_ratio=0.5)),
}))
"""
    with HubServer() as hub:
        found = python(code, hub, tmp_path)
    assert found["same"]
    assert found["batch"] == [2, found["length"]]
    assert "trust_remote_code" in found["untrusted"]
    assert "context=" in found["nothing"]
    assert "input_ids" in found["ids"]
    assert "compressed already" in found["late"]


def test_folder_follows_the_layout() -> None:
    """transformers looks for `custom_generate/generate.py` and its requirements; the Hub lists what has the tag."""
    names = {
        str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }
    assert names == {"README.md", "custom_generate/generate.py", "custom_generate/requirements.txt"}
    assert "- custom_generate\n" in (FOLDER / "README.md").read_text(encoding="utf-8").split("---")[1]
