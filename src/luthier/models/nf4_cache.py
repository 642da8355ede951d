"""Quantised weights kept in the cache: the next load of the same weights maps them instead of quantising again."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from luthier.config import NF4Options
from luthier.errors import ModelError, PreflightError
from luthier.matrices import Matrix, NF4Matrix
from luthier.models.cache import cache_folder, cache_root, discard, is_whole, publish, seal
from luthier.models.checkpoint import SINGLE_FILE, SafetensorsCheckpoint, WeightSource
from luthier.models.nf4_checkpoint import read_nf4
from luthier.models.safetensors_writer import write_safetensors

FORMAT = 2
HEADER_BYTES = 1 << 20
SAMPLES, SAMPLE_BYTES = 256, 4096


def cached_folder(weights: Path, options: NF4Options) -> Path:
    """Where the quantised copy of these weights stands or will stand. weights: a model folder or a GGUF file.

    The name follows from the content: of every weight file the size, the time it was written, its first MiB (all names,
    shapes and types) and 256 samples of 4 KiB; and from the options. Raises PreflightError where there is none and none can be
    written; one that is there is only read.
    """
    digest = hashlib.sha256(f"{FORMAT} {options.double_quant} {sorted(options.skip_modules)}".encode())
    files = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    for path in files:
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEADER_BYTES))
            for sample in range(SAMPLES):
                file.seek(about.st_size * sample // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    folder = cache_root() / "nf4" / digest.hexdigest()[:32]
    return folder if os.path.lexists(folder) else cache_folder("nf4") / folder.name


def require_room(folder: Path, needed: int) -> None:
    """Raise PreflightError where the disk of the cache has not so many bytes free for the new entry `folder`."""
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise _no_room(folder, needed, f"{free} are free")


def _no_room(folder: Path, needed: int, reason: object) -> PreflightError:
    return PreflightError(
        f"the cache must have room for the quantized weights, {needed} bytes; {folder.parent}: {reason}. "
        "Leave cache_quantized out, or set LUTHIER_CACHE to another folder."
    )


def write_cached(folder: Path, quantized: Mapping[str, NF4Matrix]) -> None:
    """Keep these matrices, by their names in the source, as `folder`, whole or not at all.

    Raises PreflightError where the cache cannot take them.
    """
    tensors = {
        f"{name}{key.removeprefix('weight')}": tensor
        for name, matrix in quantized.items()
        for key, tensor in matrix.tensors().items()
    }
    try:
        with publish(folder) as stage:
            write_safetensors(stage / SINGLE_FILE, tensors)
            seal(stage)
    except OSError as error:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        raise _no_room(folder, needed, error.strerror or error) from error


def open_cached(original: WeightSource, folder: Path) -> tuple[CachedSource | None, str | None]:
    """The weights of `original` with those kept in `folder` in their place, or None; and what a person should know.

    A folder that is not, byte for byte, as it was written, or that does not fit the original, is removed.
    """
    if not os.path.lexists(folder):
        return None, None
    if is_whole(folder):
        try:
            quantized = read_nf4(SafetensorsCheckpoint(folder))
            shapes = {name: sorted(original.shape(name)) for name in original.names()}
            # A Conv1D's weight stands the other way round in the original.
            if all(shapes.get(name) == sorted(matrix.shape) for name, matrix in quantized.items()):
                return CachedSource(original, quantized), None
        except ModelError:  # a seal over something that was never written by `write_cached`
            pass
    discard(folder)
    return None, f"The quantized weights kept in {folder} were damaged; they are removed and made again."


class CachedSource:
    """A WeightSource that gives the weights in `quantized` in NF4 and takes all others from `original`."""

    def __init__(self, original: WeightSource, quantized: dict[str, NF4Matrix]):
        self.original = original
        self._quantized = quantized

    def names(self) -> list[str]:
        return self.original.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._quantized[name].shape if name in self._quantized else self.original.shape(name)

    def dtype(self, name: str) -> torch.dtype | None:
        return self.original.dtype(name)

    def kind(self, name: str) -> str | None:
        return "nf4" if name in self._quantized else self.original.kind(name)

    def matrix(self, name: str) -> Matrix:
        return self._quantized[name] if name in self._quantized else self.original.matrix(name)

    def tensor(self, name: str, *, mapped: bool) -> Tensor:
        return self.original.tensor(name, mapped=mapped)
