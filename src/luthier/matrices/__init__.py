"""Frozen storage. A matrix knows its shape and bytes, can be read in float32, and multiplies both ways."""

from luthier.matrices.dense import DenseMatrix
from luthier.matrices.gguf import GGUFMatrix
from luthier.matrices.nf4 import NF4Matrix

Matrix = DenseMatrix | NF4Matrix | GGUFMatrix
MATRICES = (DenseMatrix, NF4Matrix, GGUFMatrix)

__all__ = ["MATRICES", "DenseMatrix", "GGUFMatrix", "Matrix", "NF4Matrix"]
