"""Context-independent eviction (section 8.4.2): one importance per head, made once per model and kept in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from safetensors.torch import save_file

from ..progress import track
from ..publishing.artifacts import fetch, push_saved
from ..publishing.kinds import MODEL
from ..publishing.names import looks_like_repo
from ..publishing.safe_files import read_tensors
from ..publishing.writer import finish, replacing
from ..settings import brief, check_config, check_each, check_flag, check_tensor, check_text, check_tokenizer, optional

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..publishing.hub import PushOptions
    from .config import KVzipConfig

_FILE = "head_scores.safetensors"


def head_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    config: KVzipConfig | None = None,
    *,
    progress: bool = True,
) -> torch.Tensor:
    """Importance of every head: the maximum of its pair scores over one long text.

    Args:
        model, tokenizer: the language model that will use them.
        text: a long natural text; the dissertation uses one English book sample of 88K tokens. A list of texts, or of the
            pieces of a text that is longer than the model's positions, is read one by one.
        config: score, chunk size and replay.
        progress: show bars.

    Returns:
        (scored layers, KV heads) float32 in [0, 1], higher is more important; for `KVzipCache.from_context(head_scores=…)`.

    Source: section 8.4.2, "Context-Independent Eviction".
    Cost: about two prefills of the text, once per model.
    """
    from .config import KVzipConfig
    from .prefill import prefill
    from .prompt import build_prompt
    from .reading import check_supported
    from .scoring import score_context

    config = check_config(config, KVzipConfig)
    check_supported(model)
    check_tokenizer("tokenizer", tokenizer)
    progress = check_flag("progress", progress)
    given = [text] if isinstance(text, str) else text
    if not isinstance(given, list | tuple):
        raise TypeError(f"text must be a str or a list of them, got {brief(given)}")
    found = []
    for one in track(
        check_each("text", given, check_text, empty=False), "Texts", disable=not progress or len(given) == 1
    ):
        prefilled = prefill(model, build_prompt(tokenizer, one, config), config, progress=progress)
        found.append(score_context(prefilled, config, progress=progress).amax(dim=-1))
    return torch.stack(found).amax(dim=0)


def save_head_scores(
    scores: torch.Tensor,
    folder: str | Path,
    *,
    model_id: str,
    dtype: str = "auto",
    source: str = "a text of its author's",
    license: str | None = None,
) -> Path:
    """Write head scores, the model's name and a card.

    Args:
        scores: (scored layers, KV heads), finite.
        folder: made if missing; an earlier save in it is replaced as a whole.
        model_id: Hub name (or another name) of the model they belong to.
        dtype: of the weights, for the code on the card.
        source: what text they were made from, for the card.
        license: of the scores; otherwise the card names none, or a push takes the model's.

    Returns:
        The folder.

    Raises:
        ValueError: scores of another shape, or not finite.
    """
    _check(scores)
    model_id, dtype, source = (
        check_text(name, text, empty=False)
        for name, text in (("model_id", model_id), ("dtype", dtype), ("source", source))
    )
    license = optional(check_text, "license", license, empty=False)
    public = looks_like_repo(model_id)
    with replacing(folder, "head_scores") as draft:
        save_file({"head_scores": scores.contiguous()}, str(draft / _FILE))
        finish(
            draft,
            "head_scores",
            about={"model": {"name": model_id}},
            metadata={
                "license": license,
                "base_model": model_id if public else None,
                "tags": ["kv-cache", "kvzip"],
            },
            code={"model": model_id if public else MODEL, "dtype": dtype},
            origin=("model", model_id),
            name="KVzip head scores",
            base=model_id,
            layers=scores.shape[0],
            heads=scores.shape[1],
            source=source,
        )
    return Path(folder)


def load_head_scores(
    source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> tuple[torch.Tensor, str]:
    """Read what `save_head_scores` wrote, from a folder or the Hub.

    Args:
        source: folder or Hub name.
        revision, token: of the Hub.

    Returns:
        Scores (scored layers, KV heads) float32, and the model they belong to.

    Raises:
        ValueError: no such folder, or not a folder of head scores.
    """
    folder, about = fetch(source, "head_scores", revision=revision, token=token)
    scores = read_tensors(folder / _FILE).get("head_scores")
    model = about.get("model")
    if scores is None or not isinstance(model, dict) or not isinstance(model.get("name"), str):
        raise ValueError(f"{folder} holds no whole head scores; get them again, or make them with head_scores()")
    try:
        _check(scores)
    except TypeError as error:  # a file is no argument
        raise ValueError(f"{folder} holds wrong head scores ({error}); get them again") from error
    return scores.float(), model["name"]


def push_head_scores(
    scores: torch.Tensor, repo_id: str, *, model_id: str, **options: Unpack[PushOptions]
) -> CommitInfo:
    """Upload head scores in one commit; options as `publishing.artifacts.push_folder`."""
    return push_saved(lambda folder: save_head_scores(scores, folder, model_id=model_id), repo_id, **options)


def _check(scores: torch.Tensor) -> None:
    check_tensor("head scores", scores, ("layers", "KV heads"), finite=True)
