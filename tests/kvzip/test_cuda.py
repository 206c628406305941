"""What only a GPU can tell of KVzip: each kernel against plain attention, and a compressed cache against the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt._compat import flash_varlen, varlen_kernel
from hf_dataopt.kvzip import kernels, ragged_attention
from hf_dataopt.kvzip.ragged import RaggedContext
from hf_dataopt.kvzip.ragged_attention import attend_ragged

from ..models import byte_tokenizer, held, tiny_model
from .conftest import CONTEXT
from .test_ragged import SCALE, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

KERNELS: dict[str, tuple[Any, Callable[[], object | None]]] = {
    "flash-attn": (kernels._flash, flash_varlen),
    "torch": (kernels._torch, varlen_kernel),
    "flex": (kernels._flex, lambda: True),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("lengths", [[1, 700, 64, 5000], [0, 33, 0, 1]])
def test_kernels_are_plain_attention(name: str, rows: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, found = KERNELS[name]
    if found() is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(ragged_attention, "kernel_for", lambda *_: kernel)
    case = Case(lengths)
    wanted, wanted_lse = case.dense(rows)
    key, value, query = (one.to("cuda", torch.bfloat16) for one in (case.key, case.value, case.query[:, :, :rows]))
    output, lse = attend_ragged(query, RaggedContext.evict(key, value, case.keep.cuda()), scale=SCALE)
    seen = torch.tensor(lengths).repeat_interleave(2) > 0
    assert (output.cpu() - wanted)[:, seen].abs().max() < 0.03
    assert (lse.cpu() - wanted_lse)[:, seen].abs().max() < 0.05
    assert (output[:, ~seen.cuda()] == 0).all()


def test_a_compressed_cache_answers_as_on_a_cpu() -> None:
    tokenizer, found = byte_tokenizer(), {}
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", max_position_embeddings=4096).to(device, torch.bfloat16)
        cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.4, progress=False)
        with torch.no_grad():
            inputs = {key: one.to(device) if hasattr(one, "to") else one for key, one in cache.inputs("Why?").items()}
            found[device] = model(**inputs).logits[0, -1].float().cpu()
    assert (found["cpu"] - found["cuda"]).abs().max() < 0.1 * found["cpu"].abs().max()


@pytest.mark.parametrize("storage", ["model", "int8", "int4"])
def test_from_a_gpu_to_the_host_and_back(storage: Any) -> None:
    model, tokenizer = tiny_model("gemma3").to("cuda", torch.bfloat16), byte_tokenizer()
    config = KVzipConfig(keep_ratio=0.5, storage=storage)
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, config=config, progress=False)
    expected = model.generate(**cache.inputs("Which?"), max_new_tokens=6, do_sample=False)
    away = cache.moved_to("cpu")
    assert {one.device.type for layer in away.layers for one in vars(layer).values() if hasattr(one, "device")} == {
        "cpu"
    }
    assert away.nbytes == cache.nbytes
    del cache
    with pytest.raises(ValueError, match=r"cache\.moved_to\(model\)"):
        model(torch.arange(20, 29, device="cuda")[None], **held(away.fork()))
    found = model.generate(**away.moved_to(model).inputs("Which?"), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
