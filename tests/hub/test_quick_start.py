"""On a local Hub: what README and docs upload, as printed, and a stranger who trains on it without this package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ..hub_server import HubServer
from ..pages import README, needs_hub, scripts
from .conftest import python

PUSHING = {name: script for name, script in scripts().items() if needs_hub(script)}
PUSH = f"""
import json
from datasets import load_dataset
from hf_dataopt import DatasetCondenser, IDCConfig
from hf_dataopt.condensation.saved import push_condensed
from hf_dataopt.text import demo_model
from tests import pages
from tests.condensation.conftest import as_dataset, synthetic_images
demo_model.load_demo_model = pages.small_demo_model
made = {{name: pages.run(name, script) for name, script in {PUSHING!r}.items()}}
readme = next(names for name, names in made.items() if name.startswith({README!r}))
loaded, scores = load_dataset("me/digits-10", split="train"), readme["scores"]
found = [len(loaded), len(readme["formed"]), scores["condensed"][0].mean, scores["random"][0].mean, list(made)]

train, test = as_dataset(*synthetic_images(150)), as_dataset(*synthetic_images(60, seed=1))
small = dict(images_per_class=6, width=8, depth=2, teacher_images=4000, network_learning_rate=0.05)
for name, options in (("plain", {{}}), ("soft", {{"soft_labels": True}})):
    condenser = DatasetCondenser(IDCConfig(**small, **options), method="mosaic")
    push_condensed(condenser.condense(train), f"me/{{name}}", about={{"config": condenser.config}})
test.push_to_hub("me/test", split="test")
print(json.dumps(found))
"""
TRAIN = r"""
import json, re, sys
for name in ("hf_dataopt", "tests"):
    sys.modules[name] = None  # whoever imports it fails
from datasets import load_dataset
from huggingface_hub import hf_hub_download
import numpy as np, torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

torch.set_num_threads(1)
args = TrainingArguments("out", max_steps=100, per_device_train_batch_size=16, learning_rate=3e-3, report_to=[], use_cpu=True,
    remove_unused_columns=False, save_strategy="no", logging_strategy="no", disable_tqdm=True, label_names=["labels"])
config = ResNetConfig(num_channels=1, num_labels=3, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")

def pixels(rows):
    values = np.stack([np.asarray(one, np.float32)[None] / 255 - 0.5 for one in rows["image"]])
    return {"pixel_values": torch.from_numpy(values), "labels": torch.tensor(rows["label"])}

test = pixels(load_dataset("me/test", split="test")[:])
found = {}
for name in ("plain", "soft"):
    card = open(hf_hub_download(f"me/{name}", "README.md", repo_type="dataset")).read()
    code = re.findall(r"```python\n(.*?)```", card.split("### Without")[1], re.DOTALL)[0]
    names = {}
    exec(compile(code, "card", "exec"), names)
    train = names["train"]
    torch.manual_seed(0)
    model = ResNetForImageClassification(config)
    rows = train.with_transform(pixels)
    Trainer(model=model, args=args, train_dataset=rows, compute_loss_func=names.get("loss")).train()
    with torch.no_grad():
        right = (model.eval()(test["pixel_values"]).logits.argmax(1) == test["labels"]).float().mean()
    found[name] = [len(names["stored"]), len(train), train[0]["label"], float(right), card]
loaded = [name for name in sys.modules if name.startswith("hf_dataopt") and sys.modules[name] is not None]
print(json.dumps([found, loaded]))
"""


@dataclass(frozen=True)
class Pushed:
    """The Hub, and what the quick start had found when it had pushed to it."""

    hub: HubServer
    found: list[Any]


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pushed]:
    with HubServer() as hub:
        yield Pushed(hub, python(PUSH, hub, tmp_path_factory.mktemp("writer")))


def test_the_pages_push_as_printed(pushed: Pushed) -> None:
    stored, formed, accuracy, random, pages = pushed.found
    assert (stored, formed) == (100, 400) and accuracy > 30 and random > 0  # after two epochs
    card = pushed.hub.files("dataset", "me/digits-10")["README.md"].decode()
    assert "me/digits-10" in card and f"| {round(accuracy, 2)} |" in card
    assert {"docs/methods/condensation.md", "docs/guides/publishing.md"} < set(pages) == set(PUSHING)
    assert pushed.hub.files("dataset", "me/ten-digits")["preview.png"]  # a notebook's
    assert "kvzip_cache" in pushed.hub.files("model", "me/office-cache")["hf_dataopt.json"].decode()


def test_a_stranger_trains_a_stock_trainer_without_the_package(
    pushed: Pushed, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found, loaded = python(TRAIN, pushed.hub, tmp_path_factory.mktemp("reader"))
    assert loaded == []
    for name, (stored, formed, label, right, card) in found.items():
        assert (stored, formed) == (18, 72) and right > 0.8, name
        if name == "soft":
            assert len(label) == 3 and abs(sum(label) - 1) < 2e-2 and max(label) < 1
            assert "ConvNet trained on 4,000 images of the training data, seed 0" in card
            assert f"float16, {72 * 3 * 2} bytes in all" in card
        else:
            assert isinstance(label, int) and "soft_label" not in card.split("## Settings")[0]
