"""Weights of a GGUF file under Transformers' names, read and dequantized tensor by tensor."""

from __future__ import annotations

import math

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from torch import Tensor

from luthier.errors import ModelError, bulleted
from luthier.matrices import GGUFMatrix
from luthier.models.gguf_config import architecture_of
from luthier.models.gguf_file import GGUFFile, GGUFTensor
from luthier.models.gguf_names import ROPE_TENSORS, norm_offset, original_rows, permuted_heads, to_transformers

PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
BLOCKS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


class GGUFCheckpoint:
    """A WeightSource over one GGUF file. f32, f16 and bf16 tensors come as stored, quantized ones as blocks or in float32.

    Q2_K and Q3_K can be read in float32 alone: no matrix keeps their blocks, and the Filler says so.

    heads, key_heads: of the attention, to undo llama's row permutation.
    Raises ModelError naming the tensors whose type cannot be dequantized.
    """

    def __init__(self, file: GGUFFile, heads: int, key_heads: int):
        self.file, self.heads, self.key_heads = file, heads, key_heads
        self.architecture = architecture_of(file)
        self._tensor_of: dict[str, GGUFTensor] = {
            to_transformers(name, self.architecture): tensor
            for name, tensor in file.tensors.items()
            if name not in ROPE_TENSORS
        }
        problems = [
            f"{t.name}: {t.kind.name}" for t in self._tensor_of.values() if t.kind not in PLAIN and t.kind not in BLOCKS
        ]
        if problems:
            known = ", ".join(kind.name for kind in (*PLAIN, *BLOCKS))
            raise ModelError(
                f"{file.path}: tensors must be stored as {known}; got\n{bulleted(problems)}\n"
                "Try another quantization of it, such as Q4_K_M or Q8_0."
            )

    def names(self) -> list[str]:
        return list(self._tensor_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor_of[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if norm_offset(name, self.architecture) else PLAIN.get(self._tensor_of[name].kind, torch.float32)

    def kind(self, name: str) -> str | None:
        """The type of a matrix in blocks."""
        tensor = self._tensor_of[name]
        return tensor.kind.name.lower() if len(tensor.shape) == 2 and tensor.kind in BLOCKS else None

    def matrix(self, name: str) -> GGUFMatrix:
        """The blocks as they lie in the file; rows that llama's converter permuted are put back, which takes a copy."""
        tensor = self._tensor_of[name]
        data = self._data(name, mapped=True).reshape(tensor.shape[0], -1)
        return GGUFMatrix(_aligned(torch.from_numpy(data), 2), tensor.kind.name.lower())

    def tensor(self, name: str, *, mapped: bool) -> Tensor:
        tensor = self._tensor_of[name]
        values = self._values(tensor, self._data(name, mapped=mapped and tensor.kind in PLAIN))
        offset = norm_offset(name, self.architecture)
        return values - offset if offset else values

    def _data(self, name: str, *, mapped: bool) -> np.ndarray:
        """The tensor's bytes with rows in Transformers' order: mapped if they may be and no row has to move."""
        tensor = self._tensor_of[name]
        heads = permuted_heads(name, self.architecture, self.heads, self.key_heads)
        data = self.file.data(tensor, mapped=mapped and heads is None)
        return data if heads is None else self._unpermuted(data.reshape(tensor.shape[0], -1), heads, name)

    def _unpermuted(self, data: np.ndarray, heads: int, name: str) -> np.ndarray:
        """Rows in Transformers' order. Blocks run along a row, so whole rows of bytes are moved, quantized or not."""
        if data.shape[0] % (2 * heads):
            raise ModelError(
                f"{self.file.path}: {name} has {data.shape[0]} rows, which {heads} heads do not divide. Download it again."
            )
        return data[original_rows(data.shape[0], heads)]

    def _values(self, tensor: GGUFTensor, data: np.ndarray) -> Tensor:
        """The tensor's bytes as numbers in its shape."""
        if tensor.kind in PLAIN:
            dtype = PLAIN[tensor.kind]
            return _aligned(torch.from_numpy(data.reshape(-1)), dtype.itemsize).view(dtype).reshape(tensor.shape)
        rows = data.reshape(math.prod(tensor.shape[:-1]), -1)
        with np.errstate(all="ignore"):  # check_finite names weights that are not; they are no matter here
            return torch.from_numpy(dequantize(rows, tensor.kind)).reshape(tensor.shape)


def _aligned(data: Tensor, size: int) -> Tensor:
    """The bytes where they lie if that is a multiple of `size`, else a copy: a file may set its alignment to 1."""
    return data if data.data_ptr() % size == 0 else data.clone()
