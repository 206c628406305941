"""Scores of key-value pairs written out slowly, from a model's own eager attention: one forward, loops over heads and pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass
class Seen:
    """One eager forward over prefix, context and what repeats it, layer by layer.

    Args:
        weights: (H, n, n) attention of each layer.
        given: (n, width), what each attention module was given.
        values: (KV heads, n, v).
        keys: (KV heads, n, d), rotated.
        modules: attention modules.
        gradients: (n,) lengths of the gradients of the squared last hidden states of the last `repeated` tokens.
        prefix, context, repeated: tokens.
    """

    weights: list[torch.Tensor]
    given: list[torch.Tensor]
    values: list[torch.Tensor]
    keys: list[torch.Tensor]
    modules: list[Any]
    gradients: list[torch.Tensor]
    prefix: int
    context: int
    repeated: int

    @property
    def end(self) -> int:
        """Tokens up to the context's end."""
        return self.prefix + self.context


def see(model: PreTrainedModel, ids: torch.Tensor, prefix: int, context: int, layers: list[int]) -> Seen:
    """Run an eager model once over ids (n,) and write everything down, for these layers."""
    modules = [layer.self_attn for layer in model.model.layers]
    given: dict[Any, torch.Tensor] = {}
    written: dict[Any, torch.Tensor] = {}
    last: list[torch.Tensor] = []

    def attention(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        given[module] = kwargs["hidden_states"][0].detach()
        output[0].retain_grad()
        written[module] = output[0]

    def block(module: Any, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(attention, with_kwargs=True) for module in modules]
    hooks.append(model.model.layers[-1].register_forward_hook(block))
    try:
        result = model(ids[None], output_attentions=True, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    repeated = ids.numel() - prefix - context
    if repeated:
        last[0][0, prefix + context :].square().sum().backward()
    cache = getattr(result, "cache", None) or result.past_key_values
    shown = [modules[index] for index in layers]
    return Seen(
        [result.attentions[index][0].detach() for index in layers],
        [given[module] for module in shown],
        [cache.layers[index].values[0].detach() for index in layers],
        [cache.layers[index].keys[0].detach() for index in layers],
        shown,
        [written[module].grad[0].norm(dim=-1) if repeated else torch.empty(0) for module in shown],
        prefix,
        context,
        repeated,
    )


def _best(
    seen: Seen, layer: int, row_weights: torch.Tensor, value_weights: bool, power: float = float("inf")
) -> torch.Tensor:
    """Eq. 8.2, head by head, with rows and columns weighted; another norm over queries and heads for another power."""
    heads, kv_heads = seen.weights[layer].shape[0], seen.values[layer].shape[0]
    result = torch.zeros(kv_heads, seen.context)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        found = seen.weights[layer][head, seen.end :, seen.prefix : seen.end] * row_weights[:, None]
        if value_weights:
            value = seen.values[layer][kv, seen.prefix : seen.end]
            whole = torch.zeros(seen.context, heads * value.shape[-1])
            whole[:, head * value.shape[-1] : (head + 1) * value.shape[-1]] = value
            found = found * (whole @ seen.modules[layer].o_proj.weight.detach().T).norm(dim=-1)
        if power == float("inf"):
            result[kv] = torch.maximum(result[kv], found.amax(dim=0))
        else:
            result[kv] += (found**power).sum(dim=0)
    return result if power == float("inf") else result ** (1 / power)


def kvzip_l2(seen: Seen, layer: int) -> torch.Tensor:
    """The length of all attentions to a pair."""
    return _best(seen, layer, torch.ones(seen.repeated), False, 2)


def kvgrad_l2(seen: Seen, layer: int) -> torch.Tensor:
    """The length of all A ||W_O v|| ||gradient|| of a pair."""
    return _best(seen, layer, seen.gradients[layer][seen.end :], True, 2)


def kvzip(seen: Seen, layer: int) -> torch.Tensor:
    """Eq. 8.2."""
    return _best(seen, layer, torch.ones(seen.repeated), False)


def kvzip_plus(seen: Seen, layer: int) -> torch.Tensor:
    """A ||W_O v|| / ||h||."""
    return _best(seen, layer, 1 / seen.given[layer][seen.end :].norm(dim=-1), True)


def kvgrad(seen: Seen, layer: int) -> torch.Tensor:
    """A ||W_O v|| ||gradient||."""
    return _best(seen, layer, seen.gradients[layer][seen.end :], True)


def _by_kv_head(seen: Seen, layer: int, found: torch.Tensor) -> torch.Tensor:
    """(H, n) to the mean over the query heads of each KV head."""
    return found.reshape(seen.values[layer].shape[0], -1, found.shape[-1]).mean(dim=1)


def _places(row: list[float]) -> list[int]:
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    return [order.index(index) for index in range(len(row))]


def h2o(seen: Seen, layer: int) -> torch.Tensor:
    """Minus the better of two ranks: by attention summed over the context's queries, and by position."""
    summed = _by_kv_head(seen, layer, seen.weights[layer][:, seen.prefix : seen.end, seen.prefix : seen.end].sum(dim=1))
    rows = []
    for row in summed.tolist():
        heavy, recent = _places(row), _places([float(index) for index in range(len(row))])
        rows.append([-float(min(pair)) for pair in zip(heavy, recent, strict=True)])
    return torch.tensor(rows)


def snapkv(seen: Seen, layer: int, window: int, kernel: int) -> torch.Tensor:
    """Mean attention of the last `window` queries, averaged over `kernel` neighbours (zeros outside), 1 in the window."""
    window = min(window, seen.context)
    start = seen.end - window
    means = seen.weights[layer][:, start : seen.end, seen.prefix : start].mean(dim=1)
    pooled = torch.zeros_like(means)
    for place in range(means.shape[-1]):
        for other in range(place - kernel // 2, place + kernel // 2 + 1):
            if 0 <= other < means.shape[-1]:
                pooled[:, place] += means[:, other] / kernel
    outside = _by_kv_head(seen, layer, pooled)
    return torch.cat([outside, torch.ones(outside.shape[0], window)], dim=1)


def pyramidkv(seen: Seen, layer: int, window: int, kernel: int, beta: int) -> torch.Tensor:
    """Minus rank over the layer's share of the budget, which falls linearly."""
    found = snapkv(seen, layer, window, kernel)
    outside = seen.context - min(window, seen.context)
    first, last = 2 - 1 / beta, 1 / beta
    layers = len(seen.weights)
    share = first + (last - first) * layer / (layers - 1) if layers > 1 else 1.0
    result = torch.zeros_like(found)
    for head, row in enumerate(found[:, :outside].tolist()):
        result[head, :outside] = torch.tensor([-(place + 1) / share for place in _places(row)])
    return result


def streaming_llm(seen: Seen, layer: int, sinks: int) -> torch.Tensor:
    """By position, sinks first."""
    row = [1.0 if place < sinks else (place + 1) / (seen.end + 1) for place in range(seen.prefix, seen.end)]
    return torch.tensor(row).expand(seen.values[layer].shape[0], -1)


def duo_attention(seen: Seen, layer: int, sinks: int, recent: int) -> torch.Tensor:
    """Mean share of attention that a head pays to context pairs that are neither sinks nor within `recent` before the query."""
    heads, kv_heads = seen.weights[layer].shape[0], seen.values[layer].shape[0]
    far = torch.zeros(heads)
    for query in range(seen.prefix, seen.end):
        for key in range(max(seen.prefix, sinks), query - recent + 1):
            far += seen.weights[layer][:, query, key] / seen.context
    by_head = far.reshape(kv_heads, -1).amax(dim=1)
    result = by_head[:, None].repeat(1, seen.context)
    for place in range(seen.context):
        if seen.prefix + place < sinks or place >= seen.context - recent:
            result[:, place] = 1
    return result


def expected_attention(
    seen: Seen, layer: int, model: PreTrainedModel, index: int, ahead: int, sinks: int
) -> torch.Tensor:
    """From queries before their rotation, as the layer's own projection gives them, and rotation matrices written out."""
    first = max(sinks, seen.prefix)
    module = seen.modules[layer]
    heads, width = seen.weights[layer].shape[0], seen.keys[layer].shape[-1]
    plain = module.q_proj(seen.given[layer][first : seen.end]).detach().reshape(-1, heads, width)
    plain = (module.q_norm(plain).detach() if hasattr(module, "q_norm") else plain).double()
    positions = torch.arange(seen.end, seen.end + ahead)[None]
    types = getattr(model.config, "layer_types", None)
    kind = {"layer_type": types[index]} if "gemma3" in model.config.model_type else {}
    cos, sin = (part[0].double() for part in model.model.rotary_emb(plain.float(), positions, **kind))
    half = width // 2
    mean_rotation = torch.zeros(width, width, dtype=torch.float64)
    for c, s in zip(cos, sin, strict=True):
        matrix = torch.diag(c)
        for i in range(half):
            matrix[i, i + half], matrix[i + half, i] = -s[i], s[i + half]
        mean_rotation += matrix / ahead
    scale = module.scaling
    weights = torch.zeros(heads, seen.context, dtype=torch.float64)
    kv_heads = seen.keys[layer].shape[0]
    for head in range(heads):
        mean = plain[:, head].mean(dim=0)
        centred = plain[:, head] - mean
        covariance = mean_rotation @ (centred.T @ centred / len(centred)) @ mean_rotation.T
        mean = mean_rotation @ mean
        logits = []
        for key in seen.keys[layer][head // (heads // kv_heads), first : seen.end].double():
            logits.append(scale * mean @ key + scale**2 / 2 * key @ covariance @ key)
        weights[head, first - seen.prefix :] = torch.stack(logits).softmax(dim=0)
    norms = seen.values[layer][:, seen.prefix : seen.end].norm(dim=-1)
    result = (_by_kv_head(seen, layer, weights) * norms).float()
    result[:, : first - seen.prefix] = result.max()
    return result
