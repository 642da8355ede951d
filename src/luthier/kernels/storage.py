"""How a frozen matrix lies in memory: the kinds, their tensors, and what each must look like."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from luthier.errors import ShapeError, nearest

DENSE_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# GGUF kinds: weights in a block, bytes in a block.
GGUF_BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}
# The position of a kind is its number in the C ABI (csrc/linear.h).
KINDS = (*DENSE_DTYPES, "nf4", *GGUF_BLOCKS)
# What describes one matrix in an op's flat arguments: five integers (number of the kind, out_features, in_features,
# transposed, number of tensors) and two floats (NF4's offset, the scaling of the layer's term).
LAYOUT, NUMBERS = 5, 2
NF4_BLOCK = 64
NF4_NESTED_BLOCK = 256


@dataclass(frozen=True, eq=False)
class Storage:
    """A frozen matrix W (out_features, in_features) as it is stored.

    kind "f32", "bf16", "f16": data is (out, in) of that dtype, contiguous; (in, out) where `transposed`.
    kind "nf4": data is uint8, one byte two weights, the even index of the flat row-major matrix in the high nibble;
      code float32 (16,). A scale for 64 weights: either absmax float32 (blocks,), or absmax uint8 (blocks,) with
      nested_map float32 (256,), nested_absmax float32 (ceil(blocks / 256),) and offset:
      scale[i] = nested_map[absmax[i]] * nested_absmax[i // 256] + offset. This is bitsandbytes' layout.
    GGUF kinds "q4_0" ... "q6_k": data is uint8, rows of whole blocks.
    Raises ShapeError if a tensor does not fit the kind and shape.
    """

    kind: str
    shape: tuple[int, int]
    data: Tensor
    absmax: Tensor | None = None
    code: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_map: Tensor | None = None
    offset: float = 0.0
    transposed: bool = False

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ShapeError(problem)

    @classmethod
    def dense(cls, weight: Tensor, *, transposed: bool = False) -> Storage:
        """weight: (out, in), or (in, out) where `transposed`; float32, bfloat16 or float16."""
        kind = next((name for name, dtype in DENSE_DTYPES.items() if dtype == weight.dtype), None)
        if kind is None or weight.ndim != 2:
            raise ShapeError(
                f"a dense matrix has two dimensions in f32, bf16 or f16; got {tuple(weight.shape)} {weight.dtype}."
            )
        rows, columns = weight.shape
        return cls(kind, (columns, rows) if transposed else (rows, columns), weight, transposed=transposed)

    def tensors(self) -> list[Tensor]:
        """The stored tensors in a fixed order; how many there are follows from kind and absmax's dtype."""
        present = (self.data, self.absmax, self.code, self.nested_absmax, self.nested_map)
        return [tensor for tensor in present if tensor is not None]

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def from_parts(kind: str, shape: tuple[int, int], tensors: list[Tensor], offset: float, transposed: bool) -> Storage:
    """The inverse of `Storage.tensors`."""
    return Storage(kind, shape, *_five(tensors), offset, transposed)


def storages_of(stored: list[Tensor], layout: list[int], numbers: list[float]) -> list[Storage]:
    """The matrices that an op's flat arguments describe, checked; they must have the same in_features.

    Raises ShapeError where a tensor does not fit its kind and shape, or the lists do not fit together.
    """
    count = len(layout) // LAYOUT
    if count == 0 or len(layout) != LAYOUT * count or len(numbers) != NUMBERS * count or sum(layout[4::LAYOUT]) != len(stored):
        raise ShapeError(
            f"layout has {LAYOUT} integers a matrix, the last its tensors, and numbers {NUMBERS}; "
            f"got {len(layout)} and {len(numbers)} for {len(stored)} tensors."
        )
    storages: list[Storage] = []
    at = 0
    for p in range(count):
        number, out_features, in_features, transposed, tensors = layout[LAYOUT * p : LAYOUT * (p + 1)]
        if not 0 <= number < len(KINDS) or transposed not in (0, 1):
            raise ShapeError(f"a kind's number is below {len(KINDS)}, transposed 0 or 1; got {number} and {transposed}.")
        offset, shape = numbers[NUMBERS * p], (out_features, in_features)
        storages.append(from_parts(KINDS[number], shape, stored[at : at + tensors], offset, transposed == 1))
        at += tensors
    if any(storage.shape[1] != storages[0].shape[1] for storage in storages):
        raise ShapeError(f"layers of a group share x; got in_features {[storage.shape[1] for storage in storages]}.")
    return storages


def _five(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if not 1 <= len(tensors) <= 5:
        raise ShapeError(f"a matrix is stored in 1 to 5 tensors; got {len(tensors)}.")
    absmax, code, nested_absmax, nested_map = [*tensors[1:], None, None, None, None][:4]
    return tensors[0], absmax, code, nested_absmax, nested_map


def _problem(s: Storage) -> str | None:
    """The first thing about the tensors that does not fit, or None."""
    if s.kind not in KINDS:
        return f"storage is one of {', '.join(KINDS)}; got {s.kind!r}.{nearest(s.kind, KINDS)}"
    out_features, in_features = s.shape
    if out_features < 1 or in_features < 1:
        return f"a matrix has at least one row and one column; got {s.shape}."
    if s.kind != "nf4" and (s.absmax is not None or s.code is not None):
        return f"only nf4 has scales beside its data; got {len(s.tensors())} tensors for {s.kind}."
    if s.kind in DENSE_DTYPES:
        stored = (in_features, out_features) if s.transposed else s.shape
        return _unfit(s.data, f"the {s.kind} matrix", DENSE_DTYPES[s.kind], stored)
    if s.transposed:
        return f"only dense matrices may lie transposed; got {s.kind}."
    if s.kind == "nf4":
        return _nf4_problem(s)
    weights, size = GGUF_BLOCKS[s.kind]
    if in_features % weights:
        return f"{s.kind} stores rows in blocks of {weights} weights; got rows of {in_features}."
    return _unfit(s.data, f"the {s.kind} blocks", torch.uint8, (out_features * in_features // weights * size,), flat=True)


def _nf4_problem(s: Storage) -> str | None:
    weights = s.shape[0] * s.shape[1]
    blocks = -(-weights // NF4_BLOCK)
    if s.absmax is None or s.code is None:
        return "nf4 storage needs absmax and code; one of them is missing."
    devices = {tensor.device for tensor in s.tensors()}
    if len(devices) > 1:
        return f"a matrix's tensors are on one device; got {', '.join(sorted(map(str, devices)))}."
    double = s.absmax.dtype == torch.uint8
    if double != (s.nested_absmax is not None and s.nested_map is not None):
        return f"nested scales go with absmax in uint8, and only with it; got absmax in {s.absmax.dtype}."
    problem = (
        _unfit(s.data, "the nf4 nibbles", torch.uint8, (-(-weights // 2),), flat=True)
        or _unfit(s.absmax, "absmax", torch.uint8 if double else torch.float32, (blocks,))
        or _unfit(s.code, "code", torch.float32, (16,))
    )
    if problem or s.nested_absmax is None or s.nested_map is None:
        return problem
    nested = -(-blocks // NF4_NESTED_BLOCK)
    return _unfit(s.nested_absmax, "nested_absmax", torch.float32, (nested,)) or _unfit(
        s.nested_map, "nested_map", torch.float32, (256,)
    )


def _unfit(tensor: Tensor, what: str, dtype: torch.dtype, shape: tuple[int, ...], *, flat: bool = False) -> str | None:
    """Why `tensor` is not a contiguous tensor of this dtype and shape (`flat`: of this many elements), or None."""
    if tensor.dtype != dtype:
        return f"{what} must be {dtype}; got {tensor.dtype}."
    fits = tensor.numel() == prod(shape) if flat else tensor.shape == shape
    if not fits:
        return f"{what} must have {'elements' if flat else 'shape'} {shape[0] if flat else shape}; got {tuple(tensor.shape)}."
    if not tensor.is_contiguous():
        return f"{what} must be contiguous; got strides {tensor.stride()}. Try .contiguous()."
    return None
