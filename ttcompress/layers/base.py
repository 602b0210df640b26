"""What all TT layers share: cores and bias, how they come about, the dense weight, and the course of a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ttcompress.errors import PlanError, ShapeError
from ttcompress.layers.cache import Cache, Call, call_key, made_for
from ttcompress.layers.execution import ExecutionChoice
from ttcompress.layers.spec import Replaceable, layer_spec, unviewed, viewed
from ttcompress.records.layers import EmbeddingSpec, Execution, LayerSpec, checked_execution, executions
from ttcompress.tt.arithmetic import norm
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.cost import Calls, ContractionPlan
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.shapes import Tensorization, tensorize_shape

CORE_DIM = 5
"""Dimensions of a TT-core: TT-rank, out, in, window, TT-rank; with groups one more."""


class TTLayer(nn.Module, ABC):
    """A layer whose weight is given by TT-cores: its only parameters, with the bias."""

    bias: nn.Parameter | None
    kind: ClassVar[str]
    """Of the layers that it stands for, as in `LayerSpec`."""

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

        empty = partial(torch.empty, device=device, dtype=dtype)
        shapes = tensorization.stored_shapes(self.tt_ranks)
        self.cores = nn.ParameterList([nn.Parameter(empty(shape)) for shape in shapes])
        out_dim = spec.view_shape[0] * spec.groups
        self.register_parameter("bias", nn.Parameter(empty(out_dim)) if spec.bias else None)

        self._swaps_cores = False
        self.is_table = isinstance(spec, EmbeddingSpec)
        self._execution = Execution.AUTO
        self._choice = ExecutionChoice(spec, tensorization, self.tt_ranks)
        self._cache = Cache()
        self.reset_parameters()

    @classmethod
    def from_cores(cls, dense: nn.Module, tensorization: Tensorization, cores: Sequence[Tensor]) -> Self:
        """The layer with these TT-cores, and everything else as in the dense layer that it replaces.

        No storage is shared: cores and bias are copied. Mode and `requires_grad` are those of the dense layer.

        Args:
            dense: the nn.Linear or convolution to be replaced; its weight is not read.
            tensorization: how its weight (out, in) or (out, in, *window) is viewed as a tensor.
            cores: core k of shape (r_{k-1}, m_k, n_k, w_k, r_k), with r_0 = r_d = 1 (Oseledets 2011, equation 1.3);
                with an axis in front where the layer has groups.

        Raises:
            ShapeError: TT-ranks that do not fit the tensorization.

        >>> import torch
        >>> from ttcompress import TTLinear, tensorize_shape
        >>> dense = torch.nn.Linear(12, 6)
        >>> modes = tensorize_shape("matrix", (6, 12), out_modes=(2, 3), in_modes=(3, 4))
        >>> cores = [torch.ones(1, 2, 3, 1, 5), torch.ones(5, 3, 4, 1, 1)]
        >>> bool((TTLinear.from_cores(dense, modes, cores).weight == 5).all())
        True
        """
        spec = layer_spec(dense)  # type: ignore[arg-type]
        inner_ranks = [core.shape[-1] for core in cores[:-1]]
        layer = cls(spec, tensorization, inner_ranks, device="meta")

        train = bool(dense.weight.requires_grad)
        copies = [core.detach().clone(memory_format=torch.contiguous_format) for core in cores]
        layer.cores = nn.ParameterList([nn.Parameter(core, requires_grad=train) for core in copies])
        layer._take_bias(dense)
        return layer.train(dense.training)

    @classmethod
    def sharing(cls, dense: nn.Module, source: TTLayer) -> Self:
        """The layer that runs by the very cores of another one, since `dense` shared its weight with that one.

        A table (rows, dim) that is also the weight (out, in) of a Linear is its transpose as a map: that one then
        reads the cores with outputs and inputs swapped, without a copy.
        """
        spec = layer_spec(dense)  # type: ignore[arg-type]
        swaps = spec.transposed != source.spec.transposed
        modes = source.tensorization.swapped() if swaps else source.tensorization
        layer = cls(spec, modes, source.tt_ranks, device="meta")

        layer.cores = source.cores
        layer._swaps_cores = swaps
        layer.is_table = source.is_table = layer.is_table or source.is_table
        layer._take_bias(dense)
        return layer.train(dense.training)

    def _take_bias(self, dense: nn.Module) -> None:
        bias = getattr(dense, "bias", None)
        if isinstance(bias, Tensor):
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        tensorization: Tensorization | str | None = None,
        max_rank: int | Sequence[int] | None = None,
        eps: float | None = None,
    ) -> Self:
        """Decompose a dense layer by TT-SVD (Oseledets 2011, algorithm 1).

        The weight is viewed as (out, in) for TTLinear and (out, in, *window) for convolutions, transposed ones too;
        of those with groups as one for each group, all at the same TT-ranks.
        Without `max_rank` and `eps` the decomposition is exact, up to round-off.

        Args:
            dense: an nn.Linear, an nn.Embedding or a convolution; it stays as it is.
            tensorization: the modes, or just the name of a format: by default `matrix` for an nn.Linear or an
                nn.Embedding, `chain` for a convolution.
            max_rank: the largest TT-rank, or one for each cut.
            eps: relative accuracy, ||W - W~||_F <= eps ||W||_F.

        Raises:
            ShapeError: modes, ranks or eps that do not fit the weight (see `tt_svd`).
            PlanError: another kind of layer.

        >>> import torch
        >>> from ttcompress import TTLinear
        >>> layer = TTLinear.from_dense(torch.nn.Linear(256, 64), max_rank=4)
        >>> layer.tt_ranks, sum(core.numel() for core in layer.cores)
        ((1, 4, 4, 1), 512)
        """
        if not isinstance(dense, Replaceable):
            raise PlanError(f"only nn.Linear, nn.Embedding and convolutions take TT form, not {dense}")
        spec = layer_spec(dense)
        if spec.kind != cls.kind:
            raise PlanError(f"{cls.__name__} stands for layers of another kind than {dense}")

        weight = viewed(dense.weight.detach(), spec)
        if not isinstance(tensorization, Tensorization):
            default = "matrix" if weight.dim() == 2 else "chain"
            tensorization = tensorize_shape(tensorization or default, spec.view_shape, groups=spec.groups)
        decomposed = decompose_weight(weight, tensorization, max_rank, eps)
        return cls.from_cores(dense, tensorization, decomposed.cores)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random cores whose dense weight has the standard deviation of torch's default."""
        bound = _bound(self.spec)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        init_cores(list(self.cores), self.spec, self.tensorization)

    @property
    def weight(self) -> Tensor:
        """The dense weight that the cores stand for, rebuilt at each access, in the shape that torch has it in.

        Entry (i, j) is G_1[i_1, j_1] ... G_d[i_d, j_d] (Novikov et al. 2015, section 3.1). Gradients flow to the cores.

        >>> import torch
        >>> from ttcompress import TTConv2d
        >>> dense = torch.nn.Conv2d(8, 16, 3)
        >>> layer = TTConv2d.from_dense(dense)
        >>> layer.weight.shape, torch.allclose(layer.weight, dense.weight, atol=1e-5)
        (torch.Size([16, 8, 3, 3]), True)
        """
        return unviewed(dense_weight(self.own_cores(), self.spec.view_shape), self.spec)

    @property
    def executions(self) -> tuple[Execution, ...]:
        """The executions that this layer has: `auto`, the one by its TT-cores, `dense`."""
        return executions(self.spec, self.tensorization)

    @property
    def execution(self) -> Execution:
        """How the layer runs: `auto` chooses by cost for each call shape, the others are forced.

        By its TT-cores a layer either contracts the input with them (`contract`; Novikov et al. 2015, section 4), or
        runs them as convolutions one after the other (`chain`); `dense` rebuilds the weight. The result is the same.

        Raises:
            ShapeError: when set to an execution that the layer does not have.

        >>> import torch
        >>> from ttcompress import TTLinear
        >>> layer = TTLinear.from_dense(torch.nn.Linear(64, 64), max_rank=2)
        >>> layer.executions
        ('auto', 'contract', 'dense')
        >>> layer.execution = "dense"
        """
        return self._execution

    @execution.setter
    def execution(self, name: str) -> None:
        self._execution = checked_execution(name, self.executions)
        self._cache.call = None

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer."""

    def _keeps(self, cores: Sequence[Tensor]) -> bool:
        """Whether what is made of cores without gradients serves the next call too."""
        if self.training or is_recorded() or not cores[0].is_cpu:
            return False
        return not any(core.is_inference() for core in cores)

    def own_cores(self) -> list[Tensor]:
        """The cores as this layer has them: of a table that it shares, with inputs and outputs swapped."""
        cores: Any = self._modules["cores"]
        # ParameterList looks every entry up by name, which takes longer than a small layer. Replicas of DataParallel
        # have none: theirs are plain tensors.
        listed = list(cores._parameters.values()) or list(cores)
        return [core.transpose(1, 2) for core in listed] if self._swaps_cores else listed

    def cached_tensors(self) -> list[Tensor]:
        """What is cached for evaluation, made of the cores."""
        return self._cache.tensors()

    def train(self, mode: bool = True) -> Self:
        """As in torch; what was made of the cores for evaluation is dropped."""
        self._cache = Cache()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cache = Cache()
        moved: Self = super()._apply(flattening(fn), recurse)  # type: ignore[no-untyped-call]
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made of the cores, so that copies do not hold it twice."""
        return {**vars(self), "_cache": Cache()}

    def extra_repr(self) -> str:
        """Shape, format and TT-ranks."""
        ranks = ", ".join(map(str, self.tt_ranks))
        shape = " x ".join(map(str, self.spec.weight_shape))
        return f"{shape}, {self.tensorization.format}, tt_ranks=({ranks}), bias={self.bias is not None}"


