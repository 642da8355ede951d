"""Low-rank approximation of weights: tensors in, tensors out."""

from luthier.lowrank.repair import Factors, eva, loftq, pissa, qera, redistributed_ranks
from luthier.lowrank.singular import top_eigenvectors, top_singular

__all__ = ["Factors", "eva", "loftq", "pissa", "qera", "redistributed_ranks", "top_eigenvectors", "top_singular"]
