"""Compressed context memory: memories, streams, the collator, adapters."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from hf_dataopt import CCMConfig, CompressedContextMemory, DataCollatorForCCM, StreamingContextMemory
from hf_dataopt.ccm.distillation import distillation_loss
from hf_dataopt.ccm.saved import load_ccm, push_adapter, save_adapter
from hf_dataopt.errors import HubError, UnsupportedModelError

from ..ccm.models import adapted, sample
from ..models import tiny_model
from .configs import SYSTEM, TEMPLATE
from .kvzip import FOLDER, HUB, LICENCE, LOAD, TALK, tokenizer
from .pool import ANY, FLAG, NONE, UNCALLED, WORDS, Argument, Case, Kind, count, instance, number, saved


@lru_cache(maxsize=1)
def model() -> Any:
    return adapted(layers=1)


@lru_cache(maxsize=1)
def _memory() -> CompressedContextMemory:
    memory = CompressedContextMemory(model(), tokenizer())
    memory.append("Anna lives in Oslo.")
    return memory


@lru_cache(maxsize=1)
def _stream() -> StreamingContextMemory:
    return StreamingContextMemory(model(), tokenizer(), max_kv=24, compress_tokens=8)


def _of(**arguments: Argument) -> dict[str, Argument]:
    return arguments


def _said(value: Any) -> bool | None:
    return None if isinstance(value, str | list | tuple | dict | torch.Tensor) else False


IDS = [*(lambda v=v: v for v in ([-1], [10**6], [2.0], [True], [[3], [4]], [None])), lambda: torch.ones(2, 2).long()]
CHAT = _of(
    template_kwargs=Argument(lambda: None, TEMPLATE),
    system=Argument(lambda: None, SYSTEM),
    special_tokens_in_text=Argument(lambda: False, FLAG),
)
MODEL, OPTIONAL = Argument(model, UNCALLED), Argument(tokenizer, NONE | UNCALLED)
TURN = Argument(lambda: "Her cat is Tom.", Kind(_said, [*TALK, *IDS]))
ADAPTER = Argument(lambda: None, NONE | WORDS)


def _changed(name: str, value: Any) -> list[dict[str, Any]]:
    return [{**sample(), name: value}]


SAMPLES = Kind(
    lambda value: None if isinstance(value, list | tuple) else False,
    [
        *(
            lambda n=n, v=v: _changed(n, v)
            for n in ("contexts", "input", "output", "messages", "texts", "examples")
            for v in (3, "a", [3.5], [-1], [10**9], [None], {}, [{}], torch.ones(2), object(), [True])
        ),
        lambda: [{}],
        lambda: [3],
        lambda: [{"texts": ["a"]}],
        lambda: [{"output": None}],
    ],
)


def _loaded(kind: Any, made: Any, **arguments: Any) -> Any:
    saved(kind.__name__, made.save_pretrained)
    return kind.from_pretrained(**arguments)


def cases() -> dict[str, Case]:
    """All of the room."""
    sizes = _of(
        max_kv=Argument(lambda: 24, NONE | count(1)),
        compress_tokens=Argument(lambda: 8, NONE | count(2)),
        memory_size=Argument(lambda: 8, NONE | count(2)),
        sink=Argument(lambda: 1, NONE | count(0)),
        compress=Argument(lambda: True, FLAG),
    )
    for name in ("max_kv", "compress_tokens", "memory_size", "sink"):
        kind = sizes[name].kind  # whether they fit together is another question
        sizes[name].kind = Kind(lambda value, kind=kind: None if kind.takes(value) else False, kind.bad)
    save = _of(folder=FOLDER, adapter=ADAPTER, license=LICENCE)
    load = {"model": MODEL, "source": FOLDER, "tokenizer": OPTIONAL, **LOAD}
    hub = {**HUB, "adapter": ADAPTER, "license": LICENCE}
    config = model().peft_config["default"]
    about = Argument(lambda: None, NONE | instance(dict))
    users = Kind(
        lambda v: None if isinstance(v, list | tuple) or getattr(v, "ndim", 0) == 1 else False,
        [lambda: [1], lambda: [0.0], lambda: [True]],
    )
    found = {
        "CompressedContextMemory": Case(
            CompressedContextMemory,
            {
                "model": MODEL,
                "tokenizer": OPTIONAL,
                "batch_size": Argument(lambda: 1, count(1, 2**16)),
                "max_slots": Argument(lambda: 4, NONE | count(config.num_comp_tokens, 2**16)),
                **CHAT,
            },
        ),
        "CompressedContextMemory.append": Case(lambda context: _memory().fork().append(context), _of(context=TURN)),
        "CompressedContextMemory.inputs": Case(lambda question: _memory().inputs(question), _of(question=TURN)),
        "CompressedContextMemory.logits": Case(lambda question: _memory().logits(question), _of(question=TURN)),
        "CompressedContextMemory.generate": Case(
            lambda question: _memory().generate(question, max_new_tokens=1), _of(question=TURN)
        ),
        "CompressedContextMemory.reset": Case(
            lambda users: _memory().fork().reset(users), _of(users=Argument(lambda: [0], NONE | users))
        ),
        "CompressedContextMemory.save_pretrained": Case(lambda **a: _memory().save_pretrained(**a), save),
        "CompressedContextMemory.from_pretrained": Case(
            lambda **a: _loaded(CompressedContextMemory, _memory(), **a), load, (HubError,)
        ),
        "CompressedContextMemory.push_to_hub": Case(lambda **a: _memory().push_to_hub(**a), hub, (HubError,)),
        "StreamingContextMemory": Case(
            StreamingContextMemory, {"model": MODEL, "tokenizer": OPTIONAL, **sizes, **CHAT}, (UnsupportedModelError,)
        ),
        "StreamingContextMemory.feed": Case(
            lambda ids: _stream().feed(ids), _of(ids=Argument(lambda: [5, 6], TURN.kind | ANY))
        ),
        "StreamingContextMemory.perplexity": Case(lambda text: _stream().perplexity(text), _of(text=TURN)),
        "StreamingContextMemory.save_pretrained": Case(lambda **a: _stream().save_pretrained(**a), save),
        "StreamingContextMemory.from_pretrained": Case(
            lambda **a: _loaded(StreamingContextMemory, _stream(), **a), load, (HubError,)
        ),
        "StreamingContextMemory.push_to_hub": Case(lambda **a: _stream().push_to_hub(**a), hub, (HubError,)),
        "DataCollatorForCCM": Case(
            DataCollatorForCCM,
            {
                "tokenizer": OPTIONAL,
                "config": Argument(lambda: config, instance(CCMConfig, near=[CCMConfig])),
                "max_length": Argument(lambda: 64, count(2)),
                "pack": Argument(lambda: False, FLAG),
                "completion_only_loss": Argument(lambda: True, FLAG),
                "layout": Argument(lambda: "turns", WORDS),
                **CHAT,
            },
        ),
        "DataCollatorForCCM.__call__": Case(
            DataCollatorForCCM(tokenizer(), config), _of(features=Argument(lambda: [sample()], SAMPLES))
        ),
        "distillation_loss": Case(
            distillation_loss,
            {
                "model": MODEL,
                "batch": Argument(lambda: DataCollatorForCCM(tokenizer(), config)([sample()]), UNCALLED),
                "share": Argument(lambda: 1.0, number(0, 1)),
                "temperature": Argument(lambda: 1.0, number(0, 1e3, above=True)),
            },
        ),
        "save_adapter": Case(
            save_adapter,
            _of(
                model=MODEL,
                folder=FOLDER,
                tokenizer=OPTIONAL,
                example=Argument(lambda: None, NONE | Kind(lambda v: None if isinstance(v, tuple | list) else False)),
                results=Argument(tuple, Kind(lambda v: None if hasattr(v, "__len__") else False)),
                license=LICENCE,
                name=ADAPTER,
            ),
        ),
        "load_ccm": Case(
            lambda **a: (saved("ccm", lambda folder: save_adapter(model(), folder)), load_ccm(**a))[1],
            {
                "source": FOLDER,
                "base": Argument(lambda: tiny_model("llama", num_hidden_layers=1), UNCALLED),
                "tokenizer": OPTIONAL,
                "dtype": Argument(lambda: None, NONE | WORDS | instance(torch.dtype)),
                "device": Argument(lambda: None, NONE | WORDS | instance(torch.device)),
                **LOAD,
            },
            (HubError,),
        ),
        "push_adapter": Case(push_adapter, {"model": MODEL, "tokenizer": OPTIONAL, "about": about, **HUB}, (HubError,)),
    }
    return found
