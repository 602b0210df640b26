"""TT-SVD in the metric of a layer's inputs and outputs: what is minimised is output error, not weight error.

With S = E[x x^T] over a layer's inputs and G = E[g g^T] over the gradients of the network's outputs at the
layer's outputs, replacing W by B changes what the network says by about ||G^(1/2) (W - B) S^(1/2)||_F^2 (the
Kronecker-by_cores Gauss-Newton form of Martens and Grosse 2015). A tensorization takes S and G apart into one
small factor a mode, S ~ S_1 (x) ... (x) S_d, which is undone core by core, so that the TT structure stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.tt.decompose import solved_for_eigenvalues, tensorize, tt_svd
from ttcompress.tt.shapes import Tensorization

DAMPING = 1e-2
"""Share of the mean eigenvalue that every mode gets on top: what a few images do not show still counts."""
MATRIX_LIMIT = 4608
"""Up to this many entries a vector's second moment is held as a matrix; beyond, as SKETCH_ROWS rows."""
SKETCH_ROWS = 1024
TINY = torch.finfo(torch.float64).tiny


class Moments:
    """E[x x^T], E[t x^T] and means of pairs of vectors (t, x), summed up batch by batch.

    Without a partner t is x. Vectors of at most MATRIX_LIMIT entries add up to matrices in float64. Longer
    ones are kept as rows with E[x x^T] ~ rows^T rows, each new vector added with a random sign to the next of
    SKETCH_ROWS rows (a count sketch, Charikar et al. 2002): exact until the rows are used up, unbiased after,
    in memory that does not grow. Where `is_diagonal`, only the squares of single entries add up, as a vector:
    all there is to the rows of a table, of which an input is exactly one.
    """

    def __init__(self, size: int, paired: bool = False, seed: int = 0, is_diagonal: bool = False) -> None:
        self.size = size
        self.is_diagonal = is_diagonal
        self.is_sketch = size > MATRIX_LIMIT and not is_diagonal
        self._paired = paired
        self._generator = torch.Generator().manual_seed(seed)
        self._seen = 0
        self._weight = 0.0
        self._sums: list[Tensor] = []
        self._aside: list[Callable[[], Tensor]] = []

    @property
    def num_bytes(self) -> int:
        """Memory that the sums take."""
        if self.is_diagonal:
            return 8 * self.size
        per_entry = 4 * SKETCH_ROWS if self.is_sketch else 8 * self.size
        return (1 + self._paired) * self.size * per_entry

    def add(self, x: Tensor, t: Tensor | None = None, weight: float = 1.0) -> None:
        """Add the columns of x (size, count), which count for `weight` together, and of t, their partners."""
        share = weight / max(1, x.shape[1])
        vectors = [x] if t is None else [x, t]
        seconds: Iterable[Tensor]

        if self.is_diagonal:
            seconds = [x.double().square().sum(1) * share]
        elif self.is_sketch:
            seconds = self._sketched(vectors, share)
        else:
            seconds = _products(vectors, share)
        firsts = (v.sum(1).double() * share for v in vectors)
        self._add(chain(seconds, firsts), weight)

    def count(self, indices: Tensor, weight: float = 1.0) -> None:
        """Add one unit vector an index, which count for `weight` together, to diagonal moments."""
        counts = torch.bincount(indices.flatten(), minlength=self.size).double()
        shares = counts * (weight / max(1, indices.numel()))
        self._add(iter([shares, shares.clone()]), weight)

    def _add(self, parts: Iterator[Tensor], weight: float) -> None:
        if self._aside:
            raise ValueError("moments that are laid aside take nothing more")
        if self._sums:
            for whole in self._sums:
                # Made and gone one at a time: of wide layers each takes much memory.
                whole.add_(next(parts))
        else:
            self._sums = [*parts]
        self._weight += weight

    def _sketched(self, vectors: Sequence[Tensor], share: float) -> list[Tensor]:
        """Sum up columns in SKETCH_ROWS rows, those of x and of t with the same signs."""
        x = vectors[0]
        count = x.shape[1]
        first = self._seen % SKETCH_ROWS
        self._seen += count
        rows = (torch.arange(count) + first).remainder_(SKETCH_ROWS).to(x.device)

        # A sign is a factor of both vectors of a pair: products of different pairs cancel on average.
        signs = torch.randint(0, 2, (count,), generator=self._generator) * 2 - 1
        factors = signs.to(x) * share**0.5
        return [x.new_zeros(SKETCH_ROWS, self.size).index_add_(0, rows, (v * factors).T) for v in vectors]

    def lay_aside(self, lay: Callable[[Tensor], Callable[[], Tensor]]) -> None:
        """Put the sums where `lay` puts them, to be fetched whenever they are asked for; nothing is added after."""
        if self._sums:
            self._aside = [lay(each) for each in self._sums]
            self._sums = []

    def _sum(self, index: int) -> Tensor:
        return self._aside[index]() if self._aside else self._sums[index]

    def _mean(self, index: int) -> Tensor:
        if not self._sums and not self._aside:
            return torch.zeros((self.size,) if self.is_diagonal else (self.size, self.size)).double()
        scale = self._weight or 1.0
        if self.is_sketch and index <= self._paired:
            rows: Tensor = self._sum(index)[: self._seen] / scale**0.5
            return rows
        return self._sum(index) / scale

    @property
    def own(self) -> Tensor:
        """The moment E[x x^T] (size, size), or its diagonal, or at most SKETCH_ROWS rows, rows^T rows being it.

        It is made anew each time: what asks may change it.
        """
        return self._mean(0)

    @property
    def trace(self) -> float:
        """E[||x||^2]."""
        if self.is_diagonal:
            return float(self.own.sum())
        if self.is_sketch:
            return float(self.own.square().sum(dtype=torch.float64))
        return float(self.own.trace())

    @property
    def crossed(self) -> Tensor:
        """The moment E[t x^T] (size, size), or the rows of t that belong to those of `own`."""
        return self._mean(int(self._paired))

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means E[x] and E[t]."""
        return self._mean(1 + self._paired), self._mean(1 + 2 * self._paired)

    def centred(self) -> Moments:
        """Return covariances instead of second moments, for layers whose bias takes up the mean.

        A sketch stays as it is, and a diagonal.
        """
        if self.is_sketch or self.is_diagonal:
            return self

        mean_x, mean_t = self.means
        seconds = [self.own.sub_(mean_x.outer(mean_x))]
        if self._paired:
            seconds.append(self.crossed.sub_(mean_t.outer(mean_x)))
        return self._replaced(seconds)

    def blended(self, share: float) -> Moments:
        """Spread `share` of E[x x^T] evenly over all directions; a sketch stays as it is.

        So far vectors are their own partners: the same is added to E[t x^T].
        """
        if self.is_sketch or not share:
            return self
        if self.is_diagonal:
            return self._replaced([(1 - share) * self.own + share * self.own.mean()])
        seconds = [self.own, self.crossed] if self._paired else [self.own]
        even = share * _mean_eigenvalue(seconds[0])
        for each in seconds:
            each.mul_(1 - share).diagonal().add_(even)
        return self._replaced(seconds)

    def times(self, columns: Tensor) -> Tensor:
        """Multiply E[x x^T] by columns (size, count); a sketch leaves them as they are."""
        if self.is_sketch:
            return columns
        own = self.own.to(columns)
        return own[:, None] * columns if self.is_diagonal else own @ columns

    def scaled(self, factor: float) -> Moments:
        """Return the same, with every vector times the root of this factor."""
        other = copy(self)
        other._weight = (self._weight or 1.0) / factor
        return other

    @staticmethod
    def total(parts: Sequence[Moments]) -> Moments:
        """Return the sum of moments of vectors of one size, none of them a sketch."""
        whole = parts[0].own
        for part in parts[1:]:
            whole.add_(part.own)
        return parts[0]._replaced([whole])

    def _replaced(self, seconds: list[Tensor]) -> Moments:
        other = Moments(self.size, len(seconds) == 2, is_diagonal=self.is_diagonal)
        other._sums = [*seconds, *(seconds[0].new_zeros(self.size) for _ in seconds)]
        other._weight = 1.0
        return other


def _products(vectors: Sequence[Tensor], share: float) -> Iterator[Tensor]:
    """Multiply each of the vectors (size, count) by the first, x, to sums of v x^T."""
    x = vectors[0]
    return ((v @ x.T).double().mul_(share) for v in vectors)


def output_cost(difference: Tensor, inputs: Moments, outputs: Moments | None = None) -> float:
    """Return E||D x||^2 for a difference D of weights (out, in[, kh, kw]), in the outputs' metric if any."""
    flat = difference.flatten(1).to(inputs.own)

    def weighed(columns: Tensor) -> Tensor:
        return columns if outputs is None else outputs.times(columns)

    if inputs.is_diagonal:
        cost = (weighed(flat) * flat).sum(0) @ inputs.own
    elif inputs.is_sketch:
        missed = flat @ inputs.own.T
        cost = (weighed(missed) * missed).sum(dtype=torch.float64)
    else:
        cost = (weighed(flat) @ inputs.own * flat).sum()
    # Round-off may leave a little less than nothing.
    return float(cost.clamp(min=0))


