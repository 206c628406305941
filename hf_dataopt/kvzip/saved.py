"""Compressed caches on disk: kept pairs, lengths and prompt ids in safetensors, everything else in JSON."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .._compat import chunked_attention, layer_device, layer_kinds, linear_layer, linear_states, text_config, window_of
from ..progress import told
from ..publishing.artifacts import fetch
from ..publishing.identity import check_identity, identity
from ..publishing.kinds import MODEL
from ..publishing.record import check_version, known_settings
from ..publishing.safe_files import MAX_VALUE, check_finite, read_tensors
from ..publishing.writer import finish, replacing
from ..settings import check_text, optional
from .config import KVzipConfig
from .layers import KVzipLayer, KVzipSlidingLayer
from .prompt import KVzipPrompt
from .proof import Proof, prove
from .quantised import BITS, QuantisedRows, Storage
from .ragged import QuantisedContext, Ragged, RaggedContext

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILE = "cache.safetensors"
_TURNS = "turn_ids"  # where the cache was compressed again
_IDS = ("prefix_ids", "context_ids", "suffix_ids", "first_repeat_ids", "next_repeat_ids")


def save_cache(cache: Any, folder: str | Path, *, license: str | None = None) -> Path:
    """Write a cache as it stood after compression; what came after the context is left out.

    Args:
        cache: a `KVzipCache` from `from_context` or `from_scores`.
        folder: made if missing; an earlier save in it is replaced as a whole.
        license: of the context, if it may be shared; otherwise the card names none.

    Returns:
        The folder: `cache.safetensors`, `hf_dataopt.json` and a card.

    Raises:
        ValueError: a cache whose model is gone and unknown, or NaN, infinite or very large values in it.
    """
    license = optional(check_text, "license", license, empty=False)
    if cache.rows is not None:
        raise ValueError("this cache holds several contexts; save a cache of each")
    if cache.made_by is None:
        raise ValueError("this cache does not know its model; make it with KVzipCache.from_context or from_scores")
    layers: list[Any] = cache.pristine_layers
    tensors: dict[str, Tensor] = {name: getattr(cache.prompt, name).contiguous() for name in _IDS}
    if cache.prompt.turn_ids.numel():
        tensors[_TURNS] = cache.prompt.turn_ids
    windows: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, KVzipLayer):
            context: Ragged = layer.context
            held = {name: one for name, one in context.tensors.items() if one.shape[-1]}
            tensors |= {f"layer.{index}.{name}": one.contiguous() for name, one in held.items()}
            tensors[f"layer.{index}.lengths"] = torch.tensor(context.lengths)
            if layer.scores is not None:
                n_prefix = cache.prompt.prefix_ids.numel()
                tensors[f"layer.{index}.scores"] = torch.cat([row[n_prefix:] for row in layer.scores])
        elif hasattr(layer, "sliding_window"):
            tensors |= {
                f"window.{index}.keys": layer.keys.contiguous(),
                f"window.{index}.values": layer.values.contiguous(),
            }
            windows[str(index)] = layer.sliding_window
        else:
            tensors |= {f"state.{index}.{name}": state.contiguous() for name, state in linear_states(layer).items()}
    check_finite(tensors, MAX_VALUE)
    name = cache.made_by["name"] or MODEL
    with replacing(folder, "kvzip_cache") as draft:
        save_file(tensors, str(draft / _FILE))
        finish(
            draft,
            "kvzip_cache",
            about={
                "model": cache.made_by,
                "config": json.loads(cache.config.to_json_string()),
                "scored_by": cache.scored_by,
                "layers": len(layers),
                "windows": windows,
                "tokens": cache.ids.shape[1],
                "bytes": cache.context_nbytes,
                "full_bytes": cache.full_context_nbytes,
            },
            metadata={"license": license, "base_model": cache.made_by["name"], "tags": ["kv-cache", "kvzip"]},
            code={"model": name, "dtype": cache.made_by["dtype"]},
            name="Compressed KVzip cache",
            base=name,
            tokens=f"{cache.ids.shape[1]:,}",
            nbytes=f"{cache.context_nbytes:,}",
            full_nbytes=f"{cache.full_context_nbytes:,}",
            share=f"{cache.context_nbytes / cache.full_context_nbytes:.1%}",
            dtype=cache.made_by["dtype"],
            settings=cache.config.to_json_string(),
        )
    return Path(folder)


def load_cache(
    source: str | Path,
    model: PreTrainedModel,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> tuple[list[Any], KVzipPrompt, KVzipConfig, dict[str, Any], str | None]:
    """Read what `save_cache` wrote, from a folder or the Hub.

    Args:
        source: folder or Hub name.
        model: the model that made it.
        revision, token: of the Hub.

    Returns:
        What a `KVzipCache` is made of: layers on the model's device, prompt, settings, which model made it, and which gates
        scored it (None for another score).

    Raises:
        ValueError: no cache there, tensors that do not fit together, or another model than the one that made it.
    """
    folder, about = fetch(source, "kvzip_cache", revision=revision, token=token)
    proof = prove(model)
    check_identity(about.get("model"), identity(model), f"the cache in {folder}")
    tensors = read_tensors(folder / _FILE)
    try:
        check_finite(tensors, MAX_VALUE)
        newer = check_version(about, folder)
        config = KVzipConfig.from_json_string(
            known_settings(about["config"], (one.name for one in fields(KVzipConfig)), newer)
        )
        scored_by = about.get("scored_by")
        if not isinstance(scored_by, str | None):
            raise ValueError(f"scored by {scored_by!r:.80}, which is no digest of gates")
        names = (*_IDS, _TURNS) if _TURNS in tensors else _IDS
        prompt = KVzipPrompt(*(tensors[name] for name in names))
        ids = torch.cat([tensors[name] for name in names])
        picture = getattr(model.config, "image_token_id", None)  # may lie outside the vocabulary
        ids = ids if picture is None else ids[ids != picture]
        if bool((ids < 0).any() | (ids >= text_config(model).vocab_size).any()):
            raise ValueError("token ids outside the vocabulary")
        layers = [
            _ragged(tensors, index, model, proof, prompt, config.storage)
            if kind == "full"
            else _whole(tensors, index, kind, model, proof, prompt.ids.numel(), about["windows"])
            for index, kind in enumerate(layer_kinds(text_config(model)))
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{folder} holds no whole cache ({type(error).__name__}: {told(error)}); get it again, or compress again"
        ) from error
    return layers, prompt, config, about["model"], scored_by


def _whole(
    tensors: dict[str, Tensor],
    index: int,
    kind: str,
    model: PreTrainedModel,
    proof: Proof,
    n_tokens: int,
    windows: dict[str, int],
) -> Any:
    if kind == "sliding":
        return _window(tensors, index, model, proof.shapes[index], n_tokens, int(windows[str(index)]))
    states = {
        name.removeprefix(f"state.{index}."): tensor.to(layer_device(model, index))
        for name, tensor in tensors.items()
        if name.startswith(f"state.{index}.")
    }
    found = {name: tuple(state.shape) for name, state in states.items() if state.is_floating_point()}
    if found != proof.states.get(index, {}):
        raise ValueError(
            f"layer {index} has the states {found!r:.120}, needed are {proof.states.get(index, {})!r:.120}"
        )
    return linear_layer(model, index, states)


def _ragged(
    tensors: dict[str, Tensor], index: int, model: PreTrainedModel, proof: Proof, prompt: KVzipPrompt, storage: Storage
) -> KVzipLayer:
    start = f"layer.{index}."
    parts = {name.removeprefix(start): one for name, one in tensors.items() if name.startswith(start)}
    n_tokens, n_prefix = prompt.ids.numel(), prompt.prefix_ids.numel()
    lengths, (heads, *widths) = parts["lengths"], proof.shapes[index]
    counts = lengths.tolist() if lengths.ndim == 1 else []
    if lengths.dtype != torch.int64 or len(counts) != heads or not all(0 <= n <= n_tokens for n in counts):
        raise ValueError(f"layer {index} has lengths {counts!r:.80} for {heads} heads")
    context: Ragged
    if storage == "model":
        for name, width in zip(("keys", "values"), widths, strict=True):
            _check_values(index, model, parts[name], (sum(counts), width))
        context = RaggedContext(parts["keys"], parts["values"], counts, n_tokens)
    else:
        keys, values = (
            QuantisedRows.read(
                {
                    one: parts[f"{name}.{one}"]
                    for one in ("codes", "scales", "zeros", "order")
                    if f"{name}.{one}" in parts
                },
                counts,
                width,
                BITS[storage],
                per_channel=name == "keys",
                dtype=model.dtype,
            )
            for name, width in zip(("keys", "values"), widths, strict=True)
        )
        context = QuantisedContext(keys, values, counts, n_tokens)
    scores = None if "scores" not in parts else _scores(parts["scores"], index, counts, n_prefix)
    return KVzipLayer(context.to(layer_device(model, index)), proof.latent, scores)


def _scores(found: Tensor, index: int, lengths: list[int], n_prefix: int) -> list[Tensor]:
    """Scores of the kept pairs, by head, inf for the prefix."""
    counts = [length - n_prefix for length in lengths]
    if min(counts) < 0 or tuple(found.shape) != (sum(counts),) or not found.is_floating_point():
        raise ValueError(f"layer {index} has scores {found.dtype} {tuple(found.shape)} for {sum(counts)} pairs")
    return [torch.cat([row.new_full((n_prefix,), torch.inf), row]) for row in found.split(counts)]


def _window(
    tensors: dict[str, Tensor],
    index: int,
    model: PreTrainedModel,
    shape: tuple[int, int, int],
    n_tokens: int,
    window: int,
) -> KVzipSlidingLayer:
    keys, values = (tensors[f"window.{index}.{name}"] for name in ("keys", "values"))
    heads, key_width, value_width = shape
    expected = window_of(model, index)
    if window != expected:
        raise ValueError(f"layer {index} has a window of {window}, the model {expected}")
    held = min(n_tokens, window - 1)
    _check_values(index, model, keys, (1, heads, held, key_width))
    _check_values(index, model, values, (1, heads, held, value_width))
    layer, device = KVzipSlidingLayer(window, chunked_attention(text_config(model))), layer_device(model, index)
    layer.lazy_initialization(keys.to(device), values.to(device))
    layer.keys, layer.values = keys.to(device), values.to(device)
    layer.cumulative_length = n_tokens
    return layer


def _check_values(index: int, model: PreTrainedModel, one: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(one.shape) != shape or one.dtype != model.dtype:
        raise ValueError(f"layer {index} has {one.dtype} {tuple(one.shape)}, needed is {model.dtype} {shape}")
