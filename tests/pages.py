"""The pages of README and docs/, the notebooks, and what stands in for a real model and for minutes of training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft import get_peft_model

from hf_dataopt import CCMConfig
from hf_dataopt.ccm.saved import save_adapter

from .conftest import REPO
from .models import byte_tokenizer, tiny_model

README = "README.md"
DOCS = sorted(path.relative_to(REPO).as_posix() for path in (REPO / "docs").rglob("*.md"))
NOTEBOOKS = sorted(path.relative_to(REPO).as_posix() for path in (REPO / "examples" / "notebooks").glob("*.ipynb"))
# what CI runs instead of minutes
SMALLER = {
    "max_new_tokens=64": "max_new_tokens=3",
    "max_new_tokens=32": "max_new_tokens=3",
    "num_train_epochs=5": "max_steps=2",
    "max_steps=200": "max_steps=2",
    "max_iter=1000": "max_iter=10",
    "rows[:256], batch_size=64": "rows[:32], batch_size=16",
    "evaluation_epochs=100": "evaluation_epochs=2",
    "evaluation_epochs=30": "evaluation_epochs=2",
    "outer_iterations=8, inner_iterations=20": "outer_iterations=1, inner_iterations=2",
}


def text_of(page: str) -> str:
    """A page as it is written."""
    return (REPO / page).read_text(encoding="utf-8")


# the functions of the map of equations
MAPPED = re.findall(r"\| `(hf_dataopt\.[\w.]+)` \|", text_of("docs/equations.md"))


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def cells(notebook: str, kind: str = "code") -> list[dict[str, Any]]:
    """The cells of a notebook, of one kind."""
    return [cell for cell in json.loads(text_of(notebook))["cells"] if cell["cell_type"] == kind]


def code_of(notebook: str) -> str:
    """The code of a notebook, without what only Jupyter understands."""
    lines = "\n".join("".join(cell["source"]) for cell in cells(notebook)).splitlines()
    return "\n".join(line for line in lines if not line.startswith("%"))


def needs_hub(block: str) -> bool:
    """Whether a block uploads something."""
    return "push_" in block


def scripts() -> dict[str, str]:
    """What runs in one go: each block of README by itself, the blocks of a page of docs/ from top to bottom, a notebook."""
    found = {f"{README}, block {number}": block for number, block in enumerate(blocks(README), 1)}
    found |= {page: "\n".join(blocks(page)) for page in DOCS if blocks(page)}
    return found | {notebook: code_of(notebook) for notebook in NOTEBOOKS}


def run(name: str, script: str) -> dict[str, Any]:
    """Run one of them in the current folder, smaller; its names afterwards."""
    for written, smaller in SMALLER.items():
        script = script.replace(written, smaller)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(script, name, "exec"), names)
    return names


def small_demo_model(*_: Any, **__: Any) -> tuple[Any, Any]:
    """In the place of `load_demo_model`: a random Llama and a tokenizer of one token a byte."""
    return tiny_model("llama", max_position_embeddings=4096), byte_tokenizer()


def small_adapter(folder: Path) -> Path:
    """In the place of `examples/adapters/facts`: an untrained adapter of the small model."""
    base, _ = small_demo_model()
    return save_adapter(get_peft_model(base, CCMConfig(r=2, num_comp_tokens=4)), folder)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub and the site write them in links."""
    plain = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
