"""Low-rank approximation of weights, their rounding to few bits, and the choice between the two: tensors in, tensors out."""

from luthier.lowrank.allocation import Allocation, Choice, allocate
from luthier.lowrank.decompose import Decomposition, projected, scaled_svd, stacked, truncated_svd, whitened_svd
from luthier.lowrank.factors import Factors, Pivoted, pivoted, rebalanced, refit_left, split
from luthier.lowrank.repair import eva, loftq, pissa, qera
from luthier.lowrank.rounding import damped
from luthier.lowrank.rounding_factors import round_factors, round_pivoted
from luthier.lowrank.rounding_gguf import round_gguf
from luthier.lowrank.rounding_nf4 import round_nf4
from luthier.lowrank.singular import top_eigenvectors, top_singular

__all__ = [
    "Allocation", "Choice", "Decomposition", "Factors", "Pivoted", "allocate", "damped", "eva", "loftq", "pissa", "pivoted",
    "projected", "qera", "rebalanced", "refit_left", "round_factors", "round_gguf", "round_nf4", "round_pivoted", "scaled_svd",
    "split", "stacked", "top_eigenvectors", "top_singular", "truncated_svd", "whitened_svd",
]  # fmt: skip
