"""The drop-in table that is looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcompress.errors import ShapeError
from ttcompress.layers.base import TTLayer, is_recorded
from ttcompress.layers.spec import unviewed
from ttcompress.records.layers import EmbeddingSpec, Execution, LayerSpec
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.lookup import look_up, lookup_plan
from ttcompress.tt.shapes import Tensorization

INDICES = (torch.int32, torch.int64)


class TTEmbedding(TTLayer):
    """A table in TT form, whose rows are looked up from the cores (Khrulkov et al. 2019).

    Indices (...) to rows (..., embedding_dim). The table is never rebuilt, unless `execution` is set to `dense`: a
    row costs a slice of each core, and their product.

    As in torch, indices at `padding_idx` send no gradient back. Cores are shared by all rows, so that the row may
    move with the others as they are trained; its own part of them, where it has one, stays.

    Raises:
        ShapeError: when called with anything but 32- or 64-bit whole numbers.
        IndexError: an index out of range, as in torch.

    >>> import torch
    >>> from ttcompress import TTEmbedding
    >>> dense = torch.nn.Embedding(100, 16, padding_idx=0)
    >>> layer = TTEmbedding.from_dense(dense)
    >>> ids = torch.tensor([[3, 99], [0, 3]])
    >>> torch.allclose(layer(ids), dense(ids), atol=1e-5)
    True
    """

    spec: EmbeddingSpec
    kind = EmbeddingSpec.kind

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool
    max_norm = None
    norm_type = 2.0
    sparse = False

    def __init__(
        self,
        spec: LayerSpec,
        tensorization: Tensorization,
        tt_ranks: int | Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(spec, tensorization, tt_ranks, device, dtype)
        self._lookup = lookup_plan(tensorization.core_shapes(self.tt_ranks), spec.weight_shape[0])
        self.dtype = self.cores[0].dtype
        """Of the rows, that of the dense table: cores may be stored in a narrower one."""

    @classmethod
    def from_cores(cls, dense: nn.Module, tensorization: Tensorization, cores: Sequence[Tensor]) -> Self:
        """See `TTLayer.from_cores`."""
        layer = super().from_cores(dense, tensorization, cores)
        layer.dtype = dense.weight.dtype
        return layer

    @classmethod
    def sharing(cls, dense: nn.Module, source: TTLayer) -> Self:
        """See `TTLayer.sharing`."""
        layer = super().sharing(dense, source)
        layer.dtype = dense.weight.dtype
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Look the rows up.

        Raises:
            ShapeError: anything but 32- or 64-bit whole numbers.
            IndexError: an index out of range.
        """
        if input.dtype not in INDICES:
            raise ShapeError(f"the layer takes whole numbers of 32 or 64 bits, not {input.dtype}")
        cores = self.own_cores()
        if self._execution is Execution.DENSE:
            table = self._table(cores)
            return functional.embedding(
                input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
            )

        ids = input.reshape(-1)
        kind = input.device.type
        # Tables are looked up in their own type.
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                rows = look_up(cores, ids, self._lookup, self.dtype, is_recorded())
        else:
            rows = look_up(cores, ids, self._lookup, self.dtype, is_recorded())

        if rows.requires_grad and (self.padding_idx is not None or self.scale_grad_by_freq):
            rows = _with_gradient(rows, self._share_of_gradient(ids))
        return rows[:, : self.embedding_dim].reshape(*input.shape, self.embedding_dim)

    def _table(self, cores: list[Tensor]) -> Tensor:
        """All rows, cached in evaluation."""
        trains = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
        if trains or not self._keeps(cores):
            return self._made_table(cores)
        table: Tensor = self._cache.made(Execution.DENSE, cores[0], cores, self._made_table).operands
        return table

    def _made_table(self, cores: list[Tensor]) -> Tensor:
        with torch.autocast(cores[0].device.type, enabled=False):
            wide = [core.to(self.dtype) for core in cores]
            return unviewed(dense_weight(wide, self.spec.view_shape), self.spec).contiguous()

    def _share_of_gradient(self, ids: Tensor) -> Tensor:
        """What of the gradient of each row counts: nothing at the padding, one over its count if that is wanted."""
        share = torch.ones(ids.shape[0], 1, dtype=self.dtype, device=ids.device)
        if self.scale_grad_by_freq:
            _, places, counts = torch.unique(ids, return_inverse=True, return_counts=True)
            share = share / counts[places, None]
        if self.padding_idx is not None:
            share = share.masked_fill((ids == self.padding_idx)[:, None], 0)
        return share

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What a change of types makes of the table shows on an empty one.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.cores[0].device)).dtype
        return super()._apply(fn, recurse)


def _with_gradient(rows: Tensor, share: Tensor) -> Tensor:
    """The same rows, of whose gradient only a share goes back."""
    values = rows.detach()
    return values + (rows - values) * share
