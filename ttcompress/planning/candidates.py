"""What one weight can be: its tensorizations at all TT-ranks, with what each choice costs and loses."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf, sqrt
from typing import Protocol

import torch
from torch import Tensor

from ttcompress.tt.cost import LayerCosts
from ttcompress.tt.shapes import Tensorization, feasible_ranks

EVERY_RANK_UP_TO = 64
"""Beyond this rank the search looks at a geometric ladder of ranks, each GRID_STEP times the one before.

Its time grows with the square of the number of ranks at a cut; ranks in between are tried at the end."""
GRID_STEP = 1.06
NUMERICALLY_ZERO = 1e-15


Limit = Callable[[tuple[int, ...]], bool]
"""Says of TT-ranks whether they are allowed; where some are, smaller ones are, too.

With three cuts and more it may only bound each of them."""


class Costs(Protocol):
    """What a tensorization of one weight costs at given TT-ranks, and what each core adds to it."""

    def of(self, tt_ranks: Sequence[int]) -> int:
        """Exactly, for all TT-ranks."""

    def of_core(self, index: int, left: Tensor, right: Tensor) -> Tensor:
        """What the core between these TT-ranks adds, for pairs of them."""


@dataclass(frozen=True)
class Parameters:
    """A tensorization costs the entries of its cores."""

    tensorization: Tensorization

    def of(self, tt_ranks: Sequence[int]) -> int:
        """Exactly, for all TT-ranks."""
        return self.tensorization.num_params(tt_ranks)

    def of_core(self, index: int, left: Tensor, right: Tensor) -> Tensor:
        """r_{k-1} s_k r_k, in every group."""
        return left * (self.tensorization.groups * self.tensorization.sizes[index]) * right


@dataclass(frozen=True)
class Running:
    """A tensorization costs what its layer takes to run by the cores."""

    tensorization: Tensorization
    layer: LayerCosts

    def of(self, tt_ranks: Sequence[int]) -> int:
        """Exactly, for all TT-ranks."""
        by_cores = self.layer.by_cores(self.tensorization, tt_ranks)
        return int(self.layer.unit.total(by_cores))

    def of_core(self, index: int, left: Tensor, right: Tensor) -> Tensor:
        """Exactly for chains of convolutions; where cores are merged before they meet the input, more."""
        added = self.layer.core(self.tensorization, index, left, right)
        cost: Tensor = self.layer.unit.total(added)
        return cost


@dataclass(frozen=True, eq=False)
class Choice:
    """A form in which to store a weight: a tensorization at TT-ranks, or dense where there is none.

    `error` is squared.
    """

    cost: int
    error: float
    candidate: Candidate | None = None
    tt_ranks: tuple[int, ...] = ()

    @property
    def relative_error(self) -> float:
        """Bound of the relative Frobenius error."""
        norm = self.candidate.squared_norm if self.candidate else 0.0
        return sqrt(self.error / norm) if norm else 0.0

    @property
    def params(self) -> int | None:
        """Entries of the cores."""
        return self.candidate.tensorization.num_params(self.tt_ranks) if self.candidate else None


class Candidate:
    """A tensorization of one weight, with what each choice of TT-ranks costs and loses.

    The tail of a cut at rank r is the sum of the squared singular values that r leaves out. Tails bound the
    squared error of TT-SVD, err^2 <= sum_k tail_k(r_k) (Oseledets 2011, theorem 2.2), so that no
    decomposition has to be tried.
    """

    def __init__(
        self,
        tensorization: Tensorization,
        spectra: Sequence[Tensor],
        squared_norm: float = 1.0,
        costs: Costs | None = None,
        rank_multiple: int = 1,
        limit: Limit | None = None,
    ) -> None:
        """`spectra`: squared singular values of the d - 1 unfoldings over ||A||^2, descending.

        `squared_norm` is ||A||^2 in whatever unit all layers that are weighed against each other share; by
        default `costs` are parameters. TT-ranks are those of `ranks_on_grid`, up to a `limit`, which has to
        allow all TT-ranks 1.
        """
        self.tensorization = tensorization
        self._costs = costs or Parameters(tensorization)
        self.squared_norm = squared_norm

        self.tails = [squared_norm * _tails(spectrum) for spectrum in spectra]
        self.limit = limit
        self.ranks = [ranks_on_grid(len(tail) - 1, rank_multiple) for tail in self.tails]
        if limit:
            self.ranks = [self._within_limit(cut, ranks) for cut, ranks in enumerate(self.ranks, 1)]
        pairs = zip(self.tails, self.ranks, strict=True)
        self.grids = [_searched(tail, ranks) for tail, ranks in pairs]
        self._tails_on_grid = [tail[grid] for tail, grid in zip(self.tails, self.grids, strict=True)]

        # Once for all prices that a search tries.
        self._core_costs = []
        for k, (left, right) in enumerate(pairwise([_ONE, *self.grids, _ONE])):
            of_core = partial(self._costs.of_core, k)
            self._core_costs.append(_on_pairs(of_core, tensorization.sizes[k], left, right))
        if limit and len(self.grids) == 2:
            self._core_costs[1].masked_fill_(~self._pairs_within_limit(), inf)

    def allows(self, tt_ranks: Sequence[int]) -> bool:
        """Whether TT-ranks keep to the limit, if there is one."""
        return self.limit is None or self.limit(tuple(tt_ranks))

    def _within_limit(self, cut: int, ranks: Sequence[int]) -> Sequence[int]:
        """The ranks of a cut that the limit allows where all others are 1."""

        def is_beyond(rank: int) -> bool:
            inner = [rank if at == cut else 1 for at in range(1, len(self.tails) + 1)]
            return not self.allows((1, *inner, 1))

        return ranks[: max(1, bisect_left(ranks, True, key=is_beyond))]

    def _pairs_within_limit(self) -> Tensor:
        """For two cuts: which pairs of their ranks the limit allows."""
        first, second = self.grids
        columns = second.tolist()
        allowed = torch.zeros(len(first), len(second), dtype=torch.bool)
        for row, left in enumerate(first.tolist()):
            count = bisect_left(columns, True, key=lambda right: not self.allows((1, left, right, 1)))
            allowed[row, :count] = True
        return allowed

    def choice(self, tt_ranks: Sequence[int]) -> Choice:
        """What these TT-ranks cost and lose."""
        inner = tt_ranks[1:-1]
        error = sum(float(tail[rank]) for tail, rank in zip(self.tails, inner, strict=True))
        return Choice(self._costs.of(tt_ranks), error, self, tuple(tt_ranks))

    def best_at(self, price: float) -> Choice:
        """TT-ranks (on the grids) of least error + price * cost, by dynamic programming over the cuts.

        Both sums fall apart over the cuts and the cores, and a core knows its two neighbouring ranks only. So
        the least value of everything up to a cut, for each rank there, follows from that up to the cut before
        (Viterbi 1967).
        """
        least = price * self._core_costs[0][0]
        came_from: list[Tensor] = []
        for tail, costs in zip(self._tails_on_grid, self._core_costs[1:], strict=True):
            up_to_cut = least + tail
            least, before = (up_to_cut[:, None] + price * costs).min(dim=0)
            came_from.append(before)

        # Backwards from the last rank, which is 1.
        ranks, at = [1], 0
        for grid, before in zip(reversed(self.grids), reversed(came_from), strict=True):
            at = int(before[at])
            ranks.append(int(grid[at]))
        return self.choice((1, *reversed(ranks)))

    def steps(self, tt_ranks: Sequence[int], by: int) -> Iterator[Choice]:
        """The feasible choices with the next rank up (by=1) or down (by=-1) at a single cut."""
        sizes = self.tensorization.sizes
        for cut, allowed in enumerate(self.ranks, 1):
            now = tt_ranks[cut]
            at = bisect_right(allowed, now) if by > 0 else bisect_left(allowed, now) - 1
            if not 0 <= at < len(allowed):
                continue

            ranks = (*tt_ranks[:cut], allowed[at], *tt_ranks[cut + 1 :])
            if feasible_ranks(sizes, ranks) == ranks and self.allows(ranks):
                yield self.choice(ranks)


_ONE = torch.ones(1, dtype=torch.long)


def _tails(spectrum: Tensor) -> Tensor:
    """tail[r] = sum of the squared singular values beyond the r-th, exactly 0 at the end."""
    tail = torch.zeros(len(spectrum) + 1, dtype=torch.float64)
    # From the small ones on, which would be lost in the sum of the large ones.
    tail[:-1] = spectrum.flip(0).cumsum(0).flip(0)
    return tail


def ranks_on_grid(most: int, multiple: int) -> Sequence[int]:
    """The TT-ranks that a cut may have: multiples of a number, and the `most` that the cut carries.

    Below the number itself powers of two are among them, so that a budget reaches as far as without a grid.

    >>> [*ranks_on_grid(28, 8)]
    [1, 2, 4, 8, 16, 24, 28]
    """
    if multiple == 1:
        return range(1, most + 1)

    small = [1 << exponent for exponent in range((multiple - 1).bit_length())]
    ranks = [rank for rank in (*small, *range(multiple, most, multiple)) if rank < most]
    return [*ranks, most]


def _searched(tail: Tensor, allowed: Sequence[int]) -> Tensor:
    """All small ranks of those that are allowed, then a geometric ladder, up to the numerical rank."""
    matters = tail > NUMERICALLY_ZERO * tail[0]
    top = max(1, int(matters.sum()))
    last = min(bisect_left(allowed, top), len(allowed) - 1)

    at = min(last, bisect_right(allowed, EVERY_RANK_UP_TO) - 1)
    found = [*allowed[: at + 1]]
    while at < last:
        rank = int(found[-1] * GRID_STEP) + 1
        at = min(last, bisect_left(allowed, rank))
        found.append(allowed[at])
    return torch.tensor(found)


def _on_pairs(of: Callable[[Tensor, Tensor], Tensor], size: int, left: Tensor, right: Tensor) -> Tensor:
    """The costs of a core of this size for all pairs of neighbouring ranks, infinite where infeasible."""
    shape = len(left), len(right)
    rows, columns = left[:, None].expand(shape), right[None, :].expand(shape)

    # A core's unfoldings have at most as many independent columns as rows.
    infeasible = (columns > rows * size) | (rows > size * columns)
    return of(rows, columns).double().masked_fill_(infeasible, inf)


@dataclass(frozen=True)
class LayerOptions:
    """All that is worth considering for one weight.

    It has `dense_params` entries and costs `dense_cost` as it is, by default its entries.
    """

    dense_params: int
    candidates: tuple[Candidate, ...]
    dense_cost: int | None = None

    @property
    def dense(self) -> Choice:
        """The weight as it is."""
        return Choice(self.dense_params if self.dense_cost is None else self.dense_cost, 0.0)

    def pays(self, choice: Choice) -> bool:
        """Whether a choice costs less and has fewer parameters than the weight as it is.

        No other is ever made: no layer is replaced by something larger.
        """
        return choice.cost < self.dense.cost and (choice.params or 0) < self.dense_params

    def best_at(self, price: float) -> Choice:
        """The choice of least error + price * cost."""
        choices = [candidate.best_at(price) for candidate in self.candidates]
        paying = filter(self.pays, choices)
        return min([self.dense, *paying], key=lambda each: (each.error + price * each.cost, each.cost))

    def smallest(self) -> Choice:
        """All TT-ranks 1 in the format where that is least."""
        choices = [candidate.choice((1,) * (len(candidate.tails) + 2)) for candidate in self.candidates]
        paying = filter(self.pays, choices)
        return min([self.dense, *paying], key=lambda choice: choice.cost)
