"""Least-squares sweeps: TT-cores fitted to what a layer puts out, one core at a time, by conjugate gradients.

The squared error of B x~ against W x, averaged over pairs of inputs (x in the dense network, x~ in the
compressed one) and regularised towards W, is a quadratic function of each core when the others stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ttcompress.tt.contract import contract, dense_weight, pad_features
from ttcompress.tt.whiten import Moments

RIDGE = 1e-3
"""Weight of ||W - B||^2, as a share of the inputs' mean second moment."""
STEPS = 12
"""Conjugate-gradient steps on a core; between orthogonal neighbours few are needed."""
STEPS_ON_ROWS = 4
"""The same for layers so large that every step takes a second."""


@dataclass(frozen=True)
class Objective:
    """f = quadratic - linear of the cores, each homogeneous in every single core (of degree 2 and 1)."""

    quadratic: Callable[[Sequence[Tensor]], Tensor]
    linear: Callable[[Sequence[Tensor]], Tensor]
    steps: int = STEPS

    def value(self, cores: Sequence[Tensor]) -> float:
        """Return f, up to the constant that makes it an error."""
        difference = self.quadratic(cores) - self.linear(cores)
        return float(difference.detach())


def output_error(weight: Tensor, inputs: Moments, outputs: Moments | None = None) -> Objective:
    """Return the error of the outputs as a function of the cores.

    It is E||W x - B x~||^2_G / 2 + lam / 2 ||W - B||^2_G, up to a constant, B the weight of the cores.
    `inputs` holds E[x~ x~^T] as `own` and E[x x~^T] as `crossed`; `outputs` is the metric G (None or a
    sketch: the identity).
    """
    if inputs.is_sketch:
        return _output_error_on_rows(weight, inputs)
    shape = tuple(weight.shape)

    # The ridge goes on both moments, for on the first alone it would shrink the weight.
    own, crossed = inputs.own, inputs.crossed
    ridge = RIDGE * own.diagonal().mean()
    for moment in (own, crossed):
        moment.diagonal().add_(ridge)
    target = weight.flatten(1).to(own) @ crossed
    target = target if outputs is None else outputs.times(target)

    def quadratic(cores: Sequence[Tensor]) -> Tensor:
        dense = dense_weight(cores, shape).flatten(1)
        weighted = dense if outputs is None else outputs.times(dense)
        return (weighted @ own * dense).sum() / 2

    def linear(cores: Sequence[Tensor]) -> Tensor:
        dense = dense_weight(cores, shape).flatten(1)
        return (target * dense).sum()

    return Objective(quadratic, linear)


def _output_error_on_rows(weight: Tensor, inputs: Moments) -> Objective:
    """Do the same for a Linear layer of many inputs, whose rows go through the cores.

    The cores stand for the weight throughout, and no moment (in, in) is formed.
    """
    rows = inputs.own
    targets = inputs.crossed @ weight.to(rows).T
    trace = float(rows.square().sum(dtype=torch.float64))
    ridge = RIDGE * trace / inputs.size

    def outputs_of(cores: Sequence[Tensor]) -> Tensor:
        columns = prod([core.shape[2] for core in cores])
        padded = pad_features(rows, columns)
        contracted = contract([core.to(rows) for core in cores], padded)
        return contracted[:, : weight.shape[0]]

    def quadratic(cores: Sequence[Tensor]) -> Tensor:
        squared = outputs_of(cores).square().sum(dtype=torch.float64)
        return (squared + ridge * _squared_norm(cores)) / 2

    def linear(cores: Sequence[Tensor]) -> Tensor:
        dense = dense_weight([core.to(weight) for core in cores], tuple(weight.shape))
        matched = (outputs_of(cores) * targets).sum(dtype=torch.float64)
        return matched + ridge * (dense * weight).sum()

    return Objective(quadratic, linear, STEPS_ON_ROWS)


def _squared_norm(cores: Sequence[Tensor]) -> Tensor:
    gram = cores[0].new_ones(1, 1)
    for core in cores:
        flat = core.flatten(1, -2)
        gram = torch.einsum("ab,anc,bnd->cd", gram, flat, flat)
    return gram[0, 0]


def fit_cores(cores: Sequence[Tensor], objective: Objective, sweeps: int) -> tuple[list[Tensor], list[float]]:
    """Fit cores (r_{k-1}, m_k, n_k, w_k, r_k) by sweeps to the right and back.

    Returns them in float64, and f before and after each sweep. Conjugate gradients lower a quadratic at every
    step, so f does not rise from one sweep to the next.
    """
    fitted = [core.double() for core in cores]
    last = len(fitted) - 1

    # Each core is solved for between orthogonal neighbours: its quadratic is best conditioned there.
    for k in range(last, 0, -1):
        _shift_left(fitted, k)

    values = [objective.value(fitted)]
    for _ in range(sweeps):
        for k in range(last):
            fitted[k] = _solve(fitted, k, objective)
            _shift_right(fitted, k)
        for k in range(last, 0, -1):
            fitted[k] = _solve(fitted, k, objective)
            _shift_left(fitted, k)
        fitted[0] = _solve(fitted, 0, objective)
        values.append(objective.value(fitted))
    return fitted, values


def _shift_left(cores: list[Tensor], k: int) -> None:
    """Make core k right-orthogonal in place, what is left of it going to core k - 1."""
    core = cores[k]
    q, r = torch.linalg.qr(core.flatten(1).T)
    cores[k] = q.T.reshape(-1, *core.shape[1:])
    cores[k - 1] = torch.tensordot(cores[k - 1], r, dims=([-1], [1]))


def _shift_right(cores: list[Tensor], k: int) -> None:
    """Make core k left-orthogonal in place, what is left of it going to core k + 1."""
    core = cores[k]
    q, r = torch.linalg.qr(core.flatten(0, -2))
    cores[k] = q.reshape(*core.shape[:-1], -1)
    cores[k + 1] = torch.tensordot(r, cores[k + 1], dims=1)


def _solve(cores: Sequence[Tensor], k: int, objective: Objective) -> Tensor:
    """Solve for core k by conjugate gradients (Hestenes and Stiefel 1952)."""

    def gradient(function: Callable[[Sequence[Tensor]], Tensor], core: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = core.detach().requires_grad_()
            value = function([*cores[:k], leaf, *cores[k + 1 :]])
            (result,) = torch.autograd.grad(value, leaf)
        return result

    at = cores[k]
    residual = gradient(objective.linear, at) - gradient(objective.quadratic, at)
    direction = residual
    squared = float(residual.square().sum())
    enough = 1e-16 * squared

    for _ in range(objective.steps):
        # The gradient of the quadratic part is linear in the core, so at a direction it is the Hessian times
        # it.
        image = gradient(objective.quadratic, direction)
        curvature = float((direction * image).sum())
        if squared <= enough or curvature <= 0:
            break

        step = squared / curvature
        at = at + step * direction
        residual = residual - step * image
        before = squared
        squared = float(residual.square().sum())
        direction = residual + squared / before * direction

    return at
