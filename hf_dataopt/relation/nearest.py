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
_TINY = np.finfo(np.float32).tiny
_BLOCK = 65_536
_MANY = 4  # times k: so many pairs a row, and the strongest are picked instead
_WAITING = 512  # pairs that wait at most before they are put into the lists


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
    Cost: 8 n (k + 1) bytes; about 10 ms per 512 x 512 tile of rows with themselves, 0.2 ms in the others.
    """

    def __init__(self, count: int, neighbours: int, level: float, voters: NDArray[np.bool_]) -> None:
        self.level, self.voters = level, voters
        self.keys = torch.zeros((count, max(1, min(neighbours, count - 1))), dtype=torch.int64)
        self.parent = torch.arange(count)
        self._least = np.empty(count, np.float32)
        self.begin()

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, once settled."""
        return {"keys": self.keys, "parent": self.parent}

    def look(self, cosine: Tensor, here: Index, there: Index, *, same: bool) -> None:
        """Take what counts out of one tile.

        Args:
            cosine: (a, b) of `here` against `there`; read only.
            here, there: (a,), (b,) row numbers.
            same: both sides are the same rows.
        """
        self._look(cosine, here, there, same=same, link=True)
        if not same:
            self._look(cosine.T, there, here, same=False, link=False)

    def _look(self, cosine: Tensor, here: Index, there: Index, *, same: bool, link: bool) -> None:
        """What counts for the rows `here`. Few rows of a tile have anything above what they hold: only those are read."""
        low = np.minimum(self._least[here], np.float32(self.level))
        local = np.flatnonzero(cosine.amax(dim=1).float().cpu().numpy() >= low)
        if not len(local):
            return
        some = torch.from_numpy(local).to(cosine.device)
        part = cosine if len(local) == len(here) else cosine.index_select(0, some)
        i, j = _places(part >= torch.from_numpy(low[local, None]).to(part.device))
        if len(i) > _MANY * self.keys.shape[1] * len(local):
            i, j = self._strongest(part, here[local], there, same=same, link=link)
        similarity = part[i, j].float().cpu().numpy()
        rows, columns = here[local[i]], there[j]
        copies = similarity > np.float32(self.level)
        if copies.any():
            if link:
                self._link(rows[copies], columns[copies])
            rows, columns, similarity = rows[~copies], columns[~copies], similarity[~copies]
        near = self.voters[columns]
        if same:
            near &= rows != columns
        self._pending.append((rows[near], columns[near], similarity[near]))
        self._waiting += len(rows)
        if self._waiting > _WAITING:
            self.settle()

    def begin(self, rows: Index | slice = slice(None)) -> None:
        """Tiles of these rows follow; what was looked at since `settle` is forgotten, the lists may be of an earlier run."""
        self._pending: list[tuple[Index, Index, NDArray[np.float32]]] = []
        self._waiting = 0
        self._least[rows] = self._reached(self.keys.numpy()[rows, 0])

    def settle(self) -> None:
        """Put what was looked at into the lists."""
        if not self._pending:
            return
        rows, columns, similarity = (np.concatenate(part) for part in zip(*self._pending, strict=True))
        self._pending, self._waiting = [], 0
        keys, width = self.keys.numpy(), self.keys.shape[1]
        new = (similarity.view(np.int32).astype(np.int64) << 32) | (_LOW - columns)
        larger = np.flatnonzero(similarity >= self._least[rows])
        order = larger[np.argsort(rows[larger], kind="stable")]
        which, start, counts = np.unique(rows[order], return_index=True, return_counts=True)
        if not len(which):
            return
        table = np.zeros((len(which), counts.max()), np.int64)
        table[np.repeat(np.arange(len(which)), counts), np.arange(len(order)) - np.repeat(start, counts)] = new[order]
        held = np.concatenate([keys[which], table], axis=1)
        keys[which] = best = np.partition(held, held.shape[1] - width, axis=1)[:, -width:]
        self._least[which] = self._reached(best[:, 0])

    @staticmethod
    def _reached(keys: Index) -> NDArray[np.float32]:
        """The cosine that a new neighbour must reach where these are the first, and least, of full lists; else just above 0."""
        return np.maximum((keys >> 32).astype(np.int32).view(np.float32), _TINY)

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
        self.settle()
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

    def _strongest(self, cosine: Tensor, here: Index, there: Index, *, same: bool, link: bool) -> tuple[Index, Index]:
        """Places of the k largest of every row, where too many count to look at each; copies are linked here and are none."""
        kept, k = cosine.float().clone(), min(self.keys.shape[1], len(there))
        if same:
            kept.masked_fill_(torch.from_numpy(here[:, None] == there).to(kept.device), -1)
        copies = kept > self.level
        if bool(copies.any()):
            if link:
                apart = torch.from_numpy(self._root(here)[:, None] != self._root(there)).to(kept.device)
                i, j = _places(copies & apart)
                self._link(here[i], there[j])
            kept.masked_fill_(copies, -1)
        if not self.voters[there].all():
            kept.masked_fill_(~torch.from_numpy(self.voters[there]).to(kept.device), -1)
        if kept.device.type == "cpu":  # a sort is seven times as fast there as torch's topk
            least = torch.from_numpy(np.sort(kept.numpy(), axis=1)[:, -k])
        else:
            least = kept.topk(k, dim=1).values[:, -1]
        return _places(kept >= least.clamp(min=torch.finfo(kept.dtype).tiny)[:, None])

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


def _places(mask: Tensor) -> tuple[Index, Index]:
    """Rows and columns of what is true."""
    if mask.device.type != "cpu":
        i, j = mask.nonzero(as_tuple=True)
        return i.cpu().numpy(), j.cpu().numpy()
    flat = np.flatnonzero(mask.numpy())
    return flat // mask.shape[1], flat % mask.shape[1]


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
    Cost: 2 n d operations for each of 256 rows.
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

            for stripe in stripes:
                for there in work.blocks(stripe):
                    apart = 1 - work.cosine(left, work.right(there)).float()
                    apart.masked_fill_(apart <= rounding, 2)
                    torch.minimum(least, apart.amin(dim=1).cpu(), out=least)
            nearest.append(least.numpy())
        distances = np.concatenate([distances, *nearest])

    for start in range(0, len(drawn), source.tile_rows):
        work.attempt(partial(measure, drawn[start : start + source.tile_rows]))
    return float(1 - max(rounding, COPY * float(np.median(distances))))
