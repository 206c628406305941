"""Memories as artifacts: what is written beside the tensors, and what is checked before they are used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from safetensors.torch import save_file
from torch import Tensor

from .._compat import causal_model_of, input_device, layer_device
from ..progress import told
from ..publishing.artifacts import fetch, push_saved
from ..publishing.identity import check_identity
from ..publishing.kinds import ADAPTER, MODEL
from ..publishing.names import hub_name
from ..publishing.record import FORMAT, MINOR, check_version
from ..publishing.safe_files import MAX_VALUE, check_finite, read_json, read_tensors
from ..publishing.writer import finish, replacing
from ..settings import check_text, optional
from ..text.chat import ChatFormat
from .active import ccm_config, written_by
from .slots import Layers, check_max_slots

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ..publishing.hub import PushOptions

Shapes = Sequence[tuple[int, int, int]]
_WEIGHTS, _SETTINGS = "memory.safetensors", "memory.json"
_COUNTS = ("held", "steps", "text")
_LONGEST_TEXT = 2**31  # tokens


class Pushed:
    """A memory that is uploaded as it is saved."""

    def save_pretrained(self, folder: str | Path, *, adapter: str | None = None, license: str | None = None) -> None:
        """Write the memory and a card into a folder."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter: str | None = None,
        license: str | None = None,
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes in one commit; options as `publishing.artifacts.push_folder`."""
        return push_saved(
            lambda folder: self.save_pretrained(folder, adapter=adapter, license=license), repo_id, **options
        )


def save_memory(
    folder: Path,
    kind: str,
    model: Any,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    sizes: tuple[int, int, int, int],
    card: Mapping[str, str | None],
) -> None:
    """Write a memory's tensors and settings, who wrote it, and a card.

    Args:
        folder: made if missing; an earlier memory in it is replaced.
        kind: `"context_memory"` or `"streaming_memory"`.
        model: with the adapter that wrote it.
        tensors, settings: whatever the memory needs to go on.
        sizes: users, steps, tokens seen, bytes, for the card.
        card: `adapter`, its Hub name for the code on the card, and `license`.

    Raises:
        ValueError: NaN, infinite or very large values, which could not be read again.
    """
    adapter, licence = (optional(check_text, name, card[name], empty=False) for name in ("adapter", "license"))
    base = causal_model_of(model)
    check_finite(tensors, MAX_VALUE)
    versions = {"format_version": FORMAT, "format_minor": MINOR}
    # one line: a history may hold millions of ids
    text = json.dumps({**versions, "written_by": written_by(model), **settings}, separators=(",", ":"))
    users, steps, tokens, nbytes = sizes
    with replacing(folder, kind) as draft:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(draft / _WEIGHTS))
        (draft / _SETTINGS).write_text(text + "\n", encoding="utf-8")
        finish(
            draft,
            kind,
            about={"steps": steps, "tokens": tokens, "bytes": nbytes, "adapter": adapter},
            metadata={"license": licence, "base_model": hub_name(base), "tags": ["compressed-context-memory"]},
            code={
                "model": hub_name(base) or MODEL,
                "dtype": str(base.dtype).removeprefix("torch."),
                "adapter": adapter or ADAPTER,
            },
            name="Streaming context memory" if kind == "streaming_memory" else "Compressed context memory",
            base=hub_name(base) or "a model of its author's",
            users=users,
            steps=steps,
            tokens=f"{tokens:,}",
            nbytes=f"{nbytes:,}",
        )


def load_memory(
    model: Any,
    source: str | Path,
    kind: str,
    shapes: Shapes,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the model's device) and settings of a memory that this model and adapter wrote.

    Args:
        model: with the adapter.
        source: folder or Hub name.
        kind: `"context_memory"` or `"streaming_memory"`.
        shapes: (KV heads, key width, value width) per layer, as the model's memories have them (`proof.Proof`).
        revision, token: of the Hub.

    Raises:
        ValueError: no memory there, one of another model or adapter, or tensors that do not fit the model.
    """
    folder, _ = fetch(source, kind, revision=revision, token=token)
    settings = read_json(folder / _SETTINGS)
    newer = check_version({"format_version": 1, **settings}, folder / _SETTINGS)
    by = settings.get("written_by")
    if not isinstance(by, dict) or not {"weights", "adapter"} <= set(by):
        raise ValueError(f"{folder / _SETTINGS} does not say who wrote the memory; save it again with this version")
    check_identity(by, written_by(model), f"the memory in {folder}", "append the contexts again")
    tensors = read_tensors(folder / _WEIGHTS)
    if newer:
        tensors = {name: one for name, one in tensors.items() if _known(name)}
    try:
        check_finite(tensors, MAX_VALUE)
        _check(tensors, settings, shapes, causal_model_of(model).dtype)
        if kind == "context_memory":
            _check_counts(tensors, ccm_config(model), settings)
        _check_history(settings, int(model.get_input_embeddings().weight.shape[0]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{folder} holds no whole memory ({type(error).__name__}: {told(error)}); get it again, or append the contexts "
            "again"
        ) from error
    return {name: tensor.to(_device(model, name)) for name, tensor in tensors.items()}, settings


def _device(model: Any, name: str) -> torch.device:
    parts = name.split(".")  # GROUP.LAYER.keys, or a tensor of all layers
    return layer_device(model, int(parts[1])) if len(parts) == 3 else input_device(model)


def _known(name: str) -> bool:
    return name in _COUNTS or name.split(".")[0] in ("memory", "sink", "cache")


def _check(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], shapes: Shapes, dtype: torch.dtype) -> None:
    """Every group of layers is whole: one pair per layer, of the model's heads, for as many users and slots."""
    users = len(tensors["steps"]) if "steps" in tensors else 1
    if not users:
        raise ValueError("a memory of no users")
    groups: dict[str, dict[int, int]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if len(parts) != 3:
            if name not in _COUNTS or not tensor.ndim or tensor.shape[0] != users:
                raise ValueError(f"unexpected tensor {name!r:.80} of shape {tuple(tensor.shape)}")
            continue
        shape, layer = tuple(tensor.shape), int(parts[1])
        heads, *widths = shapes[layer] if 0 <= layer < len(shapes) else (0, 0, 0)
        width = widths[parts[2] != "keys"]
        if len(shape) != 4 or shape[:2] != (users, heads) or shape[3] != width:
            raise ValueError(f"{name} has shape {shape}, needed is ({users}, {heads}, n, {width})")
        if not tensor.is_floating_point() or groups.setdefault(parts[0], {}).setdefault(layer, shape[2]) != shape[2]:
            raise ValueError(f"{name} is {tensor.dtype} {shape}, unlike its other half")
    for group, found in groups.items():
        if sorted(found) != list(range(len(shapes))) or len(set(found.values())) != 1:
            raise ValueError(f"{group} has layers {sorted(found)!r:.80} of {len(shapes)}")
        if 2 * len(found) != sum(name.startswith(f"{group}.") for name in tensors):
            raise ValueError(f"{group} lacks keys or values")
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(kinds) > 1:
        raise ValueError(f"keys and values are of several dtypes: {sorted(map(str, kinds))}")
    if kinds - {dtype, torch.float16, torch.bfloat16}:  # those two come from an autocast
        raise ValueError(f"keys and values are {sorted(map(str, kinds))}, the model is in {dtype}")
    if "steps" not in tensors:
        return
    counts = {name: settings[name] for name in ("layers", "peak_kv_bytes", "peak_slots")}
    if any(isinstance(value, bool) or not isinstance(value, int) or value < 0 for value in counts.values()):
        raise ValueError(f"{', '.join(counts)} must be whole numbers from 0 on, got {list(counts.values())!r:.80}")
    begun = bool((tensors["steps"] > 0).any())
    if (
        begun != ("memory" in groups)
        or counts["layers"] != len(groups.get("memory", ()))
        or set(groups) - {"memory", "sink"}
    ):
        raise ValueError(
            f"{counts['layers']} layers after {tensors['steps'].tolist()!r:.80} steps, of {sorted(groups)}"
        )
    if any(bool((tensors[name] < 0).any()) for name in ("steps", "text")):
        raise ValueError("steps and text must not be negative")
    slots = next(iter(groups.get("memory", {0: 0}).values()))
    history = settings["history"]
    if tensors["held"].dtype != torch.bool or tuple(tensors["held"].shape) != (users, slots):
        raise ValueError(f"held has shape {tuple(tensors['held'].shape)}, needed is ({users}, {slots})")
    if any(tensors[name].dtype != torch.int64 or tensors[name].ndim != 1 for name in ("steps", "text")):
        raise ValueError("steps and text must be 1-D int64")
    if not isinstance(history, list) or len(history) != users:
        raise ValueError(f"history must hold the token ids of {users} users")


def _check_counts(tensors: Mapping[str, Tensor], config: Any, settings: Mapping[str, Any]) -> None:
    """Steps, text and slots held tell the same story, by the adapter's kind of memory and its budget."""
    steps, text, held = (tensors[name] for name in _COUNTS[1:] + _COUNTS[:1])
    history, most = settings["history"], check_max_slots(config, settings.get("max_slots"))
    groups = steps if config.memory.startswith("concat") else (steps > 0).long()
    if most is not None:
        groups = groups.clamp(max=most // config.num_comp_tokens)
    if not torch.equal(held.sum(1), groups * config.num_comp_tokens):
        raise ValueError(f"users hold {held.sum(1).tolist()!r:.80} slots after {steps.tolist()!r:.80} steps")
    if not torch.equal(steps > 0, text > 0) or bool((text < steps).any()) or int(text.max()) > _LONGEST_TEXT:
        raise ValueError(f"{text.tolist()!r:.80} tokens were read in {steps.tolist()!r:.80} steps")
    if config.memory == "gist" and [len(row) for row in history] != text.tolist():
        raise ValueError("the history is not what was read")


def _check_history(settings: Mapping[str, Any], vocabulary: int) -> None:
    """Token ids of what was read, which a gist memory reads again."""
    for row in settings.get("history", ()):
        if not isinstance(row, list) or any(isinstance(token, bool) or not isinstance(token, int) for token in row):
            raise ValueError(f"history must hold lists of token ids, got {row!r:.80}")
        if row and not 0 <= min(row) <= max(row) < vocabulary:
            raise ValueError(f"history holds ids from {min(row)} to {max(row)}, the model knows {vocabulary}")


def read_chat(settings: Mapping[str, Any], source: Any) -> ChatFormat:
    """How messages become text, as a memory's settings have it; defaults where they do not say.

    Raises:
        ValueError: they say something impossible.
    """
    try:
        return ChatFormat.from_dict(dict(settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} holds wrong settings of the chat template ({error}); save it again") from error


def layers_of(tensors: Mapping[str, Tensor], group: str) -> Layers:
    """Keys and values per layer of one group of tensors."""
    count = sum(name.startswith(f"{group}.") and name.endswith(".keys") for name in tensors)
    return [(tensors[f"{group}.{index}.keys"], tensors[f"{group}.{index}.values"]) for index in range(count)]