def _mean_eigenvalue(moment: Tensor) -> Tensor:
    return moment.diagonal().mean()


@dataclass(frozen=True)
class ModeMetric:
    """Roots R of the metric R^T R of a mode: one of its outputs, one of its inputs and window together.

    They are (m_k, m_k) and (n_k w_k, n_k w_k). A diagonal one is the vector of its diagonal. Which root it is makes no
    difference to norms, singular values, or what is undone again.
    """

    out: Tensor
    inp: Tensor

    def apply(self, core: Tensor) -> Tensor:
        """Multiply the mode of a core (r, m_k n_k w_k, r') or (r, m_k, n_k, w_k, r') by both factors."""
        view = core.reshape(core.shape[0], len(self.out), len(self.inp), core.shape[-1])
        out = self.out.to(view)
        inp = self.inp.to(view)
        view = view * out[:, None, None] if out.dim() == 1 else torch.einsum("pm,amnb->apnb", out, view)
        view = view * inp[:, None] if inp.dim() == 1 else torch.einsum("qn,amnb->amqb", inp, view)
        return view.reshape(core.shape)

    def inverse(self) -> ModeMetric:
        """Return what undoes it."""
        return ModeMetric(_inverse(self.out), _inverse(self.inp))

    def squared(self) -> ModeMetric:
        """Return it twice over: the metric itself rather than its root."""
        return ModeMetric(_square(self.out), _square(self.inp))


