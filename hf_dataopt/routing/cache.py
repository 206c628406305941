"""Caches whose layers answer attention themselves, and the contract that every call with one is held to."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from transformers import Cache

from .._compat import copied_layer
from ..errors import DroppedTokensError
from ..versions import describe
from .dispatch import PENDING


class RoutedCache(Cache):
    """A cache for models that `attach` has prepared.

    A forward works on a `view` of it, which becomes the cache once the forward has come to its end: one that fails or is
    interrupted half-way leaves the cache as it was (`atomic`; not for caches that are thrown away then). The ids that were
    read are remembered, so that a later prompt can be held against them.

    Args:
        layers (`list`): one cache layer per model layer.
        layer_class_to_replicate (`type`, optional): of layers that come with the first forward; instead of `layers`.

    Raises:
        ValueError: used on a model that was not prepared; plain attention would silently see the new tokens only.
    """

    atomic = True
    # whether the hooks give calls without positions those behind the cache; some models keep the last request's otherwise
    counts_positions = False

    def __init__(self, layers: list[Any] | None = None, layer_class_to_replicate: type | None = None) -> None:
        super().__init__(layers=layers, layer_class_to_replicate=layer_class_to_replicate)
        self.opened_by: Any = None  # the module whose call this view belongs to
        self.origin: RoutedCache | None = None
        # (B, n) int64, what was read behind `known_ids`; False once something came in that has no ids
        self.read_ids: torch.Tensor | None | bool = None
        self._handed: int | None = None
        self._expected: int | None = None
        self._models: weakref.WeakSet[Any] = weakref.WeakSet()

    # -- what subclasses say of themselves ------------------------------------------------------------------------

    @property
    def known_ids(self) -> torch.Tensor | None:
        """(1, n) int64, the tokens that stand at the cache's start, for caches that full prompts begin with.

        (R, n) where R rows begin differently, and calls have a multiple of R rows.
        """
        return None

    def check_model(self, module: torch.nn.Module) -> None:
        """Refuse a module that this cache was not made for.

        Raises:
            ValueError: another model's module.
        """

    def made_for(self, *modules: torch.nn.Module) -> None:
        """Remember modules that this cache, its forks included, may be used on."""
        self._models.update(modules)

    def knows(self, module: torch.nn.Module) -> bool:
        """Whether `made_for` named this module."""
        return module in self._models

    # -- one call -------------------------------------------------------------------------------------------------

    def view(self, module: torch.nn.Module, tokens: Any, attention_mask: Any) -> RoutedCache:
        """What one forward of `module` may write to.

        Args:
            module: the outermost prepared module of the call.
            tokens: ids (B, n) int64 or embeddings (B, n, width) of the call.
            attention_mask: what the model was given.

        Returns:
            A cache over the same tensors, with layers of its own.

        Raises:
            DroppedTokensError, ValueError: tokens, mask and cache do not fit together, or another model's cache.
        """
        self.check_model(module)
        self.check_call(tokens.shape[1], attention_mask)
        view = copy.copy(self) if self.atomic else self
        view.opened_by, view.origin, view._handed = module, self if self.atomic else None, None
        view._expected = self.get_seq_length() + tokens.shape[1] if self.atomic else None
        view._read(tokens)
        return view

    def handed_on(self, kwargs: dict[str, Any]) -> None:
        """Look at what the whole model of a call hands to its decoder."""

    def close(self) -> RoutedCache:
        """Let the finished view's origin stand where the view stands.

        Returns:
            The cache that the view was made of.

        Raises:
            ValueError: keys of the last layer never reached our attention, or the model left the cache out.
        """
        self._check_answered()
        if self._expected is not None and self.get_seq_length() != self._expected:
            raise ValueError(
                "the model did not write its tokens into the cache, so it saw nothing of what is in there; layers leave caches "
                "out under gradient checkpointing: `model.gradient_checkpointing_disable()` or `model.eval()`"
            )
        origin = self if self.origin is None else self.origin  # by identity: a cache without layers is falsy
        self.origin = self.opened_by = None
        origin.__dict__.update(self.__dict__)
        return origin

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """As `Cache.update`, for a call that came through the hooks of `attach`."""
        self.check_open()
        self._check_answered()
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._handed = layer_idx
        layer = self.layers[layer_idx]
        PENDING.set((weakref.ref(layer), layer_idx) if getattr(layer, "waiting", False) else None)
        return keys, values

    def check_open(self) -> None:
        """Refuse keys of a model that was not prepared.

        Raises:
            ValueError: the call did not come through the hooks of `attach`.
        """
        if self.opened_by is None:
            raise ValueError(
                "this model does not route attention to the cache; call `cache.attach(model)` first, and give the forward "
                f"input_ids or inputs_embeds ({describe()})"
            )

    def _check_answered(self) -> None:
        handed = self.layers[self._handed : self._handed + 1] if self._handed is not None else []
        if handed and getattr(handed[0], "waiting", False):
            raise ValueError(
                f"layer {self._handed} computes its attention past transformers' attention functions, so it would see the "
                f"new tokens only; this model cannot use the cache ({describe()})"
            )

    def check_call(self, n_new: int, attention_mask: Any) -> None:
        """Refuse a forward whose tokens and mask do not continue the cache.

        Args:
            n_new: tokens of this forward.
            attention_mask: what the model was given: None, (B, cached + new), or ready masks (4-D, or a dict of them).

        Raises:
            DroppedTokensError: `generate` has cut or misread the prompt.
        """
        past = self.get_seq_length()
        advice = (
            "pass the full prompt ids (context first), or the new ids with a full-length attention_mask; "
            "`model.generate(**cache.inputs(question))` does it right"
        )
        if n_new == 0:
            raise DroppedTokensError(f"no token is left after the {past} cached ones: {advice}")
        flat = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
        if flat and attention_mask.shape[1] != past + n_new:
            raise DroppedTokensError(
                f"the attention mask covers {attention_mask.shape[1]} tokens, the cache {past} and the call {n_new}: {advice}"
            )

    def check_prompt(self, input_ids: torch.Tensor) -> None:
        """Check that full prompts begin with the tokens this cache stands for.

        Args:
            input_ids (`torch.Tensor` (B, n) int64): what you are going to pass to `generate` with a fork.

        Raises:
            DroppedTokensError: they do not; `generate` would replace your first tokens by the cached ones without a word.
        """
        if not self.begins(input_ids):
            raise DroppedTokensError(
                f"these ids do not start with the {self.get_seq_length()} tokens that the cache holds (`cache.ids`, and what "
                "this fork has read since); build the prompt as `torch.cat([cache.ids, question_ids], dim=1)`, use "
                "`cache.inputs(question)`, and a new `cache.fork()` for a new request"
            )

    def begins(self, input_ids: torch.Tensor) -> bool:
        """Whether ids (B, n) are those of the cache with at least one more behind them."""
        past, known = self.get_seq_length(), self.known_ids
        if known is None or input_ids.ndim != 2 or input_ids.shape[1] <= past:
            return False
        n, ids = known.shape[1], input_ids.cpu()
        if ids.shape[0] % known.shape[0] or not (ids[:, :n] == _each(known, ids)).all():
            return False
        read = self.read_ids
        if not isinstance(read, torch.Tensor):
            return True
        return ids.shape[0] % read.shape[0] == 0 and bool(
            (ids[:, n:past] == read.cpu().repeat_interleave(ids.shape[0] // read.shape[0], dim=0)).all()
        )

    def prepare(self, input_ids: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Look at what `generate` is about to cut for a forward, and cut what it forgets.

        Args:
            input_ids: (B, n) int64, full prompts or new ids.
            kwargs: of `prepare_inputs_for_generation`; `next_sequence_length` is set where full ids come uncut.

        Raises:
            DroppedTokensError: full prompts that do not begin with the cache's tokens.
        """
        if kwargs.get("inputs_embeds") is not None or self.known_ids is None:
            return
        if not kwargs.get("is_first_iteration"):
            # up to 5.22, `prefill_chunk_size` cuts full prompts from their start, whatever the cache holds
            if kwargs.get("next_sequence_length") is None and self._starts_again(input_ids):
                raise DroppedTokensError(
                    f"generate would read the context again behind itself; leave prefill_chunk_size out here ({describe()})"
                )
            return
        mask, past = kwargs.get("attention_mask"), self.get_seq_length()
        if kwargs.get("next_sequence_length") is not None:  # full prompts, in transformers' own opinion
            self.check_prompt(input_ids)
        elif mask is None or mask.shape[1] == input_ids.shape[1]:  # assisted decoding hands full prompts over whole
            if self.begins(input_ids):
                kwargs["next_sequence_length"] = input_ids.shape[1] - past
            elif mask is not None:
                self.check_prompt(input_ids)

    def _starts_again(self, input_ids: torch.Tensor) -> bool:
        known = self.known_ids
        n = min(input_ids.shape[1], 0 if known is None else known.shape[1])
        if not n or known is None or input_ids.shape[0] % known.shape[0]:
            return False
        return bool((input_ids[:, :n].cpu() == _each(known, input_ids)[:, :n]).all())

    def positions(self, n_new: int, attention_mask: Any) -> torch.Tensor:
        """Positions (B or 1, n_new) int64 of the next tokens: padding takes none."""
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            counted = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
            return counted[:, -n_new:]
        past = self.get_seq_length()
        return torch.arange(past, past + n_new)[None]

    # -- what has been read ---------------------------------------------------------------------------------------

    def _read(self, tokens: torch.Tensor) -> None:
        if self.known_ids is None:
            return
        if tokens.is_floating_point() or self.read_ids is False:
            self.read_ids = False
        elif isinstance(self.read_ids, torch.Tensor):
            before = self.read_ids.to(tokens.device)
            if tokens.shape[0] != before.shape[0] and tokens.shape[0] % before.shape[0] == 0:
                before = before.repeat_interleave(tokens.shape[0] // before.shape[0], dim=0)
            fits = before.shape[0] == tokens.shape[0]
            self.read_ids = torch.cat([before, tokens.detach()], dim=1) if fits else False
        else:
            self.read_ids = tokens.detach()

    def _reread(self, change: Any) -> None:
        if isinstance(self.read_ids, torch.Tensor):
            self.read_ids = change(self.read_ids)

    def crop(self, tokens_to_remove: int) -> None:
        """As `Cache.crop`, read ids included.

        Raises:
            ValueError: a positive number, which releases read in two ways.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes a negative number of tokens to remove, got {tokens_to_remove}; pass {-tokens_to_remove}"
            )
        super().crop(tokens_to_remove)
        n = abs(tokens_to_remove)
        if n:
            self._reread(lambda ids: ids[:, :-n] if n < ids.shape[1] else None)

    def reset(self) -> None:
        """As `Cache.reset`, read ids included."""
        super().reset()
        self.read_ids = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """As `Cache.reorder_cache`, read ids included."""
        super().reorder_cache(beam_idx)
        self._reread(lambda ids: ids.index_select(0, beam_idx.to(ids.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As `Cache.batch_repeat_interleave`, read ids included."""
        super().batch_repeat_interleave(repeats)
        self._reread(lambda ids: ids.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """As `Cache.batch_select_indices`, read ids included."""
        super().batch_select_indices(indices)
        self._reread(lambda ids: ids[indices.to(ids.device)])

    # -- copies ---------------------------------------------------------------------------------------------------

    def __copy__(self) -> RoutedCache:
        """A fork with the same tail: layers of its own over the same tensors, which no layer writes into."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = [copied_layer(layer) for layer in self.layers]
        other.opened_by = other.origin = None
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutedCache:
        """An independent cache with the same tail, for the same models, or for their copies if these are copied along."""
        other = copy.copy(self)
        other.layers, other.read_ids = copy.deepcopy(self.layers, memo), copy.deepcopy(self.read_ids, memo)
        other._models = weakref.WeakSet(memo.get(id(model), model) for model in self._models)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_models"} | {"opened_by": None, "origin": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._models = weakref.WeakSet()


def _each(known: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Known rows (R, n) as often as rows of a call (a multiple of R, m) ask for."""
    return known.repeat_interleave(ids.shape[0] // known.shape[0], dim=0)
