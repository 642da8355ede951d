"""The header of a GGUF file, read strictly: files come from strangers, so nothing is allocated before it is checked.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from luthier.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
MAX_ARRAY_LENGTH = 1 << 22
MAX_ELEMENTS = 1 << 23
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_HEADER_BYTES = 1 << 28

SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. shape: outermost dimension first, as torch has it; offset_bytes: from the file's start."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A checked header: metadata by key, tensors by name. `read_gguf` makes it."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def data(self, tensor: GGUFTensor, *, mapped: bool) -> np.ndarray:
        """The tensor's bytes, (size_bytes,) uint8: read now, or mapped privately (writes stay in memory)."""
        try:
            if mapped:
                return np.memmap(self.path, np.uint8, mode="c", offset=tensor.offset_bytes, shape=(tensor.size_bytes,))
            data = np.fromfile(self.path, np.uint8, count=tensor.size_bytes, offset=tensor.offset_bytes)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path} can no longer be read: {error}.") from error
        if data.size != tensor.size_bytes:
            raise ModelError(f"{self.path} became shorter while it was read. Download the model again.")
        return data


class _BrokenFile(Exception):
    """What is wrong, without the path; `read_gguf` adds it."""


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file. Raises one ModelError for anything that is not as the format says."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _BrokenFile(f"it has {size} bytes, too few for a header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                metadata, tensors = _Header(content, size).read()
    except _BrokenFile as error:
        raise ModelError(f"{path} is not a whole GGUF file: {error}. Download it again.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error
    return GGUFFile(path, metadata, tensors)


class _Header:
    def __init__(self, content: mmap.mmap, size: int):
        self.content, self.size, self.position = content, size, 0
        self.elements = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        magic = self._take(4)
        if magic != MAGIC:
            raise _BrokenFile(f"it begins with {magic!r}, not {MAGIC!r}")
        version = self._number("<I")
        if version not in VERSIONS:
            raise _BrokenFile(f"its version is {version}, not {' or '.join(map(str, VERSIONS))}")
        tensor_count, key_count = self._number("<Q"), self._number("<Q")
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise _BrokenFile(f"it claims {tensor_count} tensors and {key_count} keys")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._text()
            if key in metadata:
                raise _BrokenFile(f"key {key!r} appears twice")
            metadata[key] = self._value(key)
        places = [self._tensor() for _ in range(tensor_count)]
        return metadata, self._place(places, _alignment(metadata))

    def _take(self, count: int) -> bytes:
        if count > self.size - self.position:
            raise _BrokenFile(f"it ends at byte {self.size}, inside its header")
        if self.position + count > MAX_HEADER_BYTES:
            raise _BrokenFile(f"its header is longer than {MAX_HEADER_BYTES} bytes")
        taken = self.content[self.position : self.position + count]
        self.position += count
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self) -> str:
        try:
            return self._take(self._number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _BrokenFile(f"text before byte {self.position} is not UTF-8") from error

    def _type(self, key: str) -> GGUFValueType:
        number = self._number("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise _BrokenFile(f"{key!r} has the unknown type {number}") from error

    def _value(self, key: str) -> Any:
        kind = self._type(key)
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        inner = self._type(key)
        count = self._number("<Q")
        self.elements += count
        if count > MAX_ARRAY_LENGTH or self.elements > MAX_ELEMENTS:
            raise _BrokenFile(f"{key!r} claims {count} elements")
        if inner == GGUFValueType.STRING:
            return [self._text() for _ in range(count)]
        if inner not in SCALARS:
            raise _BrokenFile(f"{key!r} is an array of arrays")
        form = SCALARS[inner]
        return list(struct.unpack(f"<{count}{form[1]}", self._take(count * struct.calcsize(form))))

    def _tensor(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._text()
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise _BrokenFile(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        number = self._number("<I")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise _BrokenFile(f"tensor {name!r} has the unknown type {number}") from error
        return name, kind, shape, self._number("<Q")

    def _place(
        self, found: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GGUFTensor]:
        start = math.ceil(self.position / alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset in found:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if name in tensors:
                raise _BrokenFile(f"tensor {name!r} appears twice")
            if math.prod(shape) == 0 or shape[-1] % block or offset % alignment:
                raise _BrokenFile(f"tensor {name!r} has shape {shape} and offset {offset}, which do not fit type {kind.name}")
            size = math.prod(shape) // block * block_bytes
            if start + offset + size > self.size:
                raise _BrokenFile(f"tensor {name!r} ends at byte {start + offset + size}, the file at {self.size}")
            tensors[name] = GGUFTensor(name, kind, shape, start + offset, size)
        for before, after in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset_bytes)):
            if before.offset_bytes + before.size_bytes > after.offset_bytes:
                raise _BrokenFile(f"tensors {before.name!r} and {after.name!r} overlap")
        return tensors


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise _BrokenFile(f"general.alignment is {alignment!r}, not a power of two up to {MAX_ALIGNMENT}")
    return alignment
