"""The example page: its two jobs without Gradio, and the page itself where Gradio is installed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ..conftest import REPO
from ..models import byte_tokenizer, tiny_model

TEXT = """The key to the archive is with Greta Lindqvist, who sits on the third floor beside the lift. The spare key is in the \
kitchen, under the lemon tree. The archive is open from nine to four; visitors sign the blue book. The lamp over the door is \
out of order since March, and the caretaker, Pavel Novak, has ordered a new one from Trieste."""


@pytest.fixture(scope="module")
def app() -> Any:
    spec = importlib.util.spec_from_file_location("app", REPO / "examples" / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_of_both_caches_and_what_they_weigh(app: Any) -> None:
    model, tokenizer = tiny_model("llama", seed=2, max_position_embeddings=4096), byte_tokenizer()
    rows, told = app.answers(model, tokenizer, TEXT, "Who?\n\n Where? \n", 0.3)
    assert [row[0] for row in rows] == ["Who?", "Where?"] and all(len(row) == 3 for row in rows)
    assert all(full != small for _, full, small in rows)
    same, whole = app.answers(model, tokenizer, TEXT, "Who?\nWhere?", 1.0)
    assert all(full == small for _, full, small in same) and "(100%)" in whole
    assert [row[1] for row in same] == [row[1] for row in rows]
    assert 30 <= int(told.split("(")[1].split("%")[0]) < 60  # 0.3 of the text, and all of the template
    assert app.answers(model, tokenizer, " ", "Who?", 0.3) == ([], "Give a text and a question.")


def test_wrong_labels_of_a_folder_and_what_speaks_against_them(app: Any, tmp_path: Path) -> None:
    digits = load_digits(n_class=3)
    wrong = {5: 1, 40: 2, 77: 0}  # row: the label it is given
    for row, (image, label) in enumerate(zip(digits.images[:150], digits.target[:150], strict=True)):
        folder = tmp_path / f"digit {wrong.get(row, label)}"
        folder.mkdir(exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).resize((20, 20)).save(folder / f"{row}.png")
    moved = {row for row in wrong if digits.target[row] != wrong[row]}
    pictures, told = app.doubts(str(tmp_path), 6)
    captions = [caption for _, caption in pictures]
    doubted = [caption for caption in captions if caption.startswith("row")]
    assert len(doubted) >= len(moved) and f"{len(doubted)} of 150" in told
    assert captions[1].startswith("against it: digit") and float(captions[1].rsplit(" ", 1)[1]) < 0
    found = {int(Path(image.filename).stem) for image, caption in pictures if caption.startswith("row")}
    assert moved <= found
    assert app.doubts(str(tmp_path / "none"), 3)[1].startswith("There is no folder")


def test_the_page_is_built(app: Any) -> None:
    pytest.importorskip("gradio")
    found = app.page(tiny_model("llama"), byte_tokenizer())
    names = [getattr(block, "label", None) or getattr(block, "value", None) for block in found.blocks.values()]
    assert all(name in names for name in ("Ask", "Examine", "Questions about a text", "Wrong labels in a folder"))


def test_the_page_in_a_browser(app: Any, tmp_path: Path) -> None:
    gradio, playwright = pytest.importorskip("gradio"), pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    built = app.page(tiny_model("llama", seed=2, max_position_embeddings=4096), byte_tokenizer())
    _, address, _ = built.launch(prevent_thread_lock=True, quiet=True)
    try:
        with playwright.sync_playwright() as driver:
            page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
            page.goto(address)
            page.get_by_role("button", name="Ask").click()
            page.wait_for_function("document.body.innerText.includes('are kept of')", timeout=90_000)
            page.get_by_role("tab", name="Wrong labels in a folder").click()
            page.get_by_label("Folder on this machine").fill(str(tmp_path / "none"))
            page.get_by_role("button", name="Examine").click()
            page.wait_for_function("document.body.innerText.includes('There is no folder')", timeout=90_000)
    finally:
        built.close()
        gradio.close_all()
