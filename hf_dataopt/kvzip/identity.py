"""Which model made a cache: sizes and dtype by name, and a short digest over samples of all weights."""

from __future__ import annotations

from typing import Any

from .._compat import causal_model_of, text_config
from ..artifacts import hub_name
from ..weight_digest import weight_digest

_SIZES = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def identity(model: Any) -> dict[str, Any]:
    """What a saved cache records of its model.

    Returns:
        `name` (on the Hub, if it has one), `dtype`, `sizes` by name, `weights` (hex digest, adapters included).

    Cost: 64 values of each weight, one transfer from the device.
    """
    model = causal_model_of(model)
    sizes = text_config(model)
    return {
        "name": hub_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sizes": {name: getattr(sizes, name, None) for name in _SIZES},
        "weights": weight_digest(model.named_parameters()),
    }


def check_identity(made_by: Any, model: Any, what: str) -> None:
    """Refuse what another model made.

    Args:
        made_by: an `identity`, as read from a file.
        model: the model that is to use it.
        what: it is called in the message.

    Raises:
        ValueError: sizes, dtype or weights differ.
    """
    found = identity(model)
    wrote = made_by if isinstance(made_by, dict) else {}
    if wrote.get("sizes") != found["sizes"]:
        raise ValueError(f"{what} was made by another kind of model than this one ({found['sizes']}); load that one")
    if wrote.get("dtype") != found["dtype"]:
        raise ValueError(
            f"{what} was made in {wrote.get('dtype')!r:.20}, the model is in {found['dtype']}; load it with that dtype"
        )
    if wrote.get("weights") != found["weights"]:
        raise ValueError(
            f"{what} was made by other weights than these ({wrote.get('name')!r:.100}); load those, or make it again"
        )
