"""Nothing grows with the number of batches, contexts, appends and fits: live tensors, objects and resident memory.

A slope is fitted over the second half of the rounds; tensors must not grow at all, memory by less than the noise of the
allocator. `HF_DATAOPT_FAULTS=20` is the full size: 500 batches, 100 contexts, 200 appends, 50 fits; the default is a tenth.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_dataopt import CompressedContextMemory, KVzipCache, RelationCleaner
from hf_dataopt.condensation.condenser import DatasetCondenser
from hf_dataopt.mixup.co_mixup import co_mixup
from hf_dataopt.mixup.co_mixup_config import CoMixupConfig
from hf_dataopt.mixup.puzzle_mix import puzzle_mix

from ..condensation.conftest import as_dataset, synthetic_images
from ..counts import FAULTS, FULL, tell
from ..hub.everything import TURNS, adapted
from ..kvzip.conftest import CONTEXT
from ..models import byte_tokenizer, tiny_model
from ..relation.data import make
from .test_checkpoints import TINY

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads resident memory from /proc")
PAGE = os.sysconf("SC_PAGE_SIZE")


def mixing() -> Callable[[], object]:
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    targets, maps = torch.nn.functional.one_hot(labels, 4).float(), torch.rand(8, 16, 16)
    config, own = CoMixupConfig.cifar100(), torch.Generator().manual_seed(0)
    return lambda: (puzzle_mix(images, targets, maps, generator=own), co_mixup(images, targets, maps, config, own))


def contexts() -> Callable[[], object]:
    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    return lambda: KVzipCache.from_context(model, tokenizer, CONTEXT, 0.3, progress=False)


def appends() -> Callable[[], object]:
    """To a merged memory: a concatenated one grows on purpose."""
    memory = CompressedContextMemory(adapted(tiny_model("llama"), memory="merge"), byte_tokenizer())
    return lambda: memory.append(TURNS[0])


def fits() -> Callable[[], object]:
    data = make(n=150, d=8).dataset()
    return lambda: RelationCleaner().fit(data, quiet=True)


def condensations() -> Callable[[], object]:
    data = as_dataset(*synthetic_images(30))
    return lambda: DatasetCondenser(TINY).condense(data)


ROUNDS = {mixing: 500, contexts: 100, appends: 200, fits: 50, condensations: 50}


def measured() -> tuple[float, float, float]:
    """Live tensors, objects, and megabytes of resident memory."""
    gc.collect()
    found = gc.get_objects()
    tensors = sum(issubclass(type(one), torch.Tensor) for one in found)
    return tensors, len(found), int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


@pytest.mark.parametrize("name", ROUNDS, ids=lambda made: made.__name__)
def test_nothing_grows(name: Callable[[], Callable[[], object]]) -> None:
    rounds, step = max(5, ROUNDS[name] * FAULTS // 20), name()
    for _ in range(3):  # what is made once
        step()
    taken = [measured()]
    for _ in range(10):
        for _ in range(max(1, rounds // 10)):
            step()
        taken.append(measured())
    done = np.arange(11) * max(1, rounds // 10)
    tensors, objects, megabytes = (float(np.polyfit(done[3:], [one[k] for one in taken[3:]], 1)[0]) for k in range(3))
    kilobytes = 1000 * megabytes
    found = {"tensors": tensors, "objects": objects, "kB": kilobytes}
    per_round = {f"{what} a round": round(slope, 3) for what, slope in found.items()}
    tell("leaks", name.__name__, {"rounds": int(done[-1]), **per_round})
    assert abs(tensors) < 0.05 and objects < 1
    # a hundredth of what a round handles at full size; pages come in lumps, which few rounds do not even out
    assert kilobytes < (20 if FAULTS >= FULL else 400)
