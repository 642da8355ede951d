"""The ways to store one linear layer, and what each of them takes on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from luthier.compression.settings import Bits
from luthier.kernels.storage import GGUF_BLOCKS
from luthier.training.blueprint import stored_bytes

Form = Literal["whole", "repair", "low-rank"]
# What a tensor's entry in the header of a safetensors file takes at most, and the JSON that bitsandbytes keeps with NF4.
ENTRY_BYTES, STATE_BYTES = 160, 200
NF4_TENSORS = 6
PLACE_BYTES = 4


@dataclass(frozen=True)
class Spec:
    """whole: the matrix in `kind`; repair: that and factors of `rank` in `factors`; low-rank: `rank` rows of a matrix of that
    rank and the others as sums of them (the pivoted form), both in `factors`."""

    form: Form
    kind: str = ""
    rank: int = 0
    factors: str = ""

    @property
    def label(self) -> str:
        if self.form == "whole":
            return self.kind
        product = f"rank {self.rank} in {self.factors}"
        return f"{self.kind} + {product}" if self.form == "repair" else product

    @property
    def bits(self) -> float:
        """Of a stored number, about; for plots."""
        kind = self.factors if self.form == "low-rank" else self.kind
        return 8 * stored_bytes(kind, 256, 256, double=True) / 256**2


def whole(kind: str) -> Spec:
    return Spec("whole", kind)


def part_bytes(kind: str, rows: int, columns: int) -> int:
    """What a stored matrix adds to the file, its entries in the header included; a little more rather than less."""
    tensors = NF4_TENSORS if kind == "nf4" else 1
    state = STATE_BYTES if kind == "nf4" else 0
    return stored_bytes(kind, rows, columns, double=True) + state + tensors * ENTRY_BYTES


def spec_bytes(spec: Spec, shape: tuple[int, int]) -> int:
    """What a layer of `shape` takes."""
    rows, columns = shape
    total = part_bytes(spec.kind, rows, columns) if spec.kind else 0
    if spec.rank:
        left = rows - spec.rank if spec.form == "low-rank" else rows
        total += part_bytes(spec.factors, left, spec.rank) + part_bytes(spec.factors, spec.rank, columns)
    if spec.form == "low-rank":
        total += PLACE_BYTES * rows + ENTRY_BYTES
    return total


def rank_at(shape: tuple[int, int], share: float) -> float:
    """The rank at which the pivoted form, r (m + n) - r^2 numbers, takes that share of a matrix."""
    rows, columns = shape
    total = rows + columns
    return (total - math.sqrt(max(0.0, total**2 - 4 * share * rows * columns))) / 2


def rounded_kinds(columns: int, bits: Bits) -> list[str]:
    """The storages without factors, but 16 bits, that a row of so many weights can have."""
    if bits == "16":
        return []
    return fitting(["nf4", "q4_0", "q4_k", *(["q8_0"] if bits == "auto" else [])], columns)


def whole_kinds(columns: int, bits: Bits, sixteen: str) -> list[str]:
    """The storages without factors, 16 bits first where they are allowed. sixteen: which 16 bits the model is taken in."""
    return [*([] if bits == "4" else [sixteen]), *rounded_kinds(columns, bits)]


def factor_kinds(bits: Bits, sixteen: str) -> list[str]:
    """What factors may be stored in."""
    return {"16": [sixteen], "4": ["nf4"], "auto": [sixteen, "nf4"]}[bits]


def fitting(kinds: Iterable[str], columns: int) -> list[str]:
    """Those of which rows of so many weights are whole blocks."""
    return [kind for kind in kinds if kind not in GGUF_BLOCKS or columns % GGUF_BLOCKS[kind][0] == 0]
