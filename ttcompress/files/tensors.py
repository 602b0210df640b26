"""Tensors as files hold them: types, shapes and sizes, and mappings that make each when asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ttcompress.errors import CheckpointError
from ttcompress.files.header import TensorInfo, canonical_json

DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip

COMPARED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class LazyTensors(Mapping[str, Tensor]):
    """Tensors of known type and shape, made anew when asked for, so that few are in memory at once."""

    infos: Mapping[str, TensorInfo]
    make: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def tensor_infos(tensors: Mapping[str, Tensor]) -> Mapping[str, TensorInfo]:
    """Type and shape by name.

    Raises:
        CheckpointError: a type that safetensors does not have.
    """
    if isinstance(tensors, LazyTensors):
        return tensors.infos
    return {name: _info(name, tensor) for name, tensor in tensors.items()}


def _info(name: str, tensor: Tensor) -> TensorInfo:
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name}: safetensors has no type for {tensor.dtype}")
    return TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def tensor_data(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row, as files hold them."""
    tensor = tensor.detach().cpu().contiguous()
    # A contiguous tensor of one entry or none may have any stride, which view() does not take.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of a state dict: of names, types, shapes and values, whatever file they are in and in which order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        described = canonical_json([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(f"{described}\n".encode())
        digest.update(tensor_data(tensor))
    return digest.hexdigest()


def is_finite(tensor: Tensor) -> bool:
    """Whether all entries are finite; taken for granted where torch cannot compare them, as in float8."""
    if tensor.numel() == 0 or tensor.dtype not in COMPARED_DTYPES:
        return True
    # Without a mask as large as the tensor: a NaN is both the least and the most.
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor.detach()))


ALIGNMENT = 64
"""Bytes between which torch places the tensors that it allocates."""


def aligned(tensor: Tensor) -> Tensor:
    """Where torch itself would have put it: kernels round differently where a weight begins between cache lines."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
