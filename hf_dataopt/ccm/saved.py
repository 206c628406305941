"""CCM adapters as artifacts: PEFT's own files, a record, and a card that shows how to load them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .._compat import causal_model_of
from ..progress import told
from ..publishing.adapters import SETTINGS, WEIGHTS, adapter_code, describe_adapter, write_settings
from ..publishing.artifacts import fetch, push_saved
from ..publishing.kinds import MODEL
from ..publishing.names import hub_name, looks_like_repo
from ..publishing.safe_files import MAX_VALUE, check_finite, read_json, read_tensors
from ..publishing.writer import replacing
from ..settings import (
    brief,
    check_choice,
    check_device,
    check_each,
    check_kind,
    check_path,
    check_text,
    check_tokenizer,
    optional,
)
from .active import base_identity, ccm_config, check_base
from .memory import CompressedContextMemory

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ..publishing.hub import PushOptions


def save_adapter(
    model: Any,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    example: tuple[Sequence[Any], Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    license: str | None = None,
    name: str | None = None,
    trained_on: str | None = None,
) -> Path:
    """Write a CCM adapter as PEFT does, with a card that shows how to load it.

    A base model that came from a folder is known by its weights alone: no path of this machine is written.

    Args:
        model: `PeftModel` with an active CCM adapter.
        folder: made if missing; an adapter in it is replaced, other files are not touched: with some, it is refused.
        tokenizer: needed for `example`.
        example: contexts and a question, each text or a message `{"role", "content"}`; the answer is computed and put on the
            card.
        results: measured figures: `task`, `dataset`, `metric`, `value`, `baseline`, `seeds`; none is fine.
        license: default the base model's, at the push.
        name: title of the card.
        trained_on: what the base model is and how it was tuned, in words ("Llama 3.2 1B, LoRA on my chats, merged"): for
            record and card, and what a base with other weights is told.

    Returns:
        The folder: PEFT's files, `hf_dataopt.json` and a card.

    Raises:
        ValueError: no active CCM adapter, an example without a tokenizer, results that lack a field, or an adapter that
            `load_adapter` would refuse (NaN weights, names of modules by an expression that may take forever).
    """
    ccm_config(model)
    optional(check_tokenizer, "tokenizer", tokenizer)
    words = {"license": license, "name": name, "trained_on": trained_on}
    words = {title: optional(check_text, title, text, empty=False) for title, text in words.items()}
    check_each("results", results, check_kind, Mapping, least=0)
    if example is not None and not (isinstance(example, tuple | list) and len(example) == 2):
        raise TypeError(f"example must be (contexts, question), got {brief(example)}")
    if example is not None:
        check_each("the example's contexts", example[0], _check_said)
        _check_said("the example's question", example[1])
    lacking = [row for row in results if set(_RESULT) - set(row)]
    if lacking:
        raise ValueError(f"every result needs {', '.join(_RESULT)}; got {sorted(lacking[0])}")
    if example is not None and tokenizer is None:
        raise ValueError("an example needs the tokenizer")
    base, answer = causal_model_of(model), None
    with replacing(folder, "ccm_adapter") as draft:
        model.save_pretrained(str(draft))
        settings = write_settings(draft, read_json(draft / SETTINGS))
        _check(settings, read_tensors(draft / WEIGHTS), base)
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
            license=words["license"],
            name=words["name"],
            base=hub_name(base),
            made_on=base_identity(model) | ({"tuned": words["trained_on"]} if words["trained_on"] else {}),
        )
    return Path(folder)


_RESULT = ("task", "dataset", "metric", "value", "baseline", "seeds")


def _check_said(name: str, value: Any) -> Any:
    """Text, or a message of text."""
    if not isinstance(value, Mapping):
        return check_text(name, value, empty=False)
    if set(value) != {"role", "content"}:
        raise ValueError(f"{name} must be text or {{'role', 'content'}}, got {brief(dict(value))}")
    return {key: check_text(f"{name}: {key}", value[key], empty=False) for key in ("role", "content")}


def _answer(model: Any, tokenizer: Any, code: Mapping[str, Any]) -> str:
    """What the code on the card prints."""
    memory = CompressedContextMemory(model, tokenizer)
    for context in code["contexts"]:
        memory.append(context)
    return str(memory.generate(code["question"], max_new_tokens=code["new_tokens"], do_sample=False))


def push_adapter(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    *,
    about: Mapping[str, Any] | None = None,
    **options: Unpack[PushOptions],
) -> CommitInfo:
    """Upload adapter and card in one commit.

    Args:
        model: `PeftModel` with an active CCM adapter.
        repo_id: Hub name.
        tokenizer: needed for an example.
        about: keyword arguments of `save_adapter`.
        options: of `publishing.artifacts.push_folder`.

    Returns:
        The commit, as every upload of the Hub's client; as text its URL.
    """
    values = {"name": repo_id, **(optional(check_kind, "about", about, Mapping) or {})}
    return push_saved(lambda folder: save_adapter(model, folder, tokenizer, **values), repo_id, **options)


# what PEFT raises on settings and weights of something else
_UNFIT = (RuntimeError, LookupError, TypeError, AttributeError, OSError, ValueError, ArithmeticError, re.error)


def load_adapter(base: Any, source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> Any:
    """`PeftModel.from_pretrained` of a CCM adapter, after its files were checked; weights in pickles are refused.

    Raises:
        ValueError: no CCM adapter there, one with NaN among its weights, or one that was trained on another model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    check_kind("base", base, torch.nn.Module, "load it with AutoModelForCausalLM, or see load_ccm")
    folder, about = fetch(source, "ccm_adapter", revision=revision, token=token)
    check_base(about.get("base"), base, folder)
    try:
        weights = read_tensors(folder / WEIGHTS)
        _check(read_json(folder / SETTINGS), weights, base)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        lacking = set(get_peft_model_state_dict(model)) - set(weights)
        if lacking:  # PEFT only warns, and leaves them as they were made
            raise ValueError(f"it lacks the weights {sorted(lacking)[0]!r:.120} and {len(lacking) - 1} more")
        return model
    except _UNFIT as error:
        raise ValueError(
            f"{folder} holds no adapter that fits this {type(base).__name__} ({type(error).__name__}: {told(error, 300)}); "
            "load its own base model, or get it again"
        ) from error


