"""The kernels of one decoded token, in Triton's interpreter: equal to the general way, and taken only where they can be."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dataopt import KVzipCache
from hf_dataopt.kvzip import kernels, layers
from hf_dataopt.kvzip.attention import attend, merge
from hf_dataopt.kvzip.kernels import takes_token
from hf_dataopt.kvzip.ragged_attention import attend_ragged

from ..models import byte_tokenizer, held, tiny_model
from .conftest import CONTEXT
from .test_ragged import SCALE, Case


@pytest.fixture
def interpreted() -> Any:
    """The module with kernels that run on a CPU: see `tests/conftest.py`."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels themselves are tested in test_cuda.py")
    return importlib.import_module("hf_dataopt.kvzip.decode_kernel")


def tail_of(heads: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tail.Tail` gives it: the first tokens of a larger room."""
    keys, values = torch.randn(2, 1, heads, 64, 16, generator=torch.Generator().manual_seed(length)).to(dtype)
    return keys[:, :, :length], values[:, :, :length]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("lengths", [[4, 9, 1], [12], [5, 0, 3], [0, 0], [70, 0, 131, 64], [300, 5000]])
def test_one_token_equals_parts_put_together(
    interpreted: Any, lengths: list[int], softcap: float | None, dtype: torch.dtype
) -> None:
    case = Case(lengths, dtype)
    query, (key, value) = case.query[:1, :, :1], tail_of(len(lengths), 7 if len(lengths) > 1 else 64, dtype)
    options: dict[str, Any] = {"scale": SCALE, "softcap": softcap}
    output, lse = interpreted.attend_token(query, case.context, key, value, **options)
    wide = (one.float() for one in (query, key, value))
    expected, expected_lse = merge(attend_ragged(query, case.context, **options), attend(*wide, **options))
    assert output.dtype == dtype and output.shape == query.shape
    near = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(output.float(), expected.float(), atol=near, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=near, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_decodes_the_same(interpreted: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(family), byte_tokenizer()
    cache = KVzipCache.from_context(model, tokenizer, CONTEXT, keep_ratio=0.4, progress=False)
    found = []
    calls: list[int] = []
    plain = interpreted.attend_token
    monkeypatch.setattr(layers, "attend_token_on_cpu", lambda *_: None)
    monkeypatch.setattr(interpreted, "attend_token", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    for here in (False, True):
        monkeypatch.setattr(kernels, "has_triton", lambda device, here=here: here)
        fork = cache.fork()
        with torch.no_grad():
            model(torch.arange(20, 25)[None], **held(fork))
            found.append([model(torch.tensor([[token]]), **held(fork)).logits for token in (30, 31, 32)])
        ours = sum(isinstance(layer, layers.KVzipLayer) for layer in cache.layers)
        assert len(calls) == (3 * ours if here else 0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


class Operations(TorchDispatchMode):
    """Names of torch's operations, in order, while it is on and `paused` is not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_token_takes_two_kernels_a_layer(interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 KV heads x 4 layers: 8 launches; beside them memory is taken and looked at, nothing else is computed."""
    model = tiny_model("llama", num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=8, head_dim=8)
    cache = KVzipCache.from_context(model, byte_tokenizer(), CONTEXT, keep_ratio=0.3, progress=False)
    monkeypatch.setattr(layers, "attend_token_on_cpu", lambda *_: None)
    monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    seen, launched = Operations(), []

    class Counted:
        """A kernel that is counted where it is launched; its interpreter's own work is not."""

        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(interpreted, name)

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                launched.append(self.name)
                seen.paused = True
                self.kernel[grid](*args, **options)
                seen.paused = False

            return launch

    for name in ("_attend_pieces", "_join_pieces"):
        monkeypatch.setattr(interpreted, name, Counted(name))
    plain = layers.KVzipLayer.attend

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        with seen:
            return plain(*args, **options)

    with torch.no_grad():
        for ids in (torch.arange(20, 25)[None], torch.tensor([[30]])):  # pieces are cut with the first token
            model(ids, **held(cache))
        launched.clear()
        monkeypatch.setattr(layers.KVzipLayer, "attend", watched)
        model(torch.tensor([[31]]), **held(cache))
    assert launched == ["_attend_pieces", "_join_pieces"] * 4
    memory = {"empty", "new_empty", "view", "_unsafe_view", "alias", "detach", "_to_copy", "clone", "_reshape_alias"}
    assert seen.names and set(seen.names) <= memory, sorted(set(seen.names) - memory)


def test_what_the_kernels_cannot_do_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([70, 131])
    query, (key, value) = case.query[:1, :, :1], tail_of(2, 9, torch.float32)
    assert not takes_token(query, key, value, case.context)  # no GPU
    monkeypatch.setattr(kernels, "has_triton", lambda device: True)
    assert takes_token(query, key, value, case.context)
    other: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = [
        (case.query[:1, :, :2], key, value),  # several tokens
        (case.query[:2, :, :1], key, value),  # several requests
        (query.half(), key, value),
        (query.double(), key.double(), value.double()),
        (query, key[:, :, :0], value[:, :, :0]),
        (query, key.transpose(1, 2).contiguous().transpose(1, 2), value),
        (query, key, value[..., :8]),
        (query, key[:, :1], value[:, :1]),  # heads of several contexts
        (query.clone().requires_grad_(), key, value),
    ]
    assert [takes_token(*one, case.context) for one in other] == [False] * len(other)
