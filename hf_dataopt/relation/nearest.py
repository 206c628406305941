"""The nearest rows of every row, and which rows are copies of each other, gathered from the tiles that sum the relations.

Both read f f^T before compatibility, cut-off and power: one pass over the upper triangle serves the sums and this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .. import distributed
from ..seeding import generator
from .tiles import Index, Source, Workspace

COPY = 0.15  # share of the usual distance to the nearest row within which two rows are copies
CLOSE = 0.3  # or the share of both rows' distances to the SCALE-th nearest,
SCALE = 10
CLOSEST = 0.5  # if it is also within this share of the usual distance
SAMPLE = 256  # rows that the usual distance is measured on
_ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}  # cosine distance of a row to itself
_LOW = (1 << 32) - 1
_BLOCK = 65_536


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows of every row, and groups of copies.

    Args:
        rows: (n, k) int64 row numbers, nearest first; -1 where there are fewer. Labelled rows that are no copies of the row.
        similarity: (n, k) float32 cosines, 0 where there are fewer.
        group: (n,) int64, the smallest row number among the copies of a row; its own where it has none.
    """

    rows: Index
    similarity: NDArray[np.float32]
    group: Index


class NearestRows:
    """Collects from the tiles of one symmetric pass; every pair of rows is looked at once.

    Args:
        count: n.
        neighbours: k.
        level: rows with a larger cosine are copies: they form groups and are no neighbours of each other. Pairs that stand
            out among their neighbours join the groups at the end.
        voters: (n,) rows that may be neighbours; copies are found among all.

    Differs: not in the dissertation. A neighbour is kept as one integer, the bits of its cosine above those of its row
        number, so that equal cosines are told apart alike in any order of tiles and on any number of processes.
    Cost: 8 n (k + 1) bytes; about 10 ms per 512 x 512 tile in the first one of a stripe, under 1 ms in the others.
    """

    def __init__(self, count: int, neighbours: int, level: float, voters: NDArray[np.bool_]) -> None:
        self.level, self.voters = level, voters
        self.keys = torch.zeros((count, max(1, min(neighbours, count - 1))), dtype=torch.int64)
        self.parent = torch.arange(count)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"keys": self.keys, "parent": self.parent}

    def look(self, cosine: Tensor, here: Index, there: Index, *, same: bool) -> None:
        """Take what counts out of one tile.

        Args:
            cosine: (a, b) of `here` against `there`; read only.
            here, there: (a,), (b,) row numbers.
            same: both sides are the same rows.
        """
        least_i, least_j = self._least(here), self._least(there)
        level = torch.tensor(self.level, dtype=torch.float32)
        lows = [torch.minimum(torch.from_numpy(one), level).to(cosine.device) for one in (least_i, least_j)]
        found = (cosine >= lows[0][:, None]) | (cosine >= lows[1][None, :])
        i, j = found.nonzero(as_tuple=True)
        if len(i) > 4 * self.keys.shape[1] * sum(cosine.shape):
            i, j = self._strongest(cosine, here, there, same)
        similarity = cosine[i, j].float().cpu().numpy()
        own, other = i.cpu().numpy(), j.cpu().numpy()
        rows, columns = here[own], there[other]
        apart = rows != columns if same else np.ones(len(rows), bool)
        copies = (similarity > self.level) & apart
        self._link(rows[copies], columns[copies])
        near = apart & ~copies
        self._add(here, own[near], columns[near], similarity[near])
        if not same:
            self._add(there, other[near], rows[near], similarity[near])

    def forget_shared(self, order: Index, tile: int, mine: range) -> None:
        """Drop pairs that another process reports too: those within stripes that are not `mine`."""
        stripe = np.empty(len(order), np.int64)
        stripe[order] = np.arange(len(order)) // tile
        keys, owned = self.keys.numpy(), np.isin(np.arange(stripe.max() + 1), list(mine))
        for start in range(0, len(keys), _BLOCK):
            block, own = keys[start : start + _BLOCK], stripe[start : start + _BLOCK, None]
            inner = stripe[np.minimum(_LOW - (block & _LOW), len(order) - 1)] == own
            block[inner & ~owned[own]] = 0

    def result(self, device: torch.device) -> Neighbours:
        """What was found, over all processes."""
        world = distributed.world_size()
        if world > 1:
            for start in range(0, len(self.keys), _BLOCK):
                part = self.keys[start : start + _BLOCK]
                held = torch.zeros((world, *part.shape), dtype=torch.int64)
                held[distributed.rank()] = part
                every = distributed.sum_over_processes(held, device).transpose(0, 1).reshape(len(part), -1)
                part.copy_(every.topk(part.shape[1], dim=1).values)
            held = torch.zeros((world, len(self.parent)), dtype=torch.int64)
            held[distributed.rank()] = self.parent
            for one in distributed.sum_over_processes(held, device).numpy():
                self._link(np.arange(len(one)), one)
        keys = -np.sort(-self.keys.numpy(), axis=1)
        rows = np.where(keys > 0, _LOW - (keys & _LOW), -1)
        similarity = (keys >> 32).astype(np.int32).view(np.float32)
        self._link(*self._outstanding(rows, similarity))
        return Neighbours(rows, similarity, self._root(np.arange(len(keys))))

    def _outstanding(self, rows: Index, similarity: NDArray[np.float32]) -> tuple[Index, Index]:
        """Pairs that lie far closer to each other than either does to its other neighbours: pictures encoded again."""
        width = rows.shape[1]
        if width < SCALE:
            return rows[:0, 0], rows[:0, 0]
        apart = 1 - similarity
        usual = np.where(rows[:, SCALE - 1] >= 0, apart[:, SCALE - 1], 0)
        near = (apart < CLOSE * usual[:, None]) & (apart < CLOSEST * (1 - self.level) / COPY) & (rows >= 0)
        near &= apart < CLOSE * usual[rows]
        return near.nonzero()[0], rows[near]

    def _least(self, rows: Index) -> NDArray[np.float32]:
        """The cosine that a new neighbour of a row must reach; just above 0 while there are fewer than k."""
        least = (self.keys.numpy()[rows].min(axis=1) >> 32).astype(np.int32).view(np.float32)
        return np.maximum(least, np.finfo(np.float32).tiny)

    def _strongest(self, cosine: Tensor, here: Index, there: Index, same: bool) -> tuple[Tensor, Tensor]:
        """Pairs of a tile that holds too many to look at each: the k largest of both sides, and copies to hold on to."""
        k, kept = self.keys.shape[1], cosine.clone()
        if same:
            kept.fill_diagonal_(-1)
        copies = kept > self.level
        firsts = [(copies.any(side), copies.to(torch.int8).argmax(side)) for side in (1, 0)]
        kept.masked_fill_(copies, -1)
        pairs = []
        for side, voters in ((1, self.voters[there]), (0, self.voters[here])):
            one = kept.masked_fill(~torch.from_numpy(voters).to(kept.device).unsqueeze(1 - side), -1)
            near = one.topk(min(k, one.shape[side]), dim=side).indices
            own = torch.arange(one.shape[1 - side], device=one.device).unsqueeze(side).expand_as(near)
            has, first = firsts[1 - side]
            mine = torch.cat([own.reshape(-1), has.nonzero()[:, 0]])
            other = torch.cat([near.reshape(-1), first[has]])
            pairs.append((mine, other) if side == 1 else (other, mine))
        flat = torch.cat([i * kept.shape[1] + j for i, j in pairs]).unique()
        return flat // kept.shape[1], flat % kept.shape[1]

    def _add(self, rows: Index, local: Index, columns: Index, similarity: NDArray[np.float32]) -> None:
        """Pairs into the lists of `rows[local]`."""
        fits = self.voters[columns] & (similarity > 0)
        local, columns, similarity = local[fits], columns[fits], similarity[fits]
        keys = self.keys.numpy()
        new = (similarity.view(np.int32).astype(np.int64) << 32) | (_LOW - columns)
        larger = new > keys[rows].min(axis=1)[local]
        local, new = local[larger], new[larger]
        order = np.argsort(local, kind="stable")
        which, start, counts = np.unique(local[order], return_index=True, return_counts=True)
        if not len(which):
            return
        table = np.zeros((len(which), counts.max()), np.int64)
        table[np.repeat(np.arange(len(which)), counts), np.arange(len(new)) - np.repeat(start, counts)] = new[order]
        held = np.concatenate([keys[rows[which]], table], axis=1)
        width = keys.shape[1]
        keys[rows[which]] = np.partition(held, held.shape[1] - width, axis=1)[:, -width:]

    def _root(self, rows: Index) -> Index:
        parent = self.parent.numpy()
        roots = parent[rows]
        while (parent[roots] != roots).any():
            roots = parent[roots]
        return roots

    def _link(self, left: Index, right: Index) -> None:
        """Make one group of the groups of each pair, named by its smallest row."""
        if not len(left):
            return
        names, place = np.unique(np.concatenate([self._root(left), self._root(right)]), return_inverse=True)
        pairs = coo_matrix((np.ones(len(left)), (place[: len(left)], place[len(left) :])), shape=(len(names),) * 2)
        _, component = connected_components(pairs, directed=False)
        least = np.full(component.max() + 1, len(self.parent))
        np.minimum.at(least, component, names)
        self.parent.numpy()[names] = least[component]


