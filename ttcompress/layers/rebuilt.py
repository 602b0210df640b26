"""Any parameter of any module in TT form: the module computes it from its cores, and goes on as it is.

The module keeps its class (a subclass of it with the same name), its hooks and its forward. In the place of the
parameter is a property, which every reader of `module.weight` meets: the module's own forward, a parent such as
nn.MultiheadAttention that reads the weight of its projection, the lists of weights of LSTM and GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from ttcompress.errors import PlanError
from ttcompress.layers.base import flattening, init_cores, is_recorded
from ttcompress.layers.cache import Cache
from ttcompress.layers.spec import unviewed
from ttcompress.records.layers import Execution, LayerSpec, cores_name
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.shapes import Tensorization


class TTWeight(nn.ParameterList):
    """The TT-cores of one parameter, and what it is rebuilt to: in eval mode kept until they change.

    Args:
        spec: shape of the parameter, and how it is viewed as (out, in, window).
        tensorization: how that view is seen as a tensor.
        cores: core k of shape (r_{k-1}, m_k, n_k, w_k, r_k), with r_0 = r_d = 1 (Oseledets 2011, equation 1.3).
        dtype: of the parameter, by default that of the cores.

    >>> import torch
    >>> from ttcompress.records.layers import WeightSpec
    >>> from ttcompress.tt import tensorize_shape
    >>> spec = WeightSpec((6, 4), transposed=True)
    >>> cores = [torch.ones(1, 1, 6, 1, 2), torch.ones(2, 4, 1, 1, 1)]
    >>> TTWeight(spec, tensorize_shape("lowrank", spec.view_shape), cores).weight.shape
    torch.Size([6, 4])
    """

    def __init__(
        self,
        spec: LayerSpec,
        tensorization: Tensorization,
        cores: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        requires_grad: bool = True,
    ) -> None:
        super().__init__([nn.Parameter(core, requires_grad) for core in cores])
        self.spec = spec
        self.tensorization = tensorization
        self.tt_ranks = (1, *(core.shape[-1] for core in cores))
        self._dtype = dtype or cores[0].dtype
        self._cache = Cache()

    execution = Execution.AUTO
    """There is but one way to run."""

    @property
    def cores(self) -> list[nn.Parameter]:
        """The TT-cores."""
        # Past __getitem__, which takes longer than a small product.
        return list(self._parameters.values())  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The parameter, in its own shape. Gradients flow to the cores."""
        cores = self.cores
        trains = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
        if self.training or trains or is_recorded() or not _can_keep(cores):
            return self._rebuilt(cores)
        kept: Tensor = self._cache.made(Execution.DENSE, cores[0], cores, self._rebuilt).operands
        return kept

    def _rebuilt(self, cores: Sequence[Tensor]) -> Tensor:
        # The module casts its weight itself, if it is to be cast; a product of narrow cores would lose more.
        with torch.autocast(cores[0].device.type, enabled=False):
            wide = [core.to(self._dtype) for core in cores]
            dense = dense_weight(wide, self.spec.view_shape)
        return unviewed(dense, self.spec).contiguous()

    def dense(self) -> nn.Parameter:
        """A parameter with these values, trained if the cores are."""
        trains = any(core.requires_grad for core in self.cores)
        return nn.Parameter(self.weight.detach().clone(), trains)

    def reset_parameters(self) -> None:
        """Random cores whose dense weight has the standard deviation of torch's default."""
        init_cores(self.cores, self.spec, self.tensorization)

    def cached_tensors(self) -> list[Tensor]:
        """What is cached for evaluation, made of the cores."""
        return self._cache.tensors()

    def train(self, mode: bool = True) -> Self:
        """As in torch; what was made of the cores for evaluation is dropped."""
        self._cache = Cache()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cache = Cache()
        # What a change of types makes of the parameter shows on an empty one.
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.cores[0].device)).dtype
        moved: Self = super()._apply(flattening(fn), recurse)  # type: ignore[no-untyped-call]
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made of the cores, so that copies do not hold it twice."""
        return {**vars(self), "_cache": Cache()}

    def extra_repr(self) -> str:
        """Shape, format and TT-ranks."""
        shape = " x ".join(map(str, self.spec.weight_shape))
        return f"{shape}, {self.tensorization.format}, tt_ranks={self.tt_ranks}"


# ------------------------------------------------------------------------------------------------------ in and out


def _can_keep(cores: Sequence[Tensor]) -> bool:
    """Whether what is made of cores serves later calls: not where their changes are not counted.

    Nor in a CUDA graph, which would go on with it whatever becomes of the cores.
    """
    if any(core.is_inference() for core in cores):
        return False
    return not (cores[0].is_cuda and torch.cuda.is_current_stream_capturing())


def rebuild(module: nn.Module, parameter: str, weight: TTWeight) -> None:
    """Have a module compute a parameter from TT-cores from now on, in place.

    Its state dict has `cores.k` in the place of `weight`, `NAME_cores.k` in that of any other name.

    Raises:
        PlanError: a module that has something called `cores` already.

    >>> import torch
    >>> from ttcompress.records.layers import WeightSpec
    >>> from ttcompress.tt import decompose_weight, tensorize_shape
    >>> gru = torch.nn.GRU(8, 4)
    >>> spec = WeightSpec((12, 8), "weight_ih_l0")
    >>> view = tensorize_shape("lowrank", spec.view_shape)
    >>> cores = decompose_weight(gru.weight_ih_l0.detach(), view, 2).cores
    >>> rebuild(gru, "weight_ih_l0", TTWeight(spec, view, cores))
    >>> [name for name in gru.state_dict() if "cores" in name], gru(torch.ones(3, 8))[0].shape
    (['weight_ih_l0_cores.0', 'weight_ih_l0_cores.1'], torch.Size([3, 4]))
    """
    base, names = _origin(module)
    child = cores_name(parameter)
    if hasattr(module, child) and parameter not in names:
        raise PlanError(f"a {type(module).__name__} has something called {child} already")

    module._parameters.pop(parameter, None)
    module._modules[child] = weight
    module.__class__ = _computing(base, names | {parameter})


def restore(module: nn.Module, parameter: str, dense: nn.Parameter) -> None:
    """Give a module a parameter that it computed from TT-cores, in place."""
    base, names = _origin(module)
    del module._modules[cores_name(parameter)]
    left = names - {parameter}
    module.__class__ = _computing(base, left) if left else base
    # Past __setattr__: recurrent modules look there for a list of their weights, which is made below.
    module._parameters[parameter] = dense
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def rebuilt_weight(module: nn.Module, parameter: str) -> TTWeight:
    """The cores of a parameter that a module computes."""
    weight: TTWeight = module._modules[cores_name(parameter)]  # type: ignore[assignment]
    return weight


def rebuilt_in(module: nn.Module) -> dict[str, TTWeight]:
    """The parameters that a module computes, by its own names for them."""
    _, names = _origin(module)
    return {name: rebuilt_weight(module, name) for name in sorted(names)}


def _origin(module: nn.Module) -> tuple[Any, frozenset[str]]:
    """The class that a module had before, and what it computes by now."""
    kind = type(module)
    origin: tuple[Any, frozenset[str]] = vars(kind).get("_computed", (kind, frozenset()))
    return origin


@cache
def _computing(base: Any, names: frozenset[str]) -> Any:
    """A subclass that computes these parameters, under the name of its base."""
    attributes: dict[str, Any] = {name: property(_reader(name)) for name in names}
    attributes |= {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce_ex__": _reduced}
    if issubclass(base, nn.RNNBase):
        attributes |= RECURRENT
    return type(base.__name__, (base,), {**attributes, "_computed": (base, names)})


def _reader(name: str) -> Callable[[nn.Module], Tensor]:
    def read(module: nn.Module) -> Tensor:
        return rebuilt_weight(module, name).weight

    return read


def _reduced(module: Any, protocol: int) -> Any:
    """As copies and pickles see a module: its class is made anew, for no import leads to it."""
    base, _ = _origin(module)
    reduced = base.__reduce_ex__(module, protocol)
    return (_made_anew, _origin(module), *reduced[2:])


def _made_anew(base: Any, names: frozenset[str]) -> nn.Module:
    kind = _computing(base, names)
    made: nn.Module = kind.__new__(kind)
    return made


# -------------------------------------------------------------------------------------------------------- recurrent


def _flat_weights(module: Any) -> list[Tensor]:
    """All weights by the names in which torch's kernels want them, computed ones among them."""
    return [getattr(module, name) for name in module._flat_weights_names]


def _left_alone(module: Any, *_: Any) -> None:
    """What torch does to make all weights one piece of memory is not for such as are computed at each step."""


RECURRENT = {
    "_flat_weights": property(_flat_weights, _left_alone),
    "_weights_have_changed": _left_alone,
    "flatten_parameters": _left_alone,
}
"""Modules of torch.nn.RNNBase keep their weights in a list of their own, beside the parameters."""
