"""The full cache of a context, for a model that was proven."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .._compat import causal_model_of, text_config
from ..routing.verdicts import evaluating
from ..settings import check_config, check_flag, check_kind, optional
from ..text.positions import warn_beyond_positions
from .config import KVzipConfig
from .images import ContextImages
from .prompt import KVzipPrompt
from .proof import prove
from .reading import OnInput, PrefilledContext, check_supported, read_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    prompt: KVzipPrompt,
    config: KVzipConfig | None = None,
    *,
    images: ContextImages | None = None,
    on_input: OnInput | None = None,
    progress: bool = True,
) -> PrefilledContext:
    """Encode prefix and context into a full cache, in pieces, without computing logits.

    Args:
        model: a supported causal language model.
        prompt: the token sequences.
        config: gives `prefill_chunk_size`; default settings otherwise.
        images: of the context, from `images.build_context`; it is then read in one piece.
        on_input: called with each scored layer's index and what its attention is given, (n, width), piece by piece.
        progress: show a bar (contexts of more than one piece only).

    Returns:
        The full cache as a `PrefilledContext`.

    Raises:
        UnsupportedModelError: see `check_supported` and `proof.prove`; or images that cannot be repeated for scoring.

    Cost: one forward over the context, O(n^2) attention and no mask (with images, the model's own mask of n^2); 2 * layers *
        KV heads * d values per token are stored.
    """
    config, progress = check_config(config, KVzipConfig), check_flag("progress", progress)
    check_supported(model)
    check_kind("prompt", prompt, KVzipPrompt, "give what build_prompt returned")
    optional(check_kind, "images", images, ContextImages)
    prove(model)
    warn_beyond_positions(text_config(model), prompt.ids.numel(), "the context with its prompt")
    with evaluating(causal_model_of(model)):
        return read_context(model, prompt, config, images=images, on_input=on_input, progress=progress)
