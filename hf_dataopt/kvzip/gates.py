"""Learned gates: KVzip's scores foretold while a context is read, so that compression costs no second pass.

The story: texts of any kind are read and scored by KVzip (`gate_fit.py`); a small network per layer (`gate_network.py`) learns,
from what the layer's attention is given, the logarithm of these scores (Eq. 8.2). Afterwards a context is scored as it is read,
and evicted as it is read (`streaming.py`), by one budget over all layers and heads (section 8.4.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from safetensors.torch import save_file

from .._compat import causal_model_of, text_config
from ..checkpoint import locked
from ..progress import told
from ..publishing.artifacts import fetch, push_saved
from ..publishing.identity import check_identity, identity, weight_digest
from ..publishing.kinds import MODEL
from ..publishing.record import check_version, known_settings
from ..publishing.safe_files import MAX_VALUE, check_finite, read_tensors
from ..publishing.writer import finish, replacing
from ..routing.verdicts import evaluating
from ..settings import (
    check_config,
    check_flag,
    check_int,
    check_kind,
    check_path,
    check_tensor,
    check_text,
    check_tokenizer,
    optional,
)
from ..text.positions import warn_beyond_positions
from .config import KVzipConfig
from .gate_fit import GateConfig, fit_gates
from .gate_network import GateWeights, gate_scores
from .images import ContextImages
from .prefill import prefill
from .prompt import KVzipPrompt
from .proof import prove
from .reading import PrefilledContext, check_supported
from .streaming import read_within_budget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import CommitInfo, EvalResult
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..publishing.hub import PushOptions

_FILE = "gates.safetensors"
_ABOUT = ("score", "texts", "tokens", "held_texts", "held_tokens", "texts_hash", "loss", "agreement", "source")


class KVzipGates:
    """Gates of one model: which key-value pairs matter, known from the hidden states alone.

    Args:
        weights (`GateWeights`): of all layers.
        config (`GateConfig`): how they were fitted.
        made_by (`dict`): the model they belong to (see `publishing.identity`).
        about (`dict`): what they were fitted on, and how far they agree with KVzip on texts that were held back.

    Source: section 8.3.2 for the scores that are learned, section 8.4.1 for the budget; the gates themselves are not in the
        dissertation (later work of its authors gates KVzip by hidden states too).
    Cost: two small products per layer and token, about 2 % of a prefill.

    Example:
        >>> from hf_dataopt import KVzipCache
        >>> gates = KVzipGates.fit(model, tokenizer, [context, context[::-1]], progress=False)
        >>> cache = KVzipCache.from_context(model, tokenizer, context, keep_ratio=0.3, gates=gates, progress=False)
        >>> cache.nbytes < cache.full_nbytes
        True
    """

    def __init__(
        self, weights: GateWeights, config: GateConfig, made_by: dict[str, Any], about: dict[str, Any] | None = None
    ) -> None:
        check_kind("weights", weights, GateWeights)
        check_kind("config", config, GateConfig)
        check_kind("made_by", made_by, dict)
        optional(check_kind, "about", about, dict)
        self.weights, self.config, self.made_by, self.about = weights, config, made_by, dict(about or {})

    def __repr__(self) -> str:
        sizes = f"{self.weights.layers} layers x {self.weights.heads} heads"
        return f"{type(self).__name__}({sizes}, model={self.made_by.get('name')!r})"

    @property
    def digest(self) -> str:
        """16 hex digits that tell these weights from others, the same once they were saved and read."""
        return weight_digest(self.weights.stored.items())

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        config: GateConfig | None = None,
        *,
        scoring: KVzipConfig | None = None,
        checkpoints: str | Path | None = None,
        source: str = "texts of their author's",
        progress: bool = True,
    ) -> KVzipGates:
        """Fit gates to KVzip's own scores.

        Args:
            model (`PreTrainedModel`): as for `KVzipCache.from_context`.
            tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
            texts (sequence of `str`): at least two of any kind, some 1,000 to 2,000 tokens each; prose, code and records
                together serve contexts of all kinds. Each is read whole, as one context.
            config (`GateConfig`, optional): size and training.
            scoring (`KVzipConfig`, optional): how texts are read and scored; any score that has a name can be learned.
            checkpoints (`str` or `Path`, optional): folder for unfinished work; a run that was stopped goes on there, and
                another model, text or setting starts that part afresh.
            source (`str`): what the texts are, for the card.
            progress (`bool`, default `True`): show an estimate and bars.

        Returns:
            The gates; the same for the same model, texts and settings.

        Raises:
            UnsupportedModelError: see `KVzipCache.from_context`; or attention whose input cannot be seen.
            TypeError, ValueError: fewer than two texts, or one that cannot be a context.
            FolderInUseError: another job is writing to `checkpoints`.

        Cost: two to three prefills of the texts and `steps` small steps; 16 bits for every hidden value of all layers and
            tokens in memory.
        """
        config = check_config(config, GateConfig)
        scoring = check_config(scoring, KVzipConfig, "scoring")
        folder, progress = optional(check_path, "checkpoints", checkpoints), check_flag("progress", progress)
        check_text("source", source)
        check_supported(model)
        check_tokenizer("tokenizer", tokenizer)
        made_by = identity(model)
        with nullcontext() if folder is None else locked(folder):
            fitted = fit_gates(
                model, tokenizer, texts, config, scoring, made_by=made_by["weights"], folder=folder, progress=progress
            )
        return cls(fitted.weights, config, made_by, {**fitted.about, "source": source})

    def check(self, model: Any) -> None:
        """Refuse a model that these gates were not fitted on.

        Raises:
            ValueError: other sizes, dtype or weights, or other layers and heads.
        """
        check_supported(model)
        check_identity(self.made_by, identity(model), "these gates", "fit them again")
        proof, scored = prove(model), check_supported(model)
        if len(scored) != self.weights.layers or any(proof.shapes[i][0] != self.weights.heads for i in scored):
            raise ValueError(
                f"these gates have {self.weights.layers} layers of {self.weights.heads} heads, the model {len(scored)} of "
                f"{sorted({proof.shapes[i][0] for i in scored})}; fit them again"
            )

    def score(self, layer: int, given: torch.Tensor) -> torch.Tensor:
        """What one layer's gate says of hidden states.

        Args:
            layer: its place among the scored layers.
            given: (n, width), what its attention is given.

        Returns:
            (KV heads, n) float32, logarithms of scores, higher stays.

        Raises:
            ValueError: another width.
        """
        layer = check_int("layer", layer, 0, self.weights.layers - 1)
        check_tensor("given", given, ("tokens", "width"))
        if given.shape[-1] != self.weights.width:
            raise ValueError(
                f"the gates read {self.weights.width} values a token, this layer is given {given.shape[-1]}"
            )
        return gate_scores(self.weights.of(layer, given.device), given[None].float())[0].T.contiguous()

    def prefill(
        self,
        model: PreTrainedModel,
        prompt: KVzipPrompt,
        config: KVzipConfig | None = None,
        *,
        images: ContextImages | None = None,
        progress: bool = True,
    ) -> tuple[PrefilledContext, torch.Tensor]:
        """The full cache and what the gates say of it, so that one prefill serves several budgets.

        Args:
            model, prompt, config, images, progress: as `prefill.prefill`.

        Returns:
            The full cache, and scores (scored layers, KV heads, context tokens) float32 for `KVzipCache.from_scores`.

        Raises:
            ValueError: another model than the one that the gates were fitted on.
        """
        self.check(model)
        optional(check_kind, "config", config, KVzipConfig)
        scored = check_supported(model)
        pieces: list[list[torch.Tensor]] = [[] for _ in scored]

        def on_input(layer: int, given: torch.Tensor) -> None:
            place = scored.index(layer)
            pieces[place].append(self.score(place, given))

        prefilled = prefill(model, prompt, config, images=images, on_input=on_input, progress=progress)
        first = pieces[0][0].device
        scores = torch.stack([torch.cat(found, dim=1).to(first) for found in pieces])
        return prefilled, scores[:, :, prefilled.n_prefix :]

    def read(
        self, model: PreTrainedModel, prompt: KVzipPrompt, config: KVzipConfig, *, progress: bool = True
    ) -> list[Any]:
        """Layers of a compressed cache of a text, evicted as it is read; see `streaming.read_within_budget`.

        Raises:
            ValueError: see `check`, or a budget that the prefix alone exceeds.
        """
        check_kind("prompt", prompt, KVzipPrompt, "give what build_prompt returned")
        check_kind("config", config, KVzipConfig)
        progress = check_flag("progress", progress)
        self.check(model)
        warn_beyond_positions(text_config(model), prompt.ids.numel(), "the context with its prompt")
        with evaluating(causal_model_of(model)):
            return read_within_budget(model, prompt, config, prove(model), self.score, progress=progress)

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> Path:
        """Write the gates, 16 bits a weight, and a card.

        Args:
            folder: made if missing; an earlier save in it is replaced as a whole.
            license: of the gates; otherwise the card names none, or a push takes the model's.

        Returns:
            The folder: `gates.safetensors`, `hf_dataopt.json` and a card.

        Raises:
            ValueError: NaN or infinity among the weights, or gates that do not know their model.
        """
        license = optional(check_text, "license", license, empty=False)
        _check_record(self.made_by, self.about)
        stored = self.weights.stored
        check_finite(stored, MAX_VALUE)
        name = self.made_by["name"] or MODEL
        agreement = self.about.get("agreement", {})
        with replacing(folder, "kvzip_gates") as draft:
            save_file(stored, str(draft / _FILE))
            finish(
                draft,
                "kvzip_gates",
                about={
                    "model": self.made_by,
                    "config": json.loads(self.config.to_json_string()),
                    "fit": self.about,
                },
                metadata={
                    "license": license,
                    "base_model": self.made_by["name"],
                    "tags": ["kv-cache", "kvzip"],
                    "model_name": "KVzip gates",
                    "eval_results": _results(agreement),
                },
                code={"model": name, "dtype": self.made_by["dtype"]},
                origin=None if self.made_by["name"] is None else ("model", name),
                name="KVzip gates",
                base=name,
                layers=self.weights.layers,
                heads=self.weights.heads,
                hidden=self.config.hidden,
                fit={key: self.about.get(key, "kvzip" if key == "score" else "unknown") for key in _ABOUT},
                agreement=agreement,
                settings=self.config.to_json_string(),
            )
        return Path(folder)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> KVzipGates:
        """Read what `save_pretrained` wrote, from a folder or the Hub.

        Args:
            source: folder or Hub name.
            revision, token: of the Hub.

        Returns:
            The gates, for the model that they were fitted on (checked when they are used).

        Raises:
            ValueError: no gates there, or tensors that do not fit together.
            HubError: the repository cannot be read.
        """
        folder, about = fetch(source, "kvzip_gates", revision=revision, token=token)
        tensors = read_tensors(folder / _FILE)
        newer = check_version(about, folder)
        if newer:
            own = {field.name for field in fields(GateWeights)}
            tensors = {name: tensor for name, tensor in tensors.items() if name in own}
        try:
            check_finite(tensors, MAX_VALUE)
            if not all(tensor.is_floating_point() for tensor in tensors.values()):
                raise ValueError("weights that are no floats")
            names = (field.name for field in fields(GateConfig))
            config = GateConfig.from_json_string(known_settings(about["config"], names, newer))
            weights = GateWeights.whole({name: tensor.float() for name, tensor in tensors.items()}, config.hidden)
            made_by, fit = about["model"], about["fit"]
            _check_record(made_by, fit)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no whole gates ({type(error).__name__}: {told(error)}); get them again, or fit them again"
            ) from error
        return cls(weights, config, made_by, fit)

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Unpack[PushOptions]) -> CommitInfo:
        """Upload the gates in one commit; options as `publishing.artifacts.push_folder`."""
        return push_saved(lambda folder: self.save_pretrained(folder, license=license), repo_id, **options)


def _results(agreement: Mapping[str, Any]) -> list[EvalResult] | None:
    """Agreement with KVzip on the texts that were held back, as the Hub lists results."""
    from huggingface_hub import EvalResult

    rows = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-back-texts",
            dataset_name="texts that were held back",
            metric_type="agreement",
            metric_name=f"share of what KVzip keeps at {ratio} that the gates keep too",
            metric_value=share,
        )
        for ratio, share in agreement.items()
    ]
    return rows or None


def _check_record(made_by: Any, about: Any) -> None:
    """What a save needs to know of the model, and what its card shows of the fit."""
    if not isinstance(made_by, dict) or not isinstance(about, dict):
        raise ValueError("no record of the model or the fit")
    if not isinstance(made_by.get("dtype"), str) or not isinstance(made_by.get("name", 0), str | None):
        raise ValueError("these gates do not know their model; made_by must be what publishing.identity.identity gives")
    if not isinstance(about.get("agreement", {}), dict):
        raise ValueError("the agreement of the fit is no object of budgets and shares")
