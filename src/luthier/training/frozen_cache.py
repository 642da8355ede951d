"""What goes into the lowest layer that trains, computed once a row and kept on disk for all epochs.

The layers below never change, so neither does what they give for a row: reading it is exact. One file holds float32 vectors,
row after row in the order of the data; a second one says what they were made from, with the first one's sha256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from luthier.data import Example
from luthier.data.packing import Pack, pack_examples
from luthier.disk import remove_tree, sha256_of, write_atomically
from luthier.errors import CheckpointError, PreflightError
from luthier.models.blocks import Entry
from luthier.models.packed import packed_inputs
from luthier.progress import Progress
from luthier.training.files import explain_write_error, to_json
from luthier.units import size_text

VECTORS, FACTS = "inputs.f32", "inputs.json"
FORMAT = 1
FLOAT_BYTES = 4
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Origin:
    """What the vectors follow from. rows: a sha256 of the token ids of all rows; the last three decide how sums are rounded."""

    layer: int
    base: str
    rows: str
    max_tokens: int
    share: bool
    format: int = FORMAT


class FrozenCache:
    """The vectors of `examples`, mapped. Made by `open_frozen_cache`.

    What is read is let go of again after each pack, so that the process holds one pack's vectors and not the file.
    """

    def __init__(self, folder: Path, layer: int, hidden_size: int, examples: Sequence[Example]):
        self._folder = folder
        self._layer = layer
        self._hidden_size = hidden_size
        self._first = _first_vectors(examples)
        with (folder / VECTORS).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def entry(self, pack: Pack, batch: Sequence[Example]) -> Entry:
        """The step's beginning for a pack of `batch`, which are some of the examples, the very objects.

        Of tokens that rows share any row's vector will do: they follow from the same tokens.
        """
        wanted = np.empty(pack.tokens, np.int64)
        for row, places in zip(pack.rows, pack.places, strict=True):
            first = self._first[id(batch[row])]
            wanted[places.numpy()] = np.arange(first, first + len(places))
        vectors = np.frombuffer(self._map, np.float32).reshape(-1, self._hidden_size)
        hidden = torch.from_numpy(vectors[wanted])
        del vectors
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return Entry(self._layer, hidden)

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()


def remove_frozen(folder: Path) -> None:
    """Delete what was kept in `folder`, if it is there. Raises CheckpointError where it cannot be deleted."""
    try:
        remove_tree(folder)
    except OSError as error:
        raise CheckpointError(
            f"what cache_frozen has kept must be deletable at the end of a run; {folder}: {error}. Delete it, "
            "then go on with `luthier resume`."
        ) from error


def open_frozen_cache(
    folder: Path,
    model: Any,
    examples: Sequence[Example],
    *,
    layer: int,
    base: str,
    max_tokens: int,
    share: bool,
    progress: Progress,
    note: Callable[[str], None],
) -> FrozenCache:
    """The vectors that go into decoder layer `layer` for `examples`, made in `folder` unless a whole file stands there.

    base: the fingerprint of the base model. max_tokens, share: as for `pack_examples`, for the passes that make them.
    A file of another origin, or one that is damaged, is made again, which `note` says of a damaged one.
    Raises PreflightError if the disk has no room, CheckpointError if it refuses to be written to; and what `progress` raises,
    after which nothing is taken for whole.
    """
    hidden_size = int(model.config.get_text_config().hidden_size)
    size = sum(len(example.ids) for example in examples) * hidden_size * FLOAT_BYTES
    origin = Origin(layer, base, _sha256_of_rows(examples), max_tokens, share)
    if (folder / FACTS).exists():
        reason = _unusable(folder, origin, size)
        if reason is None:
            return FrozenCache(folder, layer, hidden_size, examples)
        note(f"the inputs kept in {folder} are made again: {reason}.")
    try:
        remove_tree(folder)
        folder.mkdir(parents=True)
        _refuse_without_room(folder, size)
        with (folder / VECTORS).open("wb") as file:
            _reserve(file, size)
            _fill(file, model, examples, origin, progress)
        write_atomically(folder / FACTS, to_json({**asdict(origin), "sha256": sha256_of(folder / VECTORS)}))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(explain_write_error(error, folder, size)) from error
    return FrozenCache(folder, layer, hidden_size, examples)


def held_bytes(folder: Path) -> int:
    """What an earlier process has kept in `folder`, whole or not; it is used again, or removed before anything is written."""
    try:
        return (folder / VECTORS).stat().st_size
    except OSError:
        return 0


def _first_vectors(examples: Sequence[Example]) -> dict[int, int]:
    """By the identity of each example, the number of its first vector in the file."""
    begins = accumulate((len(example.ids) for example in examples), initial=0)
    return {id(example): first for example, first in zip(examples, begins, strict=False)}


def _sha256_of_rows(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.ids).to_bytes(8, "little"))
        digest.update(np.asarray(example.ids, np.int64).tobytes())
        digest.update(bytes(example.supervised))  # it decides which tokens' vectors are written
    return digest.hexdigest()


def _unusable(folder: Path, origin: Origin, size: int) -> str | None:
    """Why the file in `folder` is not the one that `origin` describes, or None. Reads it whole."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            return f"{FACTS} is damaged"
        sha256 = facts.pop("sha256", None)
        if facts != asdict(origin):
            return "they were made from something else"
        if (folder / VECTORS).stat().st_size != size or sha256_of(folder / VECTORS) != sha256:
            return f"{VECTORS} is damaged"
    except (OSError, ValueError, RecursionError):
        return f"{FACTS} or {VECTORS} is damaged"
    return None


def _refuse_without_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        remove_tree(folder)
        raise PreflightError(
            f"what cache_frozen keeps must fit the disk; it needs {size_text(size)} and {size_text(free)} are free. "
            "Free some space, choose another --out, or leave it out."
        )


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the room on disk now, where the system can, so that a full disk shows before anything is computed."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        file.truncate(size)


def _fill(file: BinaryIO, model: Any, examples: Sequence[Example], origin: Origin, progress: Progress) -> None:
    first = _first_vectors(examples)
    for begin in range(0, len(examples), ROWS_AT_ONCE):
        part, done = examples[begin : begin + ROWS_AT_ONCE], begin
        for pack in pack_examples(part, max_tokens=origin.max_tokens, share=origin.share):
            hidden = packed_inputs(model, pack.ids, pack.starts, origin.layer, pack.parents)
            for row, places in zip(pack.rows, pack.places, strict=True):
                _write_vectors(file, first[id(part[row])], hidden[places])
            done += len(pack.rows)
            progress("computing the frozen layers", done, len(examples))


def _write_vectors(file: BinaryIO, first: int, vectors: Tensor) -> None:
    """vectors: (length, hidden) float32."""
    file.seek(first * vectors.shape[1] * FLOAT_BYTES)
    file.write(vectors.contiguous().numpy().data)
