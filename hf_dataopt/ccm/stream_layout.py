"""A stream in one parallel forward: what `StreamingContextMemory` does step by step, for training (Figures 7.8 and 7.9).

A text [x1 x2 ...] gets its compression tokens where the stream would compress, and each of those sees what the stream shows
it: sink, memory and the tokens that it compresses. Between two compressions the stream holds [sink | memory | recent]; the
recent tokens keep their distances, but sink and memory move up behind them every time, so that one key has as many positions
as there are compressions. They are extra key-value columns, one set per compression, turned to where they then stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .attention import Layout
from .config import CCMConfig
from .rotation import Rotation


def stream_order(n_tokens: int, sizes: Mapping[str, int], n_tok: int) -> list[int]:
    """Tokens read before each compression, as `StreamingContextMemory.feed` has it; none that no token follows."""
    read, size, slots = 0, 0, 0
    found: list[int] = []
    while True:
        read += sizes["max_kv"] + 1 - size
        if read >= n_tokens:
            return found
        found.append(read)
        grown = min(slots + n_tok, sizes["memory_size"])
        size, slots = sizes["max_kv"] + 1 - sizes["compress_tokens"] + grown - slots, grown


def stream_row(ids: Sequence[int], config: CCMConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A text with its compression tokens.

    Args:
        ids: of the text.
        config: with `stream`.

    Returns:
        Ids, positions and labels, each (n,) int64. Positions are those of the text, and compression tokens stand behind the
        tokens that they compress; labels on every token but the first and those right behind compression tokens.

    Source: Figures 7.8 and 7.9.
    """
    sizes, comp = config.stream or {}, list(config.comp_token_ids or [])
    found: list[int] = []
    positions: list[int] = []
    start = 0
    for group, end in enumerate([*stream_order(len(ids), sizes, len(comp)), len(ids)]):
        if group:
            found += comp
            behind = sizes["sink"] + group * sizes["compress_tokens"]
            positions += range(behind, behind + len(comp))
        found += ids[start:end]
        positions += range(start, end)
        start = end
    tokens = torch.tensor(found)
    is_comp = tokens >= comp[0]
    unlearned = is_comp | is_comp.roll(1)
    unlearned[0] = True
    return tokens, torch.tensor(positions), tokens.masked_fill(unlearned, -100)


def is_stream(comp: torch.Tensor, position_ids: torch.Tensor) -> bool:
    """Whether compression tokens (B, T) stand before text that was read already, as in a stream and nowhere else."""
    before = (comp[:, 1:] == 0) & (comp[:, :-1] < 0)
    return bool((before & (position_ids[:, 1:] <= position_ids[:, :-1])).any())


def build_stream_layout(
    comp: torch.Tensor, real: torch.Tensor, position_ids: torch.Tensor, config: CCMConfig, rotation: Rotation
) -> Layout:
    """Who sees whom in rows of `stream_row`, and where sink and memory stand between two compressions.

    Args:
        comp: (B, T) int64, index of the compression token, -1 for text.
        real: (B, T) bool, False for padding (on the right).
        position_ids: (B, T) int64, of `stream_row`.
        config: with `stream`.
        rotation: of the model.

    Returns:
        The layout.

    Source: Figures 7.8 and 7.9. Cost: O(B T^2) bools, and (sink + memory_size) key-value columns per compression.
    """
    sizes, n_tok = config.stream or {}, config.num_comp_tokens
    sink, piece, most = sizes["sink"], sizes["compress_tokens"], sizes["memory_size"]
    is_comp, text = (comp >= 0) & real, (comp < 0) & real
    last = is_comp & (comp == n_tok - 1)
    step = last.long().cumsum(1) - last.long()  # compressions that ended before this token
    low = torch.where(step > 0, sink + piece * step, 0)  # the oldest recent token of each query
    high = torch.where(is_comp, sink + piece * (step + 1), comp.shape[1])
    where = position_ids[:, None, :]
    own = text[:, None, :] & (where >= low[:, :, None]) & (where < high[:, :, None])
    own = own | (is_comp[:, :, None] & is_comp[:, None, :] & (step[:, :, None] == step[:, None, :]))
    count = int(step.max())
    s = torch.arange(1, count + 1, device=comp.device)[:, None]
    i = torch.arange(sink + most, device=comp.device)[None]
    slots = (n_tok * s).clamp(max=most)
    texts = torch.argsort((~text).long(), dim=1, stable=True)  # text first, in order; then the rest
    comps = torch.argsort((~is_comp).long(), dim=1, stable=True)
    first = i.expand(count, -1).clamp(max=comp.shape[1] - 1)
    held = (n_tok * s - slots + i - sink).clamp(0, comp.shape[1] - 1)
    source = torch.where(i < sink, texts[:, first], comps[:, held]).flatten(1)
    shift = (piece * s - slots + i).flatten() - position_ids.gather(1, source)
    seen = (i < sink + slots).flatten() & (step[:, :, None] == s.expand(-1, sink + most).flatten())
    return Layout(own, torch.zeros_like(own), slots=seen, source=source, shift=shift, rotation=rotation)
