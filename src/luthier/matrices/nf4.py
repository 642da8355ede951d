"""A matrix in 4-bit NormalFloat, its tensors those of bitsandbytes, in memory and on disk.

Source: QLoRA, arXiv:2305.14314; the layout is that of bitsandbytes' QuantState.as_dict(packed=True).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.errors import NumericError, ShapeError
from luthier.kernels.quantize import Nf4, quantize_absmax, quantize_nf4
from luthier.kernels.quantize_reference import dynamic_map, nf4_codes
from luthier.kernels.storage import NF4_BLOCK, NF4_NESTED_BLOCK
from luthier.matrices import cuda
from luthier.matrices.frozen import FrozenMatrix, StoredMatrix

STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
NESTED_KEYS = ("weight.nested_absmax", "weight.nested_quant_map")
MAX_STATE_BYTES = 4096
# Numbers that are widened at a time. In float32 they take fewer bytes than most results: no result is put where they were, and
# the next ones find room there again.
CONVERTED_ELEMENTS = 1 << 18
LARGEST_FLOAT32 = torch.finfo(torch.float32).max * (1 - 2**-20)  # what is below stays finite however its factors are rounded
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NF4Matrix(StoredMatrix):
    """W: (out_features, in_features), flat and row-major, 64 weights a scale.

        w[j] = quant_map[nibble j] * absmax[j // 64];    absmax[i] = nested_quant_map[q[i]] * nested_absmax[i // 256] + offset

    weight: uint8 (ceil(n / 2), 1), the even j in the high nibble. absmax: float32 (blocks,), or with double quantisation
    uint8 (blocks,), beside nested_absmax float32 (ceil(blocks / 256),) and nested_quant_map float32 (256,). quant_map: float32
    (16,). dtype: what the weights were before, which bitsandbytes records and dequantises to.
    4.127 bits a weight with double quantisation, 4.5 without. Raises ShapeError if the parts do not fit each other.
    """

    kind = "nf4"
    shape: tuple[int, int]
    weight: nn.Parameter
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        shape: tuple[int, int],
        *,
        quant_map: Tensor | None = None,
        nested_absmax: Tensor | None = None,
        nested_quant_map: Tensor | None = None,
        nested_offset: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.shape, self.nested_offset, self.dtype = shape, nested_offset, dtype
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.register_buffer("quant_map", nf4_codes(codes.device) if quant_map is None else quant_map)
        if nested_absmax is not None and nested_quant_map is None:
            nested_quant_map = dynamic_map().to(codes.device)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_quant_map", nested_quant_map)
        self.storage()  # checks that the parts fit

    @classmethod
    def quantize(cls, weight: Tensor, *, double: bool = True) -> NF4Matrix:
        """weight: (out_features, in_features), float32, bfloat16 or float16, finite. The bytes are those of bitsandbytes.

        Error: |w - w_hat| <= 0.1519 absmax of the block. Raises NumericError naming the first NaN or Inf, ShapeError for
        another dtype.
        """
        if weight.ndim != 2:
            raise ShapeError(f"a matrix has two dimensions; got {tuple(weight.shape)}.")
        rows, columns = weight.shape
        return cls._of(quantize_nf4(weight.contiguous(), double=double), (rows, columns), weight.dtype)

    @classmethod
    def converted(cls, matrix: FrozenMatrix, *, double: bool = True) -> NF4Matrix:
        """A matrix that is stored otherwise: the bytes of `quantize(matrix.dequantize())`, a few rows in float32 at a time.

        Raises NumericError naming the first NaN or Inf.
        """
        numbers, columns, device = matrix.shape[0] * matrix.shape[1], matrix.shape[1], matrix.weight.device
        codes = torch.empty(-(-numbers // 2), 1, dtype=torch.uint8, device=device)
        absmax = torch.empty(-(-numbers // NF4_BLOCK), device=device)
        try:
            for start, rows in matrix.row_blocks(CONVERTED_ELEMENTS, NF4_BLOCK):
                piece, first = quantize_nf4(rows, double=False), start * columns
                codes[first // 2 :][: len(piece.codes)] = piece.codes
                absmax[first // NF4_BLOCK :][: len(piece.absmax)] = piece.absmax
        except NumericError:
            return cls.quantize(matrix.dequantize(), double=double)  # which names its place in the whole
        return cls._of(Nf4(codes, *quantize_absmax(absmax)) if double else Nf4(codes, absmax), matrix.shape, torch.float32)

    @classmethod
    def _of(cls, stored: Nf4, shape: tuple[int, int], dtype: torch.dtype) -> NF4Matrix:
        offset = 0.0 if stored.nested_offset is None else float(stored.nested_offset)
        return cls(stored.codes, stored.absmax, shape, nested_absmax=stored.nested_absmax, nested_offset=offset, dtype=dtype)

    @classmethod
    def from_tensors(cls, parts: Mapping[str, Tensor]) -> NF4Matrix:
        """The matrix that `tensors` gives, or a checkpoint of bitsandbytes holds; nothing is copied.

        Raises ShapeError naming what is missing or does not fit.
        """
        state = read_state(parts)
        nested = state["nested_offset"] is not None
        missing = [key for key in ("weight", "weight.absmax", "weight.quant_map", *(NESTED_KEYS * nested)) if key not in parts]
        if missing:
            raise ShapeError(f"an nf4 matrix is stored in several tensors; missing: {', '.join(missing)}.")
        return cls(
            parts["weight"].contiguous().view(torch.uint8),
            parts["weight.absmax"],
            state["shape"],
            quant_map=parts["weight.quant_map"],
            nested_absmax=parts[NESTED_KEYS[0]] if nested else None,
            nested_quant_map=parts[NESTED_KEYS[1]] if nested else None,
            nested_offset=state["nested_offset"] or 0.0,
            dtype=state["dtype"],
        )

    def tensors(self) -> dict[str, Tensor]:
        """The parts under bitsandbytes' names; the tensors themselves, not copies."""
        parts: dict[str, Tensor] = {"weight": self.weight, "weight.absmax": self.absmax, "weight.quant_map": self.quant_map}
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            parts |= {NESTED_KEYS[0]: self.nested_absmax, NESTED_KEYS[1]: self.nested_quant_map}
        return parts | {STATE_KEY: self._state()}

    def _state(self) -> Tensor:
        """The JSON that bitsandbytes keeps beside the tensors, as uint8."""
        name = str(self.dtype).removeprefix("torch.")
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "dtype": name, "shape": list(self.shape)}
        if self.double_quant:
            state |= {"nested_blocksize": NF4_NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.nested_offset}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    def storage(self) -> kernels.Storage:
        """The parts as the kernels take them; no copy."""
        return kernels.Storage(
            "nf4",
            self.shape,
            self.weight.detach(),
            absmax=self.absmax,
            code=self.quant_map,
            nested_absmax=self.nested_absmax,
            nested_map=self.nested_quant_map,
            offset=self.nested_offset,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as a tensor (out_features, in_features) in `dtype`: a full copy, for merging and tests."""
        if self.weight.is_cuda and cuda.has_bitsandbytes():
            return cuda.dequantize_nf4(self, dtype)
        return super().dequantize(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W as float32. ids: (...) int64 -> (..., in_features)."""
        return kernels.rows(self.storage(), ids)

    def not_finite(self) -> int:
        """How many weights are NaN or Inf, which finite scales and codes can be too where their product is beyond float32."""
        if self._largest() <= LARGEST_FLOAT32:
            return 0
        return sum(int((~rows.isfinite()).sum()) for _, rows in self.row_blocks())

    def _largest(self) -> float:
        """What no weight's size exceeds, from the largest of each part; NaN where a part holds one."""
        scale = _size(self.absmax)
        if self.nested_absmax is not None and self.nested_quant_map is not None:
            scale = _size(self.nested_quant_map) * _size(self.nested_absmax) + abs(self.nested_offset)
        return _size(self.quant_map) * scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Matrix:
        """Follow the module between devices; a change of dtype is for weights that are numbers, never for codes and scales."""
        self.weight = nn.Parameter(_moved(self.weight.detach(), fn), requires_grad=False)
        for key, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[key] = _moved(buffer, fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, tensor in self.tensors().items():
            destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        parts = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix + "weight")}
        try:
            other = NF4Matrix.from_tensors(parts)
        except ShapeError as error:
            error_msgs.append(f"{prefix}weight: {error}")
            return
        if other.shape != self.shape or other.double_quant != self.double_quant:
            error_msgs.append(f"{prefix}weight must be {self.extra_repr()}; it is {other.extra_repr()}.")
            return
        theirs = dict(other.named_buffers())
        with torch.no_grad():
            self.weight.copy_(other.weight)
            for key, buffer in self.named_buffers():
                buffer.copy_(theirs[key])
        self.nested_offset, self.dtype = other.nested_offset, other.dtype

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', double' if self.double_quant else ''}"