def _inverse(factor: Tensor) -> Tensor:
    if factor.dim() == 1:
        return 1 / factor
    inverse: Tensor = torch.linalg.inv(factor)
    return inverse


def _square(factor: Tensor) -> Tensor:
    return factor * factor if factor.dim() == 1 else factor.mT @ factor


def mode_metrics(
    tensorization: Tensorization, inputs: Moments | None, outputs: Moments | None, diagonal: bool = False
) -> list[ModeMetric]:
    """Return roots of one factor a mode, from partial traces of the moments.

    Those of the inputs have the axes (in, kh, kw), those of the outputs (out). None counts all directions
    alike. `diagonal` scales single entries only, which few images estimate better.
    """
    count = len(tensorization.modes)
    axes_in = [*tensorization.in_modes, *tensorization.window_modes]
    axes_out = list(tensorization.out_modes)
    # Axis k is the input factor of mode k, axis d + k its window factor: one factor has both.
    groups_in = [(k, count + k) for k in range(count)]
    groups_out = [(k,) for k in range(count)]

    roots_in = _roots(inputs, axes_in, groups_in, diagonal)
    roots_out = _roots(outputs, axes_out, groups_out, diagonal)
    return [ModeMetric(out, inp) for out, inp in zip(roots_out, roots_in, strict=True)]