def apart(parts: list[Index], nears: list[Neighbours], count: int) -> Neighbours:
    """The nearest rows of all partitions, by their numbers in the whole."""
    width = max(near.rows.shape[1] for near in nears)
    rows, similarity, group = (
        np.full((count, width), -1),
        np.zeros((count, width), np.float32),
        np.empty(count, np.int64),
    )
    for part, near in zip(parts, nears, strict=True):
        here = slice(0, near.rows.shape[1])
        rows[part, here] = np.where(near.rows >= 0, part[near.rows], -1)
        similarity[part, here], group[part] = near.similarity, part[near.group]
    return Neighbours(rows, similarity, group)


def copy_level(source: Source, stripes: list[Index], seed: int) -> float:
    """The cosine above which two rows of these features are copies.

    Args:
        source: a relation graph.
        stripes: all its rows, a tile at a time.
        seed: draws the rows that are measured.

    Returns:
        One minus `COPY` times the median cosine distance of a row to the nearest that is not the same to rounding.

    Differs: not in the dissertation; relative to how close rows usually lie, as a trained model may put all rows of a class
        within a thousandth of each other.
    Cost: 2 n (d + C) operations for each of 256 rows.
    """
    count = sum(map(len, stripes))
    drawn = torch.randperm(count, generator=generator(seed, epoch=2))[:SAMPLE].numpy()
    rounding, work = _ROUNDING[source.dtype], Workspace(source, source)
    distances = np.empty(0, np.float32)

    def measure(rows: Index) -> None:
        nonlocal distances
        nearest = []
        for here in work.blocks(rows):
            left, least = work.left(here), torch.full((len(here),), 2.0)

            def look(cosine: Tensor, least: Tensor = least) -> None:
                apart = 1 - cosine.float()
                apart.masked_fill_(apart <= rounding, 2)
                torch.minimum(least, apart.amin(dim=1).cpu(), out=least)

            for stripe in stripes:
                for there in work.blocks(stripe):
                    work.kernel(left, work.right(there), look)
            nearest.append(least.numpy())
        distances = np.concatenate([distances, *nearest])

    for start in range(0, len(drawn), source.tile_rows):
        work.attempt(partial(measure, drawn[start : start + source.tile_rows]))
    return float(1 - max(rounding, COPY * float(np.median(distances))))
