"""Which model made something: sizes by name, and a short hash over samples of weights; what another one made is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .._compat import causal_model_of, text_config
from .names import hub_name

_SAMPLES = 64
_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def identity(
    model: Any,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
    adapter: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a saved file records of the model that made it.

    Args:
        model: a causal language model, wrapped or not.
        weights: names and tensors that tell it from others; default all parameters, adapters included.
        adapter: settings of the adapter at work, by name.

    Returns:
        `name` (on the Hub, if it has one), `dtype`, `sizes` by name, `weights` (hex digest), and `adapter` if given.

    Cost: 64 values of each weight, one transfer from the device.
    """
    model = causal_model_of(model)
    sizes = text_config(model)
    return {
        "name": hub_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sizes": {name: getattr(sizes, name, None) for name in _SIZES},
        **({} if adapter is None else {"adapter": dict(adapter)}),
        "weights": weight_digest(model.named_parameters() if weights is None else weights),
    }


def check_identity(made_by: Any, found: Mapping[str, Any], what: str, again: str = "make it again") -> None:
    """Refuse what another model, or another adapter, made.

    Entries that only one of the two has are no difference: versions of this package record more or less. The weights decide.

    Args:
        made_by: an `identity`, as read from a file.
        found: the `identity` of the model that is to use it.
        what: it is called in the message.
        again: what to do where the other model is lost, for the message.

    Raises:
        ValueError: sizes, dtype, adapter settings or weights differ.
    """
    wrote = made_by if isinstance(made_by, dict) else {}
    wrote = {"sizes": wrote.get("model"), **wrote}  # what memories called it at first
    for part, name in (("sizes", "model"), ("adapter", "adapter")):
        then, now = wrote.get(part), found.get(part, {})
        known = then if isinstance(then, dict) else {}
        pairs = [(key, known[key], now[key]) for key in now if key in known and known[key] != now[key]]
        if pairs:
            said = ", ".join(f"{key} {old!r:.60}, here {new!r:.60}" for key, old, new in pairs)
            kind = f", another kind of {name} than this one" if part == "sizes" else ""
            raise ValueError(f"{what} belongs to another {name} ({said}){kind}; load that one")
    if wrote.get("dtype", found["dtype"]) != found["dtype"]:
        raise ValueError(
            f"{what} was made in {wrote['dtype']!r:.20}, the model is in {found['dtype']}; load it with that dtype"
        )
    if wrote.get("weights") != found["weights"]:
        raise ValueError(
            f"{what} was made by other weights than these ({wrote.get('name')!r:.100}: another model, more training, another "
            f"adapter or dtype); load those, or {again}"
        )


@torch.no_grad()
def weight_digest(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of names, shapes and up to 64 values of each weight, spread evenly; the same for the same values.

    Args:
        weights: names and tensors, of any shape and dtype, in an order that does not change; offloaded ones (meta) are
            left out.

    Returns:
        16 hex digits.

    Cost: 64 values of each weight, gathered where the first one lies.
    """
    digest = hashlib.sha256()
    samples: list[torch.Tensor] = []
    for name, weight in weights:
        if weight.device.type == "meta":
            continue
        flat = weight.detach().flatten()
        index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        found = flat[index.to(flat.device)].float()
        samples.append(found.to(samples[0].device) if samples else found)
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
