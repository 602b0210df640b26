"""What all TT layers share: cores, bias, the way to run, and what is kept for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from ttcompress.errors import PlanError, ShapeError
from ttcompress.records.layers import ConvSpec, Execution, LayerSpec, LinearSpec, checked_execution, executions
from ttcompress.tt import cost
from ttcompress.tt.arithmetic import norm
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.shapes import Tensorization, is_swept, tensorize_shape

T = TypeVar("T")


Way = Callable[[Any, Tensor, Any], Tensor]
"""Called with a layer, its input, and what was made of its cores for this way to run it."""


MOST_CHOICES = 256


CORE_DIM = 5
"""Dimensions of a TT-core: TT-rank, out, in, window, TT-rank."""


def _state(cores: Sequence[Tensor]) -> tuple[int, ...] | None:
    """What changes when the cores do; None for tensors without memory of their own, as under vmap or on meta."""
    if cores[0].is_meta:
        return None
    try:
        return tuple([number for core in cores for number in (core._version, core.data_ptr())])
    except RuntimeError:
        return None


def layer_spec(module: nn.Linear | nn.Conv2d) -> LayerSpec:
    """Shape and geometry of a dense layer."""
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return LinearSpec(module.in_features, module.out_features, bias)
    padding = module.padding if isinstance(module.padding, str) else _pair(module.padding)
    kernel, stride, dilation = (_pair(value) for value in (module.kernel_size, module.stride, module.dilation))
    return ConvSpec(
        module.in_channels, module.out_channels, kernel, stride, padding, dilation, module.padding_mode, bias
    )


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return int(value[0]), int(value[1])


class TTLayer(nn.Module, ABC):
    """What both layers share: cores, bias, initialisation, the dense weight, the choice of how to run."""

    bias: nn.Parameter | None

    def __init__(
        self,
        spec: LayerSpec,
        tensorization: Tensorization,
        tt_ranks: int | Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        # in_features, stride, padding and the like, under the names of the layer that this one replaces.
        vars(self).update({name: value for name, value in vars(spec).items() if name != "bias"})
        self.tensorization = tensorization
        self.tt_ranks = tensorization.expand_ranks(tt_ranks)
        self._execution = Execution.AUTO
        shapes = tensorization.core_shapes(self.tt_ranks)
        empty = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.cores = nn.ParameterList([nn.Parameter(core) for core in empty])
        bias = nn.Parameter(torch.empty(spec.weight_shape[0], device=device, dtype=dtype)) if spec.bias else None
        self.register_parameter("bias", bias)
        self._kept: dict[Hashable, Any] = {}
        self._ready: tuple[Hashable, Way, Any] | None = None
        self._choices: dict[Hashable, bool] = {}
        self._plans = self._sweep_plans()
        self.reset_parameters()

    @classmethod
    def from_cores(cls, dense: nn.Module, tensorization: Tensorization, cores: Sequence[Tensor]) -> Self:
        """The layer with these cores, and everything else as in the dense layer it replaces; no storage is shared."""
        spec = layer_spec(dense)  # type: ignore[arg-type]
        layer = cls(spec, tensorization, [core.shape[-1] for core in cores[:-1]], device="meta")
        train = bool(dense.weight.requires_grad)
        copies = [core.detach().clone(memory_format=torch.contiguous_format) for core in cores]
        layer.cores = nn.ParameterList([nn.Parameter(core, requires_grad=train) for core in copies])
        if isinstance(dense.bias, Tensor):
            layer.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=dense.bias.requires_grad)
        return layer.train(dense.training)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        tensorization: Tensorization | str | None = None,
        max_rank: int | Sequence[int] | None = None,
        eps: float | None = None,
    ) -> Self:
        """Decompose a dense layer by TT-SVD; `tensorization` may be just the name of a format.

        Raises:
            ShapeError: modes, ranks or eps that do not fit the weight (see `tt_svd`).
            PlanError: a convolution with groups > 1.
        """
        if not isinstance(dense, nn.Linear | nn.Conv2d) or getattr(dense, "groups", 1) != 1:
            raise PlanError(f"only nn.Linear and nn.Conv2d with groups=1 take TT form, not {dense}")
        weight = dense.weight.detach()
        if not isinstance(tensorization, Tensorization):
            default = "matrix" if weight.dim() == 2 else "chain"
            tensorization = tensorize_shape(tensorization or default, tuple(weight.shape))
        return cls.from_cores(dense, tensorization, decompose_weight(weight, tensorization, max_rank, eps).cores)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random cores whose dense weight has the standard deviation of torch's default, 1 / sqrt(3 fan_in)."""
        fan_in = prod(self.spec.weight_shape[1:])
        bound = fan_in**-0.5
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        paths = prod(self.tt_ranks)
        std = (bound / 3**0.5 / paths**0.5) ** (1 / len(self.cores))
        for core in self.cores:
            nn.init.normal_(core, std=std)
        if self.cores[0].is_meta:
            return
        # A few cores with few entries stray far from their expected norm together: set the realised one.
        wanted = bound / 3**0.5 * prod(self.tensorization.sizes) ** 0.5
        drawn = norm(list(self.cores))
        for core in self.cores:
            core.mul_((wanted / drawn) ** (1 / len(self.cores)))

    @property
    def weight(self) -> Tensor:
        """The dense weight that the cores stand for, rebuilt at each access: (out, in) or (out, in, kh, kw)."""
        return dense_weight(list(self.cores), self.spec.weight_shape)

    @property
    def executions(self) -> tuple[Execution, Execution, Execution]:
        """The executions that this layer has: `auto`, the one by its TT-cores, `dense`."""
        return executions(self.spec, self.tensorization)

    @property
    def execution(self) -> Execution:
        """How the layer runs: `auto` chooses by cost for each call shape, the others are forced."""
        return self._execution

    @execution.setter
    def execution(self, name: str) -> None:
        self._execution = checked_execution(name, self.executions)
        self._ready = None

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: TTLinear to (..., in_features), TTConv2d to ([batch,] in_channels, height, width).

        Raises:
            ShapeError: input of another shape, or of whole numbers.
        """
        x = input  # The name is that of torch's own layers, for calls by keyword.
        signature = self._signature(x)
        # Once read: another thread may replace it meanwhile, here and in `_made`.
        ready = self._ready
        if signature is not None and ready is not None and ready[0] == signature:
            return ready[1](self, x, ready[2])
        way, made = self._chosen(x)
        self._ready = None if signature is None else (signature, way, made)
        return way(self, x, made)

    def _signature(self, x: Tensor) -> Hashable | None:
        """All that the way to run depends on, where the next call may be the same; what is chosen then serves it too.

        To choose takes as long as a small convolution. Autocast is not part of it: nothing is kept in its type.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        state = _state(self._listed_cores())
        if state is None:
            return None
        return x.shape, x.is_contiguous(), x.dtype, torch.is_inference_mode_enabled(), state

    @abstractmethod
    def _chosen(self, x: Tensor) -> tuple[Way, Any]:
        """The way to run a call, checked, and what it needs of the cores."""

    def _is_decided(self) -> bool:
        """No choice by cost: one is forced, or `torch.export` asks for one graph for all call shapes, the factored."""
        return self.execution != Execution.AUTO or torch.compiler.is_exporting()

    def _runs_dense(self, pixels: int, out_pixels: int) -> bool:
        """The choice for calls of this size, remembered for the next one."""
        if self._is_decided():
            return self.execution == Execution.DENSE
        if torch.compiler.is_compiling():
            return self._is_dense_cheaper(cost.Calls(pixels, out_pixels), kept=False)
        keeps = self._keeps()
        key = (pixels, out_pixels, keeps, self._trains())
        if key not in self._choices:
            if len(self._choices) >= MOST_CHOICES:
                self._choices.clear()
            self._choices[key] = self._is_dense_cheaper(cost.Calls(pixels, out_pixels), keeps)
        return self._choices[key]

    def _is_dense_cheaper(self, calls: cost.Calls, kept: bool) -> bool:
        """Whether the dense weight costs less, what is made of the cores at hand (`kept`) or not."""
        layer, form = cost.LayerCosts(self.spec.weight_shape, calls), (self.tensorization, self.tt_ranks)
        dense = layer.dense() if kept else layer.rebuilt(*form)
        plan = self._plan() if self._plans else None
        return bool(cost.TIME.total(dense) < cost.TIME.total(layer.factored(*form, kept, plan)))

    def _listed_cores(self) -> list[Tensor]:
        # ParameterList looks every entry up by name, which takes longer than a small layer.
        return list(self._modules["cores"]._parameters.values())  # type: ignore[union-attr, arg-type]

    def _trains(self) -> bool:
        return torch.is_grad_enabled() and any(core.requires_grad for core in self._listed_cores())

    def _keeps(self) -> bool:
        """Whether what is made of the cores serves the next call too: in eval mode, where no gradient goes to them."""
        if self.training or torch.compiler.is_compiling() or self._trains():
            return False
        return not any(core.is_inference() for core in self._listed_cores())

    def _made(self, what: str, x: Tensor, make: Callable[[list[Tensor]], T]) -> T:
        """make(cores in the type of x), kept where possible until the cores change.

        A change in place through `core.data` cannot be seen; `train()` and `eval()` drop what is kept.
        """
        if not x.is_floating_point():
            raise ShapeError(f"the layer takes floating-point input, not {x.dtype}")
        cores = self._listed_cores()
        state = _state(cores) if self._keeps() else None
        if state is None:
            return make([core.to(x.dtype) for core in cores])
        key = what, x.dtype, x.is_contiguous(), torch.is_inference_mode_enabled(), state
        if key in (kept := self._kept):
            return cast("T", kept[key][0])
        # As long as the memory is held its address is not given to other cores.
        held = [core.detach() for core in cores]
        # What is kept outlives an autocast, which casts it as it does weights.
        with torch.autocast(x.device.type, enabled=False):
            made = make([core.to(x.dtype) for core in cores])
        self._kept = {key: (made, held)}
        return made

    def _sweep_plans(self) -> list[cost.SweepPlan]:
        """How inputs meet the cores, without and with gradients, for layers that contract them."""
        if not is_swept(self.spec.weight_shape, self.tensorization):
            return []
        shapes = cost.swept_shapes(self.tensorization.core_shapes(self.tt_ranks))
        return [cost.sweep_plan(shapes, training) for training in (False, True)]

    def _plan(self) -> cost.SweepPlan:
        return self._plans[self._trains()]

    def kept_tensors(self) -> list[Tensor]:
        """What is kept for evaluation, made of the cores."""
        found: list[Tensor] = []
        waiting = [made for made, _ in self._kept.values()]
        while waiting:
            each = waiting.pop()
            if isinstance(each, list | tuple):
                waiting += each
            elif isinstance(each, Tensor):
                found.append(each)
        return found

    def _bias_as(self, x: Tensor) -> Tensor | None:
        bias = self._parameters["bias"]
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)

    def train(self, mode: bool = True) -> Self:
        """As in torch; what was made of the cores for evaluation is dropped."""
        self._kept, self._ready = {}, None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A core has as many dimensions as a batch of volumes, but no memory format of images.
        def to_core(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten()).view(tensor.shape) if tensor.dim() == CORE_DIM else fn(tensor)

        self._kept, self._ready = {}, None
        moved: Self = super()._apply(to_core, recurse)  # type: ignore[no-untyped-call]
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made of the cores, so that copies do not hold it twice."""
        return {**vars(self), "_kept": {}, "_ready": None}

    def extra_repr(self) -> str:
        """Shape, format and TT-ranks."""
        ranks = ", ".join(map(str, self.tt_ranks))
        shape = " x ".join(map(str, self.spec.weight_shape))
        return f"{shape}, {self.tensorization.format}, tt_ranks=({ranks}), bias={self.bias is not None}"