def _size(numbers: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    return float(numbers.abs().max())


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


def read_state(parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """shape, dtype and nested_offset (None without double quantisation) from the JSON beside an nf4 weight.

    Raises ShapeError where it is missing, damaged, or speaks of another format, which is named.
    """
    packed = parts.get(STATE_KEY)
    if packed is None or packed.dtype != torch.uint8 or packed.numel() > MAX_STATE_BYTES:
        raise ShapeError(f"an nf4 matrix needs {STATE_KEY}, at most {MAX_STATE_BYTES} bytes of JSON; it is missing or is not.")
    try:
        state = json.loads(bytes(packed.reshape(-1).tolist()).decode("utf-8"))
        kind, block, shape, dtype = state["quant_type"], state["blocksize"], state["shape"], state["dtype"]
        nested_block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShapeError(f"{STATE_KEY} must be JSON with the matrix's shape; {type(error).__name__}: {error}.") from error
    if kind != "nf4" or block != NF4_BLOCK or nested_block not in (None, NF4_NESTED_BLOCK):
        raise ShapeError(
            f"4-bit weights must be nf4 in blocks of {NF4_BLOCK}, scales in blocks of {NF4_NESTED_BLOCK}; "
            f"got {kind!r}, {block!r} and {nested_block!r}."
        )
    whole = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
    is_number = type(offset) is float or (type(offset) is int and abs(offset) <= LARGEST_FLOAT32)
    fits = is_number if nested_block is not None else offset is None
    if not whole or not isinstance(dtype, str) or dtype not in DTYPES or not fits:
        raise ShapeError(
            f"{STATE_KEY} must give shape, dtype and, with nested scales alone, their offset; "
            f"got {shape!r}, {dtype!r} and {offset!r}."
        )
    return {"shape": (shape[0], shape[1]), "dtype": DTYPES[dtype], "nested_offset": None if offset is None else float(offset)}
