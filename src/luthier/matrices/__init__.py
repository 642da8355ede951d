"""Frozen storage. A matrix knows its shape and bytes, can be read in float32, and multiplies both ways."""

from luthier.matrices.dense import DenseMatrix
from luthier.matrices.factored import FactoredMatrix
from luthier.matrices.gguf import GGUFMatrix
from luthier.matrices.nf4 import NF4Matrix
from luthier.matrices.stored import stored

Matrix = DenseMatrix | NF4Matrix | GGUFMatrix | FactoredMatrix
# Those that hold numbers themselves. A factored one is made of them, and they are found inside it.
MATRICES = (DenseMatrix, NF4Matrix, GGUFMatrix)

__all__ = ["MATRICES", "DenseMatrix", "FactoredMatrix", "GGUFMatrix", "Matrix", "NF4Matrix", "stored"]
