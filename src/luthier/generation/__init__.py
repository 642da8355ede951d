"""Text made token by token: a native decoder with cached keys and values, sampling, and constraints."""

from luthier.generation.constraint import Constraint, LabelConstraint
from luthier.generation.generator import Generator, generation_obstacle
from luthier.generation.sampling import Sampling

__all__ = ["Constraint", "Generator", "LabelConstraint", "Sampling", "generation_obstacle"]
