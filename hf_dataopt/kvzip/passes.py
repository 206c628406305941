"""One forward behind the full cache whose attention is shown to a score; nothing is ever appended to the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicLayer

from ..routing.dispatch import tag
from ..routing.layer_inputs import LayerInputs
from .attention import attend, merge
from .ragged_attention import attend_ragged
from .reading import OwnCache
from .rules import AttentionRules, no_autocast, same_dtype

# how one layer shows its attention: (index, queries (1, H, q, d), log-sum-exp (1, H, q), keys and values (heads, n, d), rules)
Look = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AttentionRules], None]


class AllSeen(Exception):  # noqa: N818 - not an error
    """The last layer was shown; what the model would compute after it is not needed."""


@dataclass(frozen=True)
class View:
    """What one forward sees of the cache, in tokens; spans are (start, end).

    Args:
        seen: cached tokens that the forward goes on behind.
        near: spans under the softmax of the score.
        far: more spans, that the forward attends to.
        scored: the span whose pairs are scored.
        softmax_keys: `"all"`: the far spans are under the softmax of the score too.
        skipped: tokens before the new ones that are not among the seen ones.
        rest: the forward attends to what layers hold of these (`turns.HeldLayer`), with the far spans.
    """

    seen: int
    near: list[tuple[int, int]]
    far: list[tuple[int, int]]
    scored: tuple[int, int]
    softmax_keys: str = "chunk"
    skipped: int = 0
    rest: bool = False

    @classmethod
    def of_chunk(cls, n_prefix: int, start: int, end: int, total: int, *, local: bool, softmax_keys: str) -> View:
        """For the repeat input of the chunk [start, end) of the cache; `local`: with nothing but prefix and chunk in sight."""
        # prefix and chunk are neighbours in the first chunk: one kernel instead of two
        near = [(0, end)] if start == n_prefix else [(0, n_prefix), (start, end)]
        far = [] if local else [(n_prefix, start), (end, total)]
        return cls(total, _filled(near), _filled(far), (start, end), softmax_keys)

    @classmethod
    def of_context(cls, start: int, n_prefix: int, total: int) -> View:
        """For the tokens from `start` on, read again: all pairs of the context are scored."""
        return cls(start, _filled([(0, start)]), [], (n_prefix, total))


def _filled(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in spans if end > start]


class PassCache(OwnCache):
    """The full cache seen by one forward, with what each layer's attention module is given, where somebody asks."""

    def __init__(self, layers: list[Any], inputs: LayerInputs | None = None) -> None:
        super().__init__(layers)
        self.inputs = inputs
        self.given: dict[int, tuple[Any, torch.Tensor]] = {}

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """As `RoutedCache.update`."""
        if self.inputs is not None:
            given = self.inputs.take(layer_idx)
            if given is not None and given.shape[0] == 1:
                self.given[layer_idx] = self.inputs.module, given[0].detach()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class PassLayer(DynamicLayer):
    """One layer of a `PassCache`: attends over what the view sees and the new tokens, and shows its attention on the way.

    Args:
        full: the layer of the full cache.
        index: of the layer.
        latent: what is cached are latents, which the model expands to keys and values of all heads (MLA).
        view: of the pass.
        look: is shown the attention.
        last: nothing is needed behind this layer.
        in_parts: the tokens come in more than one forward, and the first parts' keys are kept for the later ones.
    """

    def __init__(
        self, full: Any, index: int, latent: bool, view: View, look: Look, last: bool, in_parts: bool = False
    ) -> None:
        super().__init__()
        self.full, self.index, self.latent = full, index, latent
        self.view, self.look, self.last, self.in_parts = view, look, last, in_parts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new tokens to the model, behind the seen latents where it expands these."""
        if self.in_parts:
            key_states, value_states = super().update(key_states, value_states)
        if not self.latent:
            return tag(key_states, self), value_states
        seen = self._seen
        keys = torch.cat([self.full.keys[:, :, :seen], key_states], 2)
        return tag(keys, self), torch.cat([self.full.values[:, :, :seen], value_states], 2)

    def get_seq_length(self) -> int:
        """Tokens that the forward goes on behind."""
        return self.view.seen + self.view.skipped + self._earlier

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks cover the new tokens only."""
        return self._earlier + query_length, self.view.seen + self.view.skipped

    @property
    def _seen(self) -> int:
        """Cached tokens that are handed to the model where it expands latents."""
        return self.view.seen + getattr(self.full, "more", 0)

    @property
    def _earlier(self) -> int:
        """Tokens of earlier parts."""
        return self.keys.shape[2] if self.is_initialized and self.keys is not None else 0

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scale: float,
        expanded: bool,
        **options: Any,
    ) -> torch.Tensor:
        """Output (1, H, q, v) of the new tokens."""
        rules, view = AttentionRules.of(scale, options), self.view
        if torch.is_grad_enabled() and not query.requires_grad:  # the first layer of a model whose weights are frozen
            query = query.detach().requires_grad_()
        cached = (key, value) if expanded else (self.full.keys, self.full.values)
        new = (key[:, :, self._seen :], value[:, :, self._seen :]) if expanded else (key, value)
        a, b = view.scored

        def show(result: tuple[torch.Tensor, torch.Tensor]) -> None:
            lse = rules.with_sinks(result)[1].detach()
            self.look(self.index, query.detach(), lse, cached[0][0, :, a:b], cached[1][0, :, a:b], rules)
            if self.last:
                raise AllSeen

        with no_autocast(query.device):
            fast = torch.is_grad_enabled() and rules.softcap is None and rules.sinks is None and not view.rest
            with torch.set_grad_enabled(torch.is_grad_enabled() and not fast):
                rows, earlier = query.shape[2], new[0].shape[2] - query.shape[2]
                now = (part[:, :, earlier:] for part in new)
                result = attend(*same_dtype(query, *now), causal=rows > 1, **rules.options)
                result = _joined(result, query, new, [(0, earlier)] if earlier else [], rules)
                result = _joined(result, query, cached, view.near, rules)
                if view.softmax_keys == "chunk":
                    show(result)
                result = _joined(result, query, cached, view.far, rules)
                if view.rest and self.full.rest is None:
                    result = _joined(result, query, cached, [(view.seen, self._seen)], rules)
                elif view.rest:
                    result = merge(result, attend_ragged(query, self.full.rest, **rules.options))
                if view.softmax_keys == "all":
                    show(result)
            if fast:
                return _with_gradient(query, new, cached, view.near + view.far, rules)
            return rules.with_sinks(result)[0]


def _joined(
    result: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    cached: tuple[torch.Tensor, torch.Tensor],
    spans: list[tuple[int, int]],
    rules: AttentionRules,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp once these spans of the cache are seen too."""
    for start, end in spans:
        part = cached[0][:, :, start:end], cached[1][:, :, start:end]
        result = merge(result, attend(*same_dtype(query, *part), **rules.options))
    return result


def _with_gradient(
    query: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    cached: tuple[torch.Tensor, torch.Tensor],
    spans: list[tuple[int, int]],
    rules: AttentionRules,
) -> torch.Tensor:
    """The same output in one kernel that has a derivative, which our own, with its log-sum-exp, has not."""
    rows, group = query.shape[2], query.shape[1] // new[0].shape[1]
    keys, values = (
        torch.cat([*(old[:, :, a:b] for a, b in spans), one], dim=2).repeat_interleave(group, dim=1)
        for old, one in zip(cached, new, strict=True)
    )
    visible = torch.ones(rows, keys.shape[2], dtype=torch.bool, device=query.device).tril(keys.shape[2] - rows)
    query, keys, values = same_dtype(query, keys, values)
    return scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=rules.scale)
