"""The relation graph over n rows, summed tile by tile: never an n x n matrix, never a copy of the features.

Rows are visited in the order of their labels, so that nearly every tile is all-agree or all-disagree and needs no label
compare; the symmetric pass visits the upper triangle only. Buffers are made once and reused.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import distributed
from ..checkpoint import PassCheckpoint
from ..progress import bar
from ..settings import check_array, check_int, check_kind, check_number, optional
from .config import RelationConfig
from .kernel import power_, sign_
from .nearest import NearestRows, copy_level
from .rows import Rows
from .tiles import (
    HELD,
    LARGEST_TILE,
    SMALLEST_TILE,
    ExactSums,
    Index,
    ReferenceSums,
    Tile,
    Workspace,
    signed_sums,
    sums_of,
)


class RelationGraph:
    """Features, probabilities and labels of n rows, and the sums over their relation values.

    Args:
        features: (n, d) rows; normalised while a tile is read, never in place.
        probs: (n, C) class probabilities; None drops the compatibility term.
        labels: (n,) integer labels; None gives the unsigned kernel (outlier scores).
        config: kernel, dtype, device, working memory.
        centre: (d,) vector taken off every feature first, optional.

    Raises:
        TypeError: no `Rows`, or no array of integers or floats.
        ValueError: lengths differ; NaN or infinite values; zero features; rows of `probs` that are no distribution.

    Source: sections 5.3.1 and 5.3.4.
    Cost: one pass over the inputs here; see `relation_sums` and `sums_against`.
    """

    def __init__(
        self,
        features: Rows,
        probs: Rows | None,
        labels: Index | None,
        config: RelationConfig,
        centre: NDArray[np.float32] | None = None,
    ) -> None:
        check_kind("features", features, Rows, "make them of an array with rows_of")
        optional(check_kind, "probs", probs, Rows, "make them of an array with rows_of")
        check_kind("config", config, RelationConfig)
        labels = optional(check_array, "labels", labels, 1, kinds="iu")
        centre = optional(check_array, "centre", centre, 1, kinds="f", rows=features.width)
        self.features, self.labels, self.config, self.centre = features, labels, config, centre
        self.probs = probs if config.compatibility else None
        self.device = torch.device(config.device or "cpu")
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.tile_rows, self.block_rows = self._pick_tile(), sys.maxsize
        for name, other in (("probs", self.probs), ("labels", labels)):
            if other is not None and len(other) != len(features):
                raise ValueError(f"features have {len(features)} rows but {name} {len(other)}; they must match")
        self.inverse_norm, self.key = self._check_rows()
        self.order: Index = np.arange(len(self)) if labels is None else np.argsort(labels, kind="stable")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def nbytes(self) -> int:
        """Working memory of a pass: a few slots of rows (read and converted), two tiles of products, and half-precision
        tiles where the products are not float32."""
        width = self.features.width + (self.probs.width if self.probs else 0)
        return self._bytes(self.tile_rows, width)

    def select(self, rows: Index) -> RelationGraph:
        """The graph over a subset of the rows, with the same settings; features are not copied."""
        probs = self.probs.select(rows) if self.probs else None
        labels = None if self.labels is None else self.labels[rows]
        return self._as_small(RelationGraph(self.features.select(rows), probs, labels, self.config, self.centre))

    def seconds_per_tile(self) -> float:
        """Measured time of one tile: reading, products, power and sums."""
        rows, work, taken = np.arange(min(self.tile_rows, len(self))), Workspace(self, self), [0.0, 0.0]

        def one() -> None:
            for block in work.blocks(rows):
                left = work.left(block)
                for other in work.blocks(rows):
                    kernel = power_(work.kernel(left, work.right(other)), self.config.temperature)
                    sums_of(kernel, 0), sums_of(kernel, 1)

        for k in range(2):
            start = time.perf_counter()
            work.attempt(one)
            taken[k] = time.perf_counter() - start
        return min(taken) * (self.tile_rows / len(rows)) ** 2

    def row(self, i: int, *, temperature: float | None = None, signed: bool = True) -> NDArray[np.float32]:
        """`r(i, j)` (Eq. 5.1) or the bare kernel for every j, 0 at j = i; (n,) float32."""
        i, values = check_int("i", i, 0, len(self) - 1), np.zeros(len(self), np.float32)
        given = optional(check_number, "temperature", temperature, 0, above=True)
        temperature = self.config.temperature if given is None else float(given)

        def add(kernel: Tensor, left: Tile, right: Tile, rows: Index, columns: Index) -> None:
            kernel = power_(kernel, temperature)
            if signed and left.labels is not None and right.labels is not None:
                kernel = sign_(kernel, left.labels, right.labels)
            values[columns] = kernel[0].cpu().numpy()

        job = _Pass(add, torch.empty(0), True, None, True)
        self._visit(job, self, np.array([i]), np.arange(len(self)), alone=True)
        return values

    def features_only(self) -> RelationGraph:
        """The graph of `s(f, f')` alone: no compatibility, no cut-off."""
        bare = replace(self.config, compatibility=False, edge_cutoff=0.0)
        return self._as_small(RelationGraph(self.features, None, self.labels, bare, self.centre))

    def _bytes(self, tile: int, width: int) -> int:
        copies = 1 if self.dtype == torch.float32 and self.device.type == "cpu" else 2
        return 4 * copies * ((HELD + 1) * tile * width + 2 * tile * tile)

    def _pick_tile(self) -> int:
        width = self.features.width + (self.probs.width if self.probs else 0)
        tile = LARGEST_TILE.get(self.device.type, 512)
        while tile > SMALLEST_TILE and self._bytes(tile, width) > self.config.max_memory_gb * 1e9:
            tile //= 2
        return min(tile, max(SMALLEST_TILE, len(self.features)))

    def _check_rows(self) -> tuple[NDArray[np.float32], dict[str, str]]:
        """Inverse norms, and a key of data and settings that a resumed run compares."""
        count = len(self)
        inverse = np.empty(count, np.float32)
        read = np.empty((self.tile_rows, self.features.width), np.float32)
        read_probs = None if self.probs is None else np.empty((self.tile_rows, self.probs.width), np.float32)
        digest = hashlib.blake2b(digest_size=16)
        for start in range(0, count, self.tile_rows):
            rows = np.arange(start, min(start + self.tile_rows, count))
            block = read[: len(rows)]
            self.features.take(rows, block)
            if self.centre is not None:
                block -= self.centre
            norms = np.sqrt(np.einsum("ij,ij->i", block, block, dtype=np.float32))
            _refuse(~np.isfinite(norms), start, "features hold NaN or infinite values; drop or repair these rows")
            _refuse(norms == 0, start, "features are all zero: they have no direction; drop these rows")
            inverse[rows] = 1 / norms
            digest.update(block.data)
            if self.probs is not None and read_probs is not None:
                block = read_probs[: len(rows)]
                self.probs.take(rows, block)
                total = block.sum(axis=1)
                wrong = ~(np.abs(total - 1) < 0.02) | (block.min(axis=1) < 0)
                _refuse(wrong, start, "probs are no probabilities (>= 0, sum 1); pass softmax outputs, not logits")
                digest.update(block.data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).data)
        widths = [count, self.features.width, self.probs.width if self.probs else 0]
        data = f"{digest.hexdigest()} {widths}"
        return inverse, {"data": data, "settings": f"tiles of {self.tile_rows}, {self.config.to_json_string()}"}

    def _stripes(self, rows: Index) -> list[Index]:
        return [rows[start : start + self.tile_rows] for start in range(0, len(rows), self.tile_rows)]

    def _as_small(self, other: RelationGraph) -> RelationGraph:
        """`other` with tiles no larger than those that the device had room for."""
        other.block_rows = min(other.block_rows, self.block_rows)
        return other

    def relation_sums(
        self,
        checkpoint: PassCheckpoint | None = None,
        *,
        nearest: NearestRows | None = None,
        outside: ReferenceSums | None = None,
        quiet: bool = False,
    ) -> NDArray[np.float64]:
        """`sum_j r(i, j)` for every row: minus the initial score of Algorithm 4, first loop.

        Args:
            checkpoint: where finished stripes are kept; a killed run goes on from there.
            nearest: is shown the products of every pair of rows on the way (`nearest_rows` makes one).
            outside: is shown the kernel of every pair of rows on the way.
            quiet: no progress bar.

        Returns:
            (n,) float64, equal on every process of a distributed run.

        Source: Algorithm 4, "caching initial score"; Eq. 5.1.
        Cost: n^2 (d + C) operations (half of the full products: the upper triangle), `nbytes` of memory.
        """
        stripes = self._stripes(self.order)
        mine = distributed.shard(len(stripes))
        done, sums = 0, ExactSums(len(self))
        watchers = _Watchers(nearest, outside)
        state = dict(zip(("sums", "rest"), sums.parts, strict=True)) | watchers.state
        found = checkpoint.load(len(mine), state) if checkpoint else None
        if found:
            done = found[0]
            for name, value in state.items():
                value.copy_(found[1][name])
        work = Workspace(self, self)
        with bar(sum(len(stripes) - s for s in mine), "Relation graph", unit="tile", disable=quiet) as progress:
            progress.update(sum(len(stripes) - s for s in mine[:done]))
            if (
                nearest and not done
            ):  # rows of one label first: what is near is soon known, and little is taken up after
                for stripe in stripes:
                    work.attempt(partial(self._look_within, nearest, work, stripe), *state.values())
            for start in range(done, len(mine), HELD):
                some = mine[start : start + HELD]
                work.attempt(partial(self._add_stripes, sums, work, stripes, some, watchers), *state.values())
                progress.update(sum(len(stripes) - s for s in some))
                if checkpoint:
                    checkpoint.save(start + len(some), state, force=some[-1] == mine[-1])
        if nearest:
            nearest.forget_shared(self.order, self.tile_rows, mine)
        return sums.total(self.device)

    def nearest_rows(self) -> NearestRows:
        """What `relation_sums` can fill: `config.neighbours` nearest labelled rows of each row, and groups of copies."""
        level = copy_level(self, self._stripes(self.order), self.config.seed)
        voters = np.ones(len(self), bool) if self.labels is None else self.labels >= 0
        return NearestRows(len(self), self.config.neighbours, level, voters)

    @staticmethod
    def _look_within(nearest: NearestRows, work: Workspace, stripe: Index) -> None:
        """Show a stripe's own rows to each other."""
        blocks = work.blocks(stripe)
        nearest.begin(stripe)
        for k, here in enumerate(blocks):
            left = work.left(here)
            for there in blocks[k:]:
                same = there is here
                right = left if same else work.right(there)
                nearest.look(work.cosine(left, right), here, there, same=same)
        nearest.settle()

    def _add_stripes(
        self, sums: ExactSums, work: Workspace, stripes: list[Index], some: Sequence[int], watchers: _Watchers
    ) -> None:
        """The relation of some stripes to themselves and to those behind each, for both sides."""
        watchers.begin()
        for held in work.held((s, stripes[s]) for s in some):
            for t in range(held[0][0], len(stripes)):
                for there in work.blocks(stripes[t]):
                    right = work.right(there)
                    for s, here, left in held:
                        if s > t:
                            break
                        kernel = work.kernel(left, right, watchers.of_cosine(here, there) if s < t else None)
                        if not self.config.diagonal and here[0] == there[0]:
                            kernel.fill_diagonal_(0)
                        watchers.look(kernel, here, there, want_columns=s < t)
                        kernel = power_(kernel, self.config.temperature)
                        rows, columns = signed_sums(kernel, left, right, want_columns=s < t)
                        sums.add(here, rows)
                        if columns is not None:
                            sums.add(there, columns)
        watchers.end()

    def sums_against(
        self,
        subset: Index,
        *,
        temperature: float | None = None,
        signed: bool = True,
        queries: RelationGraph | None = None,
        checkpoint: PassCheckpoint | None = None,
        quiet: bool = False,
        alone: bool = False,
    ) -> NDArray[np.float64]:
        """`sum_{j in subset} r(i, j)` for every row i of `queries` (default: of this graph).

        Args:
            subset: (m,) row numbers of this graph.
            temperature: default `config.temperature`.
            signed: with labels (Eq. 5.1) or the bare kernel (section 5.3.3).
            queries: another graph with the same columns; the diagonal is removed only without one.
            checkpoint: where finished stripes are kept.
            quiet: no progress bar.
            alone: this process does all of it; the others need not call.

        Returns:
            (n,) float64, equal on every process.

        Source: the update of Algorithm 4; the sum of section 5.3.3.
        Cost: 2 n m (d + C) operations.
        """
        source = queries or self
        sums = torch.zeros(len(source), dtype=torch.float64)
        temperature = self.config.temperature if temperature is None else temperature
        mask = np.zeros(len(self), bool)
        mask[subset] = True

        def add(kernel: Tensor, left: Tile, right: Tile, rows: Index, columns: Index) -> None:
            kernel = power_(kernel, temperature)
            found = signed_sums(kernel, left, right, want_columns=False)[0] if signed else sums_of(kernel, 1)
            sums.numpy()[rows] += found

        job = _Pass(add, sums, queries is None and not self.config.diagonal, checkpoint, quiet)
        self._visit(job, source, source.order, self.order[mask[self.order]], alone=alone)
        return sums.numpy() if alone else distributed.sum_over_processes(sums, self.device).numpy()

    def _visit(self, job: _Pass, source: RelationGraph, rows: Index, subset: Index, *, alone: bool = False) -> None:
        """Call `job.add` on every tile of `rows` of `source` against `subset` of this graph; finished stripes are kept.

        `alone`: this process does all of it, whatever the others do.
        """
        stripes, columns = source._stripes(rows), self._stripes(subset)
        work = Workspace(source, self)
        mine = list(range(len(stripes)) if alone else distributed.shard(len(stripes)))
        done = job.resume(len(mine))
        with bar(len(mine), "Relation to a subset", unit="stripe", disable=job.quiet) as progress:
            progress.update(done)
            for start in range(done, len(mine), HELD):
                some = mine[start : start + HELD]
                work.attempt(partial(_visit_stripes, job, work, [stripes[s] for s in some], columns), job.sums)
                progress.update(len(some))
                if job.checkpoint:
                    job.checkpoint.save(start + len(some), {"sums": job.sums}, force=some[-1] == mine[-1])


