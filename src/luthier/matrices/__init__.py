"""Frozen storage. A matrix knows its shape and bytes, can be read in float32, and multiplies both ways."""

from luthier.matrices.dense import DenseMatrix
from luthier.matrices.factored import FactoredMatrix
from luthier.matrices.frozen import StoredMatrix
from luthier.matrices.gguf import GGUFMatrix
from luthier.matrices.nf4 import NF4Matrix
from luthier.matrices.stored import converted, stored

# A factored matrix is made of stored ones, which are found inside it.
Matrix = StoredMatrix | FactoredMatrix

__all__ = ["DenseMatrix", "FactoredMatrix", "GGUFMatrix", "Matrix", "NF4Matrix", "StoredMatrix", "converted", "stored"]