def _roots(
    moments: Moments | None, sizes: Sequence[int], groups: Sequence[tuple[int, ...]], diagonal: bool
) -> list[Tensor]:
    """Square roots of the factors of a moment over axes of these sizes, one factor a group of axes."""
    dims = [prod(sizes[axis] for axis in group) for group in groups]
    if moments is None:
        return [torch.ones(dim, dtype=torch.float64) for dim in dims]

    own = moments.own
    missing = prod(sizes) - moments.size
    is_matrix = not moments.is_sketch and not moments.is_diagonal
    if missing:
        # Padded entries of a vector are zeros.
        own = functional.pad(own, (0, missing, 0, missing) if is_matrix else (0, missing))
    if moments.is_diagonal:
        # As one row of roots it has the same squares.
        own = own.sqrt()[None]

    roots = []
    for number, (group, dim) in enumerate(zip(groups, dims, strict=True)):
        if diagonal or moments.is_diagonal or dim > MATRIX_LIMIT:
            factor = _partial_diagonal(own, not is_matrix, sizes, group).reshape(dim)
        else:
            factor = _partial_trace(own, moments.is_sketch, sizes, group).reshape(dim, dim)

        # Every partial trace has the whole trace; all factors but one are brought to trace 1.
        diagonal_of = factor if factor.dim() == 1 else factor.diagonal()
        whole = diagonal_of.sum().clamp(min=TINY)
        roots.append(_root(factor / whole if number else factor.clone()))

    return roots


def _partial_trace(own: Tensor, is_sketch: bool, sizes: Sequence[int], group: tuple[int, ...]) -> Tensor:
    count = len(sizes)
    row = list(range(count))
    # Axes outside of the group have the same index in row and column: over these the trace is taken.
    column = [count + axis if axis in group else axis for axis in row]
    kept = [*group, *(count + axis for axis in group)]
    if not is_sketch:
        return torch.einsum(own.reshape(*sizes, *sizes), [*row, *column], kept)

    rows = own.reshape(-1, *sizes)
    sample = 2 * count
    return torch.einsum(rows, [sample, *row], rows, [sample, *column], kept).double()


def _partial_diagonal(own: Tensor, is_sketch: bool, sizes: Sequence[int], group: tuple[int, ...]) -> Tensor:
    entries = own.square().sum(0, dtype=torch.float64) if is_sketch else own.diagonal()
    others = [axis for axis in range(len(sizes)) if axis not in group]
    shaped = entries.reshape(*sizes)
    return shaped.sum(others) if others else shaped


def _root(moment: Tensor) -> Tensor:
    """Take a root R of a moment R^T R (k, k), or of a diagonal (k), damped; the moment is used up."""
    if moment.dim() == 1:
        damping = DAMPING * moment.mean().clamp(min=TINY)
        return (moment + damping).sqrt()

    damping = DAMPING * _mean_eigenvalue(moment).clamp(min=TINY)
    moment.diagonal().add_(damping)
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(moment, upper=True)
    if not int(failed):
        return root

    # Round-off has left more below zero than damping makes up for.
    values, vectors = solved_for_eigenvalues(moment, torch.linalg.eigh)
    root = (vectors * torch.maximum(values, damping).sqrt()) @ vectors.T
    return root


def whitened(weight: Tensor, tensorization: Tensorization, metrics: Sequence[ModeMetric]) -> Tensor:
    """Return the tensorized weight (s_1, ..., s_d) in the metric: squared norms in it are costs."""
    tensor = tensorize(weight, tensorization)
    # float16 and bfloat16 would not hold the products.
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    sizes = tensor.shape
    for k, metric in enumerate(metrics):
        left = prod(sizes[:k])
        tensor = metric.apply(tensor.reshape(left, sizes[k], -1))
    return tensor.reshape(sizes)


def whitened_svd(
    weight: Tensor, tensorization: Tensorization, tt_ranks: Sequence[int], metrics: Sequence[ModeMetric]
) -> list[Tensor]:
    """Return cores (r_{k-1}, m_k, n_k, w_k, r_k), float64, of least error in the metric as TT-SVD has it."""
    result = tt_svd(whitened(weight, tensorization, metrics), tt_ranks)
    shapes = tensorization.core_shapes(result.tt_ranks)

    cores = []
    for core, metric, shape in zip(result.cores, metrics, shapes, strict=True):
        undone = metric.inverse().apply(core.double())
        cores.append(undone.reshape(shape))
    return cores