@dataclass
class _Pass:
    """One pass over the tiles: `add(kernel before the power, row tile, column tile, row numbers, column numbers)` puts
    its share into `sums`."""

    add: Callable[[Tensor, Tile, Tile, Index, Index], None]
    sums: Tensor
    drop_diagonal: bool
    checkpoint: PassCheckpoint | None
    quiet: bool

    def resume(self, stripes: int) -> int:
        """Those of `stripes` that an earlier run finished; its sums are copied in."""
        found = self.checkpoint.load(stripes, {"sums": self.sums}) if self.checkpoint else None
        if found is None:
            return 0
        self.sums.copy_(found[1]["sums"])
        return found[0]


@dataclass
class _Watchers:
    """Who is shown the tiles of the symmetric pass, beside the sums."""

    nearest: NearestRows | None
    outside: ReferenceSums | None

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        odd = dict(zip(("outside", "outside_rest"), self.outside.sums.parts, strict=True)) if self.outside else {}
        return {**odd, **(self.nearest.state if self.nearest else {})}

    def begin(self) -> None:
        """Tiles follow, perhaps for the second time."""
        if self.nearest:
            self.nearest.begin()

    def end(self) -> None:
        """All of them were shown."""
        if self.nearest:
            self.nearest.settle()

    def of_cosine(self, here: Index, there: Index) -> Callable[[Tensor], None] | None:
        """Who looks at `f f'^T` of two different stripes."""
        return partial(self.nearest.look, here=here, there=there, same=False) if self.nearest else None

    def look(self, kernel: Tensor, here: Index, there: Index, *, want_columns: bool) -> None:
        """Show `s c` before the power."""
        if self.outside:
            self.outside.look(kernel, here, there, want_columns=want_columns)


def _visit_stripes(job: _Pass, work: Workspace, stripes: list[Index], columns: list[Index]) -> None:
    for held in work.held(enumerate(stripes)):
        for part in columns:
            for there in work.blocks(part):
                right = work.right(there)
                for _, here, left in held:
                    kernel = work.kernel(left, right)
                    if job.drop_diagonal:
                        _, a, b = np.intersect1d(here, there, assume_unique=True, return_indices=True)
                        kernel[torch.from_numpy(a), torch.from_numpy(b)] = 0
                    job.add(kernel, left, right, here, there)


def _refuse(wrong: NDArray[np.bool_], start: int, what: str) -> None:
    if wrong.any():
        raise ValueError(
            f"row {start + int(np.flatnonzero(wrong)[0])} (first of {int(wrong.sum())} in its block): {what}"
        )