_DTYPES = ("float32", "bfloat16", "float16")


class LoadedCCM(NamedTuple):
    """What `load_ccm` gives."""

    model: Any
    tokenizer: Any
    memory: CompressedContextMemory


def load_ccm(
    source: str | Path,
    base: Any = None,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> LoadedCCM:
    """Base model, tokenizer, adapter and an empty memory, from the adapter's name alone.

    Args:
        source: folder or Hub name of a CCM adapter.
        base (`str` or `PreTrainedModel`, optional): Hub name or folder of the base model, or the model; default the one that
            the adapter names.
        tokenizer (optional): needed with a loaded `base` where contexts are text; else the base model's.
        dtype (`torch.dtype` or its name, optional): `float32`, `bfloat16` or `float16` for the base model's weights; default
            the one that it was trained in.
        device (optional): where to put the model; default where it is.
        revision, token: of the Hub.

    Returns:
        `(model, tokenizer, memory)`: a `PeftModel` in evaluation mode and a `CompressedContextMemory` of one user.

    Raises:
        ValueError: no CCM adapter there, one that names no base model on the Hub, or a base that it was not trained on.
        HubError: the adapter cannot be read.

    Example:
        >>> model, tokenizer, memory = load_ccm("me/chat-ccm")  # doctest: +SKIP
        >>> memory.append("Anna lives in Oslo.")  # doctest: +SKIP
        >>> memory.generate("Where does Anna live?", max_new_tokens=16)  # doctest: +SKIP
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if base is not None and not isinstance(base, str | Path):
        check_kind("base", base, torch.nn.Module, "give a Hub name, a folder or a causal language model")
    optional(check_tokenizer, "tokenizer", tokenizer)
    dtype = optional(
        check_choice, "dtype", str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype, _DTYPES
    )
    device = optional(check_device, "device", str(device) if isinstance(device, torch.device) else device, here=True)
    folder, about = fetch(source, "ccm_adapter", revision=revision, token=token)
    safe = True if base is None else None  # a name that a stranger's record gives brings no pickle
    if base is None:
        base = base_of(folder, about)
        if base is None:
            raise ValueError(
                f"the adapter in {source} names no base model on the Hub; give base=... (a name, a folder or the model)"
            )
    if isinstance(base, str | Path):
        named = str(check_path("base", base))
        trained_in = about["code"].get("dtype")
        dtype = dtype or (trained_in if trained_in in _DTYPES else "auto")
        try:
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(named, token=token)
            base = AutoModelForCausalLM.from_pretrained(named, dtype=dtype, token=token, use_safetensors=safe)
        except (OSError, ValueError) as error:  # what transformers says of names and folders that hold no model
            raise ValueError(
                f"base={named!r:.200} cannot be loaded ({told(error, 200)}); give another name or folder"
            ) from error
    model = load_adapter(base if device is None else base.to(device), folder)
    return LoadedCCM(model, tokenizer, CompressedContextMemory(model, tokenizer))


def base_of(source: str | Path, about: Mapping[str, Any] | None = None) -> str | None:
    """Hub name of the model that an adapter was trained on; None where it has none.

    Args:
        source: folder of the adapter, or its Hub name.
        about: its record, where that was read already.
    """
    if about is None:
        about = fetch(source, "ccm_adapter")[1]
    wrote = about.get("base")
    name = wrote.get("name") if isinstance(wrote, dict) else about["code"].get("model")
    return name if isinstance(name, str) and name != MODEL and looks_like_repo(name) else None


def _check(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Any) -> None:
    """What PEFT would build from the settings is what the file holds and fits the base model, before it is built."""
    check_finite(tensors, MAX_VALUE)
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"it is made for the task {settings['task_type']!r:.40}")
    sizes = [max(_sizes(name, tensor, base)) for name, tensor in tensors.items() if ".lora_A." in name]
    for kind, most in (("r", max(sizes, default=0)), ("lora_alpha", MAX_VALUE)):
        patterns = settings.get("rank_pattern" if kind == "r" else "alpha_pattern") or {}
        for value in (settings.get(kind), *patterns.values()):
            if isinstance(value, bool) or not isinstance(value, int if kind == "r" else int | float):
                raise ValueError(f"{kind} is {value!r:.40}, no number")
            if not 0 < value <= most:
                raise ValueError(f"{kind} is {value!r:.40}, and must be in (0, {most}]")
        _check_patterns(patterns)
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = settings.get(name)
        _check_patterns([value] if isinstance(value, str) else value or ())
    ids, count = settings.get("comp_token_ids"), settings.get("num_comp_tokens")
    if ids is not None and (not isinstance(ids, list) or not ids or ids != [*range(ids[0], ids[0] + len(ids))]):
        raise ValueError(f"comp_token_ids are {ids!r:.80}, needed are ids in a row")
    held = [len(tensor) for name, tensor in tensors.items() if name.endswith("lora_comp_embeddings") and tensor.ndim]
    if held != [count] or (ids is not None and len(ids) != count):
        raise ValueError(f"it holds {held} compression tokens, its settings say {count!r:.40}")


def _sizes(name: str, tensor: Tensor, base: Any) -> tuple[int, int]:
    """Rank and width of one matrix A (r, in), if the module that it is named after takes `in` numbers."""
    module = base.get_submodule(name.removeprefix("base_model.model.").split(".lora_A.")[0])
    widths = [module.in_features] if hasattr(module, "in_features") else list(module.weight.shape)
    if tensor.ndim < 2 or tensor.shape[1] not in widths:
        raise ValueError(f"{name!r:.120} has shape {tuple(tensor.shape)}, the module takes {widths}")
    return int(tensor.shape[0]), int(tensor.shape[1])


_MANY, _REPEATED = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")


def _check_patterns(names: Iterable[Any]) -> None:
    """Names of modules, or expressions for them that end soon: PEFT matches each with every module's name."""
    for name in names:
        if not isinstance(name, str) or len(name) > 1_000 or len(_MANY.findall(name)) > 3 or _REPEATED.search(name):
            raise ValueError(f"{name!r:.80} may take forever to compare with a module's name; list the modules by name")
