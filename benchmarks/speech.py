"""Spoken command words for Table 6.4: the eight words of Mini Speech Commands, said by espeak-ng, so synthetic.

A clip is one second at 16 kHz, as there: a word of one of 52 speakers (a voice of espeak-ng) with one of seven English accents,
at a pitch, a speed and a place of its own, in white noise 5 to 25 dB below it. Every fourth speaker is heard in the test
set alone. Clips become log-spectrograms as in the reference code (a transform of 255 samples every 128, magnitudes,
64 x 64 by bilinear interpolation, log(x + 1e-3), mean and deviation of the training set).
"""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from torch import Tensor

WORDS = ["down", "go", "left", "no", "right", "stop", "up", "yes"]
ACCENTS = ["en-us", "en-gb", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"]
SPEAKERS = [
    "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "adam", "Alex", "Alicia", "Andrea",
    "Andy", "Annie", "antonio", "belinda", "benjamin", "boris", "caleb", "david", "edward", "Gene", "gustave",
    "Henrique", "Hugo", "Jacky", "john", "Lee", "linda", "marcelo", "Marco", "Mario", "max", "Michael", "miguel",
    "Mike", "pablo", "paul", "pedro", "quincy", "rob", "robert", "steph", "travis", "victor", "zac", "norbert",
]  # fmt: skip
RATE = 16_000


def speech(clips: int, side: int) -> tuple[Dataset, Dataset]:
    """Training and test spectrograms (1, side, side), classes and speakers evenly drawn.

    Args:
        clips: of both sets together; a quarter is for testing.
        side: in pixels; averages of the 64 x 64 ones.
    """
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError("espeak-ng is missing: apt-get install espeak-ng")
    draws = np.random.default_rng(0)
    speakers, labels = np.arange(clips) // len(WORDS) % len(SPEAKERS), np.arange(clips) % len(WORDS)
    spectra = np.stack(
        [spectrogram(clip(WORDS[word], SPEAKERS[who], draws), side) for who, word in zip(speakers, labels, strict=True)]
    )
    test = speakers % 4 == 0
    spectra = (spectra - spectra[~test].mean()) / spectra[~test].std()
    found = [
        Dataset.from_dict({"image": spectra[rows], "label": labels[rows]}).cast_column("label", ClassLabel(names=WORDS))
        for rows in (~test, test)
    ]
    return found[0], found[1]


def clip(word: str, speaker: str, draws: np.random.Generator) -> Tensor:
    """A second of sound (RATE,)."""
    accent, pitch, speed = ACCENTS[draws.integers(len(ACCENTS))], draws.integers(20, 80), draws.integers(130, 220)
    call = ["espeak-ng", "-v", f"{accent}+{speaker}", "-p", str(pitch), "-s", str(speed), "--stdout", word]
    raw = subprocess.run(call, capture_output=True, check=True).stdout
    rate = int(np.frombuffer(raw[24:28], "<u4")[0])
    said = torch.from_numpy(np.frombuffer(raw[44:], "<i2").astype(np.float32) / 2**15)
    said = said[: int(said.abs().gt(0.01).nonzero().max()) + 1]  # without the silence behind it
    said = F.interpolate(said[None, None], size=round(len(said) * RATE / rate), mode="linear")[0, 0][:RATE]
    start = int(draws.integers(RATE - len(said) + 1))
    whole = F.pad(said, (start, RATE - len(said) - start))
    noise = torch.from_numpy(draws.standard_normal(RATE, np.float32))
    return whole + noise * said.square().mean().sqrt() * 10 ** (-draws.uniform(5, 25) / 20)


def spectrogram(sound: Tensor, side: int) -> np.ndarray:
    """Log-spectrogram (1, side, side)."""
    found = torch.stft(sound, 255, 128, window=torch.hann_window(255), return_complex=True).abs()
    whole = F.interpolate(found[None, None], size=(64, 64), mode="bilinear")
    return torch.log(F.adaptive_avg_pool2d(whole, side)[0] + 1e-3).numpy()