class TTMap(TTLayer):
    """A layer that maps its inputs by the weight: it contracts them with the cores, or multiplies them by it."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: TTLinear to (..., in_features), TTConv2d to ([batch,] in_channels, height, width).

        Raises:
            ShapeError: input of another shape, or of whole numbers.
        """
        # The name is that of torch's own layers, for calls by keyword.
        call = self._call(input)
        return self._run(call.execution, input, call.made.operands)

    def _call(self, x: Tensor) -> Call:
        """How this call runs, and what it takes of the cores."""
        key = self._key(x)
        # To choose takes as long as a small convolution. Read once: another thread may replace it meanwhile.
        call = None if key is None else self._cache.call
        if call is None or not call.serves(key):
            call = self._prepared(x, key)
        return call

    def _key(self, x: Tensor) -> Hashable | None:
        """What the next call must have in common with this one to run as it does; None where it never does."""
        if self.training or torch.is_grad_enabled() or is_recorded():
            return None
        return call_key(x, self.own_cores())

    def _prepared(self, x: Tensor, key: Hashable | None) -> Call:
        """A call checked, its execution chosen, and what that takes made of the cores."""
        calls = self._calls(x)
        if not x.is_floating_point():
            raise ShapeError(f"the layer takes floating-point input, not {x.dtype}")

        cores = self.own_cores()
        trains = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
        keeps = not trains and self._keeps(cores)
        execution = self._chosen(calls, keeps, trains, x.device.type)

        make = partial(self._operands, execution, x, self._choice.plan(trains), keeps)
        made = self._cache.made(execution, x, cores, make) if keeps else made_for(x, cores, make)
        call = Call(key, execution, made)
        self._cache.call = None if key is None else call
        return call

    def _chosen(self, calls: Calls, keeps: bool, trains: bool, device: str) -> Execution:
        if self._execution is not Execution.AUTO:
            return self._execution
        # Tables that are looked up as well are never rebuilt; exported is one graph for all call shapes.
        if self.is_table or torch.compiler.is_exporting() or _is_traced():
            return self._choice.by_cores
        return self._choice.cheaper(calls, keeps, trains, device)

    @abstractmethod
    def _calls(self, x: Tensor) -> Calls:
        """How much the layer has to do for an input, whose shape is checked."""

    @abstractmethod
    def _operands(
        self, execution: Execution, x: Tensor, plan: ContractionPlan | None, keeps: bool, cores: list[Tensor]
    ) -> Any:
        """What an execution takes besides an input like x; `keeps` where the calls that follow take it too."""

    @abstractmethod
    def _run(self, execution: Execution, x: Tensor, operands: Any) -> Tensor:
        """The output of the layer."""

    def _bias_as(self, x: Tensor) -> Tensor | None:
        bias = self.bias
        return bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)


