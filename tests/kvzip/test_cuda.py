"""What only a GPU can tell of KVzip: each kernel against plain attention, and a compressed cache against the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_dataopt import KVzipCache, KVzipConfig
from hf_dataopt._compat import flash_varlen, varlen_kernel
from hf_dataopt.kvzip import kernels, ragged_attention
from hf_dataopt.kvzip.attention import attend, takes_gpu_flash
from hf_dataopt.kvzip.kernels import takes_token
from hf_dataopt.kvzip.proof import prove
from hf_dataopt.kvzip.ragged import RaggedContext
from hf_dataopt.kvzip.ragged_attention import attend_ragged

from ..models import byte_tokenizer, held, tiny_model
from ..reference.kvzip import dense_attention
from .conftest import CONTEXT
from .test_ragged import SCALE, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
if torch.cuda.is_available():
    from hf_dataopt.kvzip.decode_kernel import attend_token

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "rows", "length"), [(4, 4, 1, 700), (6, 2, 33, 1000), (8, 2, 130, 130)])
def test_fused_attention_is_plain_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, rows: int, length: int
) -> None:
    draw = torch.Generator().manual_seed(rows)
    query, key, value = (
        torch.randn(2, count, tokens, 64, generator=draw).to("cuda", dtype)
        for count, tokens in ((heads, rows), (kv_heads, length), (kv_heads, length))
    )
    assert takes_gpu_flash(query, key, value, None)
    causal, below = rows == length, torch.ones(rows, length, dtype=torch.bool).tril()
    output, lse = attend(query, key, value, scale=SCALE, causal=causal)
    wanted, wanted_lse = dense_attention(query.cpu(), key.cpu(), value.cpu(), SCALE, below if causal else None)
    near = 1e-4 if dtype == torch.float32 else 0.03
    assert (output.cpu().double() - wanted).abs().max() < near
    assert (lse.cpu().double() - wanted_lse).abs().max() < near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_token_is_plain_attention(dtype: torch.dtype, softcap: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    keep = torch.rand(4, 3000, generator=draw) < torch.tensor([0.9, 0.0, 0.02, 0.4])[:, None]
    query = torch.randn(1, 12, 1, 64, generator=draw).to("cuda", dtype)
    key, value, room = (torch.randn(1, 4, 3000, 64, generator=draw).to("cuda", dtype) for _ in range(3))
    context, tail = RaggedContext.evict(key, value, keep.cuda()), room[:, :, :77]
    assert takes_token(query, tail, tail, context)
    output, lse = attend_token(query, context, tail, tail, scale=SCALE, softcap=softcap)
    both = (torch.cat([one, tail], 2).cpu() for one in (key, value))
    shown = torch.cat([keep, torch.ones(4, 77, dtype=torch.bool)], 1).repeat_interleave(3, 0)[None, :, None]
    wanted, wanted_lse = capped_attention(query.cpu(), *both, shown, softcap)
    near = 1e-4 if dtype == torch.float32 else 0.03
    assert (output.cpu().double() - wanted).abs().max() < near
    assert (lse.cpu().double() - wanted_lse).abs().max() < near


def capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shown: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dense_attention` with a soft cap on the logits."""
    if softcap is None:
        return dense_attention(query, key, value, SCALE, shown)
    group = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(group, 1).double() for one in (key, value))
    logits = torch.tanh(query.double() @ key.transpose(-1, -2) * SCALE / softcap) * softcap
    logits = logits.masked_fill(~shown, float("-inf"))
    return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1)


def test_a_deep_model_in_half_precision_is_not_refused() -> None:
    model = tiny_model("llama", num_hidden_layers=32, max_position_embeddings=4096).to("cuda", torch.bfloat16)
    assert prove(model).refusal is None


def test_a_compressed_cache_answers_as_on_a_cpu() -> None:
    tokenizer, found = byte_tokenizer(), {}
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", max_position_embeddings=4096).to(device, torch.bfloat16)
        cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.4, progress=False)
        asked = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        found[device] = model.generate(**cache.inputs("Why?"), **asked).logits[0][0].float().cpu()
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
