"""KVzip, chapter 8: compress a context's cache once, answer any number of questions from it.

The story: encode the context (`prefill.prefill`), let the model repeat it and keep the attention each pair receives
(`scoring.score_context`, Eq. 8.2), keep the top share over all layers and heads (`eviction.keep_mask`, section 8.4.1), and
free the rest. What stays is ragged, so the layers of the cache (`layers.py`) compute their own attention.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from .._compat import causal_model_of, copied_layer, decoder_of
from ..publishing.artifacts import push_saved
from ..publishing.identity import check_identity, identity
from ..routing.attach import attach, detach
from ..routing.cache import RoutedCache
from ..routing.inputs import CallInputs
from ..routing.layer_inputs import LayerInputs, deaf, watch
from ..settings import brief, check_config, check_kind, check_tokenizer, optional
from .config import KVzipConfig, with_ratio
from .gates import KVzipGates
from .layers import KVzipLayer, Padding, expect_batch, mover
from .making import compress, evict
from .prompt import KVzipPrompt
from .questions import ids_of_questions, padded_behind
from .reading import USER, PrefilledContext, check_supported
from .rows import Rows, compress_rows
from .saved import load_cache, save_cache
from .scored_by import ScoredBy
from .sizes import Sizes
from .standing import ears, keep_within, score_tokens
from .turns import compress_again

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from ..publishing.hub import HubOptions, PushOptions

Question = str | dict[str, Any] | Sequence[Any] | torch.Tensor


class KVzipCache(ScoredBy, Sizes, RoutedCache):
    """A context's compressed key-value cache for `generate`, made once and reused for any question.

    Build it with `from_context` (or `from_scores`), then give each request its own `fork()`. `get_seq_length()` is the
    logical length: positions go on where the full context ended, although each layer and head stores its own number of
    pairs. The evicted pairs are freed.

    Args:
        layers (`list`): one cache layer per model layer.
        prompt (`KVzipPrompt`): token sequences of the compressed context.
        config (`KVzipConfig`): how it was compressed.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, optional): lets `inputs` take questions as text.
        made_by (`dict`, optional): which model made it (see `publishing.identity`); needed to save it.

    Source: chapter 8; what differs: `KVzipConfig`, `scoring.score_context`.
    Cost: memory of `nbytes`; a decoded token attends to the kept pairs only.

    Example:
        >>> cache = KVzipCache.from_context(model, tokenizer, context, keep_ratio=0.3, progress=False)
        >>> output = model.generate(**cache.inputs("Where does Anna live?"), max_new_tokens=4)
        >>> cache.nbytes < cache.full_nbytes
        True
    """

    counts_positions = True
    padded = False  # whether padding stands among what came after the context
    heard: LayerInputs | None = None  # of one call
    rows: Rows | None = None  # of several contexts; `prompt` is the first one's then

    def __init__(
        self,
        layers: list[Any],
        prompt: KVzipPrompt,
        config: KVzipConfig,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        made_by: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(layers, list) or not layers:
            raise TypeError(
                f"layers must be a list, one cache layer per model layer, got {brief(layers)}; use from_context"
            )
        check_kind("prompt", prompt, KVzipPrompt)
        check_kind("config", config, KVzipConfig)
        optional(check_tokenizer, "tokenizer", tokenizer)
        optional(check_kind, "made_by", made_by, dict)
        if not any(isinstance(layer, KVzipLayer) for layer in layers):
            raise TypeError("layers hold none that was compressed; use KVzipCache.from_context or from_scores")
        super().__init__(layers)
        self.prompt, self.config, self.tokenizer, self.made_by = prompt, config, tokenizer, made_by
        # layers as they stand right after compression; forks and `reset` start from copies of them
        self._pristine = [copied_layer(layer) for layer in layers]

    @classmethod
    def from_context(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        context: str | dict[str, Any] | Sequence[Any],
        keep_ratio: float | None = None,
        *,
        config: KVzipConfig | None = None,
        head_scores: torch.Tensor | None = None,
        gates: KVzipGates | None = None,
        progress: bool = True,
    ) -> KVzipCache:
        """Prefill, score and evict in one go.

        Args:
            model (`PreTrainedModel`): a causal language model with global-attention layers; a probe of a few tokens on first
                use of its class shows whether a cache that evicts nothing is the plain cache.
            tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): its tokenizer, or for images its processor; the chat
                template gives prefix and suffix.
            context (`str`, content parts, or a user's message): what later questions are about. Parts are
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`, with an image as the processor takes it.
            keep_ratio (`float`, in (0, 1], optional): overrides the one in `config`.
            config (`KVzipConfig`, optional): all other settings.
            head_scores (`torch.Tensor` (scored layers, KV heads), optional): static importance of every head (see
                `head_scores.py`): no scoring pass, whole heads are kept or dropped (section 8.4.2).
            gates (`KVzipGates`, optional): score while reading: no scoring pass. Text is then evicted piece by piece as it is
                read (`prefill_chunk_size`; with `max_kv_tokens` a fifth of that budget, so that the full cache never exists);
                images and `level="head"` need the whole context first.
            progress (`bool`, default `True`): show bars.

        Returns:
            The compressed cache.

        Raises:
            UnsupportedModelError: nothing to evict, the probe found a difference, or images whose tokens the model does not
                place one after the other (Qwen-VL); nothing else was computed.
            TypeError, ValueError: a bad context or setting.

        Cost: about two prefills (`replay="exact"`: two to three; `gates`: one).
        """
        config = with_ratio(config, keep_ratio)
        if head_scores is not None:
            config = replace(config, level="head")
        layers, prompt = compress(
            model, tokenizer, context, config, head_scores=head_scores, gates=gates, progress=progress
        )
        return cls._of(layers, prompt, config, tokenizer, model, gates)

    @classmethod
    def from_contexts(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        contexts: Sequence[str | dict[str, Any] | Sequence[Any]],
        keep_ratio: float | None = None,
        *,
        config: KVzipConfig | None = None,
        gates: KVzipGates | None = None,
        progress: bool = True,
    ) -> KVzipCache:
        """One cache for a batch of different contexts: each row has its own, and its own question.

        Args:
            contexts (sequence): each as for `from_context`, each with a budget of its own.
            model, tokenizer, keep_ratio, config, gates, progress: as for `from_context`.

        Returns:
            A cache whose `inputs` takes a list of as many questions. It cannot be saved or compressed again.

        Raises:
            UnsupportedModelError: see `from_context`; or latents (MLA), linear attention or attention in chunks.

        Source: section 8.4.1 (variable-length attention): rows are more heads of one ragged context.
        Cost: that of compressing one after the other; a decoded token of all rows is one attention call a layer.

        Example:
            >>> cache = KVzipCache.from_contexts(model, tokenizer, [context, "Bo lives in Bergen."], 0.5, progress=False)
            >>> inputs = cache.inputs(["Where does Anna live?", "And Bo?"])
            >>> model.generate(**inputs, max_new_tokens=4).shape[0]
            2
        """
        config = with_ratio(config, keep_ratio)
        layers, rows = compress_rows(model, tokenizer, contexts, config, gates, progress=progress)
        cache = cls._of(layers, rows.prompts[0], config, tokenizer, model, gates)
        cache.rows = rows
        return cache

    @classmethod
    def from_scores(
        cls,
        prefilled: PrefilledContext,
        scores: torch.Tensor,
        config: KVzipConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        free: bool = False,
    ) -> KVzipCache:
        """Evict by scores that are already there, so that one prefill serves several budgets.

        Args:
            prefilled (`PrefilledContext`): the full cache.
            scores (`torch.Tensor` (scored layers, KV heads, context tokens)): importance, higher stays.
            config (`KVzipConfig`, optional): budget, level and ties.
            tokenizer (`PreTrainedTokenizerBase`, optional): lets `inputs` take questions as text.
            free (`bool`, default `False`): release each layer of the full cache as soon as it is compressed; `prefilled`
                is then used up.

        Returns:
            The compressed cache.

        Raises:
            ValueError: scores that do not fit the cache, or a cache that was used up.
        """
        config = check_config(config, KVzipConfig)
        optional(check_tokenizer, "tokenizer", tokenizer)
        layers = evict(prefilled, scores, config, free=free)
        return cls._of(layers, prefilled.prompt, config, tokenizer, prefilled.model)

    @classmethod
    def _of(
        cls, layers: list[Any], prompt: KVzipPrompt, config: KVzipConfig, tokenizer: Any, model: Any, gates: Any = None
    ) -> KVzipCache:
        cache = cls(layers, prompt, config, tokenizer, identity(model))
        cache._prepare(model)
        if gates is not None:
            cache.score_by(gates)
        return cache

    def save_pretrained(self, folder: str | Path, *, license: str | None = None) -> None:
        """Write the compressed context to a folder; see `saved.save_cache`."""
        save_cache(self, folder, license=license)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **hub: Unpack[HubOptions],
    ) -> KVzipCache:
        """A saved cache from a folder or the Hub, for the model that made it; see `saved.load_cache`."""
        check_supported(model)
        optional(check_tokenizer, "tokenizer", tokenizer)
        layers, prompt, config, made_by, scored_by = load_cache(source, model, **hub)
        cache = cls(layers, prompt, config, tokenizer, made_by)
        cache.scored_by = scored_by
        cache.attach(model)
        return cache

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> CommitInfo:
        """Upload the compressed context, its text included, in one commit; see `publishing.artifacts.push_folder`."""
        return push_saved(self.save_pretrained, repo_id, **options)

    def attach(self, model: PreTrainedModel) -> None:
        """Prepare another instance of the same model for this cache (`from_context` prepares its own).

        Raises:
            UnsupportedModelError: see `from_context`.
            ValueError: the model has other layers than the cache, or other weights than the one that made it.
        """
        if check_supported(model) != self.scored_layers:
            raise ValueError(
                "the model's global-attention layers are not those of this cache; use the model that made it"
            )
        if self.made_by is not None:
            check_identity(self.made_by, identity(model), "this cache")
        self._prepare(model)

    @staticmethod
    def detach(model: Any) -> None:
        """Take what KVzip put on a model off again; caches are refused there until one of them is attached.

        Args:
            model: the model of `from_context` or `attach`, wrapped or not. What CCM needs stays.
        """
        detach(check_kind("model", model, torch.nn.Module), USER)

    def _prepare(self, model: Any) -> None:
        attach(model, USER)
        self.made_for(causal_model_of(model), decoder_of(model))
        if self.config.standing:
            watch(decoder_of(model))

    def check_model(self, module: Any) -> None:
        """Refuse to answer for another model: its keys would be read as this one's.

        Raises:
            ValueError: a model of other sizes or weights than the one that made this cache.
        """
        if self.knows(module) or self.made_by is None:
            return
        owner = module if hasattr(module, "get_decoder") else None
        if owner is None:
            raise ValueError(
                f"this cache was not made by this {type(module).__name__}; call `cache.attach(model)` with the whole model"
            )
        self.attach(owner)  # a copy of the model, or one that was loaded again, has the same weights

    def view(self, module: Any, tokens: Any, attention_mask: Any) -> RoutedCache:
        """As `RoutedCache.view`; layers that are kept whole learn of the batch and of its padding.

        Raises:
            DroppedTokensError: a mask that hides tokens of the context.
            ValueError: a padded batch on layers in which padding would change what a token sees.
        """
        view: Any = super().view(module, tokens, attention_mask)
        padding = Padding.of_call(attention_mask)
        if self.rows is not None:
            self.rows.check(tokens.shape[0], attention_mask)
        elif padding is not None:
            padding.check_context(self.ids.shape[1])
        view.padded = self.padded or padding is not None
        view.heard = ears(view.layers, self.config, self.gates, tokens.shape[0], padding)
        expect_batch(view.layers, tokens.shape[0], padding)
        return view

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """As `RoutedCache.update`; a standing budget scores the tokens."""
        if self.heard is not None and layer_idx in self.scored_layers:
            score_tokens(self.layers, layer_idx, self.heard, self.gates)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def close(self) -> RoutedCache:
        """As `RoutedCache.close`; a standing budget is cut to."""
        origin = super().close()
        if isinstance(origin, KVzipCache) and origin.heard is not None:
            deaf()
            origin.heard = None
            keep_within(origin.layers, self.config, self.prompt.prefix_ids.numel())
        return origin

    @property
    def known_ids(self) -> torch.Tensor:
        """`ids`: what full prompts begin with."""
        return self.ids

    def fork(self) -> KVzipCache:
        """A cache for one request: the compressed context shared, not copied; what follows it starts empty."""
        other = copy.copy(self)
        other.reset()
        return other

    def moved_to(self, where: str | torch.device | PreTrainedModel) -> KVzipCache:
        """A copy elsewhere, with what was read since: into the host's memory between requests, and back before the next.

        (Accelerate calls whatever has a `to` on the way into a model, and answers would go into that copy.)

        Args:
            where: a device, or the model, each of whose layers then finds its part where it computes.

        Returns:
            Another cache, sharing what is there already. Drop this one to free what it holds.

        Raises:
            TypeError, ValueError: neither a device nor a language model, or a device that is not there.

        Example:
            ```python
            cache = cache.moved_to("cpu")  # the accelerator is free
            output = model.generate(**cache.moved_to(model).inputs(question))
            ```
        """
        other, move = copy.copy(self), mover(where)
        other._pristine, other.layers = move(self._pristine), move(self.layers)
        return other

    def inputs(self, question: Question) -> CallInputs:
        """Everything `generate` needs for questions about the context: `model.generate(**cache.inputs(question))`.

        Args:
            question (`str`, message, list of these, or `torch.Tensor`): text goes into the user's turn, after the context.
                A list whose entries are all dicts is ONE conversation: its first message, the user's, goes on with that
                turn, later ones are rendered by the chat template, and the last is answered. Any other list is a batch of
                `str` and lists of messages, padded between context and question. A message's content is a `str` or text
                parts. A tensor holds the ids of one question, (q,) or (1, q) int64, or a full prompt that starts with the
                context's ids.

        Returns:
            `input_ids` (B, context + question), `attention_mask` of the same shape, and a fresh fork under the keyword that
            the installed transformers wants (`past_key_values`, or `cache` from 5.24 on; the returned dict knows both).

        Raises:
            TypeError: neither text, messages nor ids.
            ValueError: empty question, text without a tokenizer, or a conversation that cannot be rendered.
        """
        if self.rows is None:
            rows = ids_of_questions(question, self.prompt, self.tokenizer, self.config)
            ids, mask = padded_behind(self.ids[0], rows)
        else:
            ids, mask = self.rows.inputs(question, self.tokenizer, self.config)
        return CallInputs(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), cache=self.fork())

    def compress_again(
        self,
        keep_ratio: float | None = None,
        *,
        max_kv_tokens: int | None = None,
        model: PreTrainedModel | None = None,
        progress: bool = True,
    ) -> None:
        """Cut the context and what was said about it since to one budget, so that a conversation stays small.

        The turns become part of what is compressed: `ids`, `fork` and `reset` stand behind them from now on, and text or
        messages given to `inputs` go on where the last answer ended. Other forks stay as they are.

        Args:
            keep_ratio (`float`, in (0, 1], optional): share that stays of all pairs ever read behind the prompt, context
                and turns, evicted or not: what is gone counts, and does not come back. All that is held stays where that
                is less.
            max_kv_tokens (`int`, optional): that budget instead (see `KVzipConfig`); by default the one in `config`.
            model (`PreTrainedModel`, optional): by default the one that the cache was made with, while it lives.
            progress (`bool`, default `True`): show a bar.

        Raises:
            ValueError: pairs without scores (from a file without them), tokens without ids, a batch or padding behind the
                context, turns of a score that ranks a context as a whole (H2O, SnapKV, ...), or a budget that is none.

        Source: sections 8.3 and 8.4.1: pairs keep their scores, so without turns the result is that of compressing once; turns
            are scored as the context was, by repeating them or by the cache's gates (`turns.py`).
        Cost: as for scoring a context of the turns' length (gates: one forward over them); scores take 4 bytes a kept pair.

        Example:
            >>> cache = KVzipCache.from_context(model, tokenizer, context, keep_ratio=0.3, progress=False)
            >>> inputs = cache.inputs("Where does Anna live?")
            >>> output = model.generate(**inputs, max_new_tokens=4)
            >>> talk = inputs["cache"]
            >>> talk.compress_again(0.2, progress=False)
            >>> talk.ids.shape[1] == output.shape[1] - 1  # the last token was not read
            True
        """
        self._pristine, self.prompt, self.config = compress_again(self, keep_ratio, max_kv_tokens, model, progress)
        self.reset()

    def reset(self) -> None:
        """Back to the compressed context: all that came after it is forgotten."""
        self.layers = self.pristine_layers
        self.read_ids, self.padded = None, False

    @property
    def pristine_layers(self) -> list[Any]:
        """The layers as they stood right after compression; their tensors are shared."""
        return [copied_layer(layer) for layer in self._pristine]

    @property
    def ids(self) -> torch.Tensor:
        """Ids of prefix, context and compressed turns, (1, n) int64, which full prompts start with; a row a context."""
        return self.prompt.ids[None] if self.rows is None else self.rows.ids
