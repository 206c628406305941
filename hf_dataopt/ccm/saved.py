"""CCM adapters as artifacts: PEFT's own files, a record, and a card that shows how to load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._compat import causal_model_of
from ..publishing.adapters import SETTINGS, WEIGHTS, adapter_code, describe_adapter
from ..publishing.artifacts import fetch, push_saved
from ..publishing.kinds import MODEL
from ..publishing.names import hub_name
from ..publishing.safe_files import check_finite, read_json, read_tensors
from ..publishing.writer import replacing
from ..settings import brief, check_each, check_kind, check_text, check_tokenizer, optional
from .active import ccm_config
from .memory import CompressedContextMemory


def save_adapter(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    example: tuple[Sequence[str], str] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    name: str | None = None,
) -> Path:
    """Write a CCM adapter as PEFT does, with a card that shows how to load it.

    Args:
        model: `PeftModel` with an active CCM adapter.
        folder: made if missing; an adapter in it is replaced, other files are not touched: with some, it is refused.
        tokenizer: needed for `example`.
        example: contexts and a question; the answer is computed and put on the card.
        results: measured figures: `task`, `dataset`, `metric`, `value`, `baseline`, `seeds`; none is fine.
        license: default the base model's, at the push.
        name: title of the card.

    Returns:
        The folder: PEFT's files, `hf_dataopt.json` and a card.

    Raises:
        ValueError: no active CCM adapter, an example without a tokenizer, or results that lack a field.
    """
    ccm_config(model)
    optional(check_tokenizer, "tokenizer", tokenizer)
    license, name = (
        optional(check_text, title, text, empty=False) for title, text in (("license", license), ("name", name))
    )
    check_each("results", results, check_kind, Mapping, least=0)
    if example is not None and not (isinstance(example, tuple | list) and len(example) == 2):
        raise TypeError(f"example must be (contexts, question), got {brief(example)}")
    if example is not None:
        check_each("the example's contexts", example[0], check_text)
        check_text("the example's question", example[1], empty=False)
    lacking = [row for row in results if set(_RESULT) - set(row)]
    if lacking:
        raise ValueError(f"every result needs {', '.join(_RESULT)}; got {sorted(lacking[0])}")
    if example is not None and tokenizer is None:
        raise ValueError("an example needs the tokenizer")
    base, answer = causal_model_of(model), None
    with replacing(folder, "ccm_adapter") as draft:
        model.save_pretrained(str(draft))
        settings = read_json(draft / SETTINGS)
        code = adapter_code(settings)
        code |= {"model": hub_name(base) or MODEL, "dtype": str(base.dtype).removeprefix("torch.")}
        if example is not None:
            code |= {"contexts": list(example[0]), "question": example[1]}
            answer = _answer(model, tokenizer, code)
        describe_adapter(
            draft,
            settings,
            code,
            answer=answer,
            results=results,
            license=license,
            name=name,
            base=hub_name(base),
        )
    return Path(folder)


_RESULT = ("task", "dataset", "metric", "value", "baseline", "seeds")


def _answer(model: Any, tokenizer: Any, code: Mapping[str, Any]) -> str:
    """What the code on the card prints."""
    memory = CompressedContextMemory(model, tokenizer)
    for context in code["contexts"]:
        memory.append(context)
    return str(memory.generate(code["question"], max_new_tokens=code["new_tokens"], do_sample=False))


def push_adapter(
    model: Any, repo_id: str, tokenizer: Any = None, *, about: Mapping[str, Any] | None = None, **options: Any
) -> str:
    """Upload adapter and card in one commit.

    Args:
        model: `PeftModel` with an active CCM adapter.
        repo_id: Hub name.
        tokenizer: needed for an example.
        about: keyword arguments of `save_adapter`.
        options: of `publishing.artifacts.push_folder`.

    Returns:
        URL of the commit, or of the pull request.
    """
    values = {"name": repo_id, **(optional(check_kind, "about", about, Mapping) or {})}
    return push_saved(lambda folder: save_adapter(model, folder, tokenizer, **values), repo_id, **options)


def load_adapter(base: Any, source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Any:
    """`PeftModel.from_pretrained` of a CCM adapter, after its files were checked; weights in pickles are refused.

    Raises:
        ValueError: no CCM adapter there, one with NaN among its weights, or one that does not fit the model.
    """
    from peft import PeftModel

    folder, _ = fetch(source, "ccm_adapter", revision=revision, token=token)
    read_json(folder / SETTINGS)
    check_finite(read_tensors(folder / WEIGHTS))
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except (RuntimeError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"{folder} holds no adapter that fits this {type(base).__name__} ({type(error).__name__}: {error!s:.300}); load "
            "its own base model, or get it again"
        ) from error
