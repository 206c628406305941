"""What a GPU does is what the CPU does: losses, gradients, memories and streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_dataopt import CompressedContextMemory, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt.ccm.distillation import distillation_loss

from ..models import byte_tokenizer
from .models import adapted, sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

STREAM = {"max_kv": 20, "compress_tokens": 8, "memory_size": 6}
TEXT = torch.randint(4, 260, (2, 61), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor], share: float) -> list[torch.Tensor]:
    loss = distillation_loss(model, {name: one.to(model.device) for name, one in batch.items()}, share=share)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return [one.cpu() for one in (loss.detach(), *torch.autograd.grad(loss, weights))]


@pytest.mark.parametrize("memory", ["concat", "merge", "stream"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_training(memory: str, share: float) -> None:
    settings: dict[str, Any] = {"stream": STREAM} if memory == "stream" else {"memory": memory, "sink": True}
    here, there = adapted(**settings), adapted(**settings).to("cuda")
    if memory == "stream":
        collate = DataCollatorForCCM(byte_tokenizer(), here.peft_config["default"], layout="stream")
        batch = collate([{"input_ids": TEXT[0].tolist()}, {"input_ids": TEXT[1, :40].tolist()}])
    else:
        collate = DataCollatorForCCM(None, here.peft_config["default"], completion_only_loss=False)
        batch = collate([sample(), sample((5, 6), seed=4)])
    for mine, theirs in zip(
        loss_and_gradients(there, batch, share), loss_and_gradients(here, batch, share), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("memory", ["concat", "merge"])
def test_memory(memory: str) -> None:
    logits = []
    for device in ("cpu", "cuda"):
        held = CompressedContextMemory(adapted(memory=memory, sink=True).to(device))
        for context in sample()["contexts"]:
            held.append(context)
        logits.append(held.logits([70, 71, 72]).detach().cpu())
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compress", [True, False])
def test_stream(dtype: torch.dtype, compress: bool) -> None:
    logits = []
    for device in ("cpu", "cuda"):
        stream = StreamingContextMemory(adapted(stream=STREAM).to(device, dtype), compress=compress)
        logits.append(stream.feed(TEXT[0].to(device)).float().cpu())
    if dtype == torch.float32:
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    else:
        assert float((logits[1] - logits[0]).abs().mean()) < 0.05 * float(logits[0].abs().mean())
