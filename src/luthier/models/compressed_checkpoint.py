"""Weights of a compressed model: the tensors of a folder put together as its description says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from luthier.errors import ModelError, ShapeError, bulleted
from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS
from luthier.matrices import DenseMatrix, FactoredMatrix, GGUFMatrix, Matrix, NF4Matrix, StoredMatrix
from luthier.models.checkpoint import DTYPES, SafetensorsCheckpoint
from luthier.models.compressed_description import DESCRIPTION_FILE, Description, LayerEntry, check_files, read_description
from luthier.models.mixed_checkpoint import MixedCheckpoint
from luthier.models.nf4_checkpoint import nf4_matrix, part_names
from luthier.units import shortened

LONGEST_PROBLEM = 400
DTYPE_NAMES = {kind: name for kind, dtype in DENSE_DTYPES.items() for name, known in DTYPES.items() if known == dtype}


def compressed_checkpoint(folder: Path) -> MixedCheckpoint:
    """A folder with a compression.json. Tensors stay mapped; nothing is copied or widened.

    The description is checked against itself, then the files' hashes, then every tensor's dtype and shape against the
    description, before a matrix is made. Raises ModelError with every problem found at that stage.
    """
    description = read_description(folder)
    plain = SafetensorsCheckpoint(folder, description.files, DESCRIPTION_FILE)
    check_files(folder, description)
    reader = _Reader(plain, description)
    return MixedCheckpoint(plain, reader.read(), reader.used)


class _Reader:
    """Makes the matrices that are no plain tensors. used: the names of the tensors they are made of."""

    def __init__(self, plain: SafetensorsCheckpoint, description: Description):
        self._plain, self._description = plain, description
        self._present = set(plain.names())
        self._rights: dict[str, StoredMatrix] = {}
        self._problems: list[str] = []
        self.used: set[str] = set()

    def read(self) -> dict[str, Matrix]:
        found: dict[str, Matrix] = {}
        owners_first = sorted(self._description.layers.items(), key=lambda item: item[1].right_of is not None)
        for name, entry in owners_first:
            try:
                matrix = self._matrix(name, entry)
            except ShapeError as error:
                self._problems.append(shortened(f"{name}: {error}", LONGEST_PROBLEM))
                continue
            if matrix is not None:
                found[f"{name}.weight"] = matrix
        if self._problems:
            raise ModelError(
                f"the weights of {self._plain.folder} must be as its compression.json says:\n{bulleted(self._problems)}\n"
                "Copy the model again."
            )
        return found

    def _matrix(self, name: str, entry: LayerEntry) -> Matrix | None:
        """The layer's matrix; None where it is one plain tensor, which is read like that of any folder."""
        factored = entry.factored
        if entry.kind in DENSE_DTYPES:
            self._check_header(f"{name}.weight", DTYPE_NAMES[entry.kind], (entry.rows, entry.columns))
            return None
        if factored is None:
            return self._stored(f"{name}.weight", entry.kind, entry.rows, entry.columns)
        places = self._places(f"{name}.places", entry.rows) if factored.pivoted else None
        if places is not None and not torch.equal(places.sort().values, torch.arange(entry.rows, dtype=torch.int32)):
            raise ShapeError(f"{name}.places must hold each of 0 to {entry.rows - 1} once.")
        rows = entry.rows if places is None else entry.rows - factored.rank
        if entry.right_of is None:
            self._rights[name] = self._stored(f"{name}.right.weight", factored.right, factored.rank, entry.columns)
        owner = entry.right_of or name
        if owner not in self._rights:
            raise ShapeError(f"the right factor of {owner} is not as it should be.")
        base = self._stored(f"{name}.weight", factored.base, entry.rows, entry.columns) if factored.base else None
        left = self._stored(f"{name}.left.weight", factored.left, rows, factored.rank)
        return FactoredMatrix(left, self._rights[owner], base=base, places=places)

    def _stored(self, key: str, kind: str, rows: int, columns: int) -> StoredMatrix:
        if kind == "nf4":
            return self._nf4(key, rows, columns)
        if kind in GGUF_BLOCKS:
            weights, size = GGUF_BLOCKS[kind]
            if columns % weights:
                raise ShapeError(f"{kind} stores rows in blocks of {weights} weights; {key} has rows of {columns}.")
            blocks = self._tensor(key, "U8", (rows, columns // weights * size))
            # Scales inside blocks are float16, and are read as such.
            return GGUFMatrix(blocks if blocks.data_ptr() % 2 == 0 else blocks.clone(), kind)
        return DenseMatrix(self._tensor(key, DTYPE_NAMES[kind], (rows, columns)))

    def _nf4(self, key: str, rows: int, columns: int) -> NF4Matrix:
        names = part_names(key, self._present)
        self.used.update(names.values())
        matrix = nf4_matrix(self._plain, names)
        if matrix.shape != (rows, columns):
            raise ShapeError(f"{key} must be {(rows, columns)}; it is {matrix.shape}.")
        return matrix

    def _places(self, key: str, rows: int) -> Tensor:
        return self._tensor(key, "I32", (rows,))

    def _tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        self._check_header(key, dtype, shape)
        self.used.add(key)
        return self._plain.tensor(key, mapped=True)

    def _check_header(self, key: str, dtype: str, shape: tuple[int, ...]) -> None:
        if key not in self._present:
            raise ShapeError(f"{key} is missing.")
        got = self._plain.stored_dtype(key), self._plain.shape(key)
        if got != (dtype, shape):
            raise ShapeError(f"{key} must be {dtype} {shape}; it is {got[0]} {got[1]}.")