@torch.no_grad()
def init_cores(cores: Sequence[Tensor], spec: LayerSpec, tensorization: Tensorization) -> None:
    """Random values of cores whose dense weight has the standard deviation of torch's default, in place.

    That is 1 / sqrt(3 fan_in), and 1 for a table.
    """
    if tensorization.groups > 1:
        one = replace(tensorization, groups=1)
        for group in zip(*cores, strict=True):
            init_cores(group, spec, one)
        return

    std = 1.0 if isinstance(spec, EmbeddingSpec) else _bound(spec) / 3**0.5

    # An entry of the weight is the sum over all paths through the TT-ranks of a product of one entry of each core.
    paths = prod(core.shape[-1] for core in cores)
    count = len(cores)
    for core in cores:
        nn.init.normal_(core, std=(std / paths**0.5) ** (1 / count))
    if cores[0].is_meta:
        return

    # A few cores with few entries stray far from their expected norm together: set the realised one.
    wanted = std * prod(tensorization.sizes) ** 0.5
    drawn = norm(list(cores))
    for core in cores:
        core.mul_((wanted / drawn) ** (1 / count))


def _bound(spec: LayerSpec) -> float:
    """Of the uniform distribution from which torch draws a layer's weights, 1 / sqrt(fan_in)."""
    return float(prod(spec.view_shape[1:]) ** -0.5)


def flattening(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of tensors that leaves the memory format of cores alone.

    A core has as many dimensions as a batch of volumes, but no memory format of images.
    """

    def change(tensor: Tensor) -> Tensor:
        return fn(tensor.flatten()).view(tensor.shape) if tensor.dim() >= CORE_DIM else fn(tensor)

    return change


def _is_traced() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_recorded() -> bool:
    """Whether a call becomes part of a graph, where what is cached would stand as a constant."""
    return torch.compiler.is_compiling() or _is_traced()
