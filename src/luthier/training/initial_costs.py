"""What making the factors that an adapter starts from takes, before the run: memory and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.adapters.targets import low_rank_layers
from luthier.config import RunConfig
from luthier.linear import LowRankEmbedding
from luthier.training.blueprint import Blueprint
from luthier.training.initial import NEEDS_ORIGINALS, NEEDS_ROWS, TAKES_OFF
from luthier.training.prepare import adapter_spec

FLOAT_BYTES, DOUBLE_BYTES = 4, 8
# Float64 copies of the largest matrix, and of a square of its longer side, while it is decomposed; counted, and rounded up.
MATRIX_COPIES, SQUARE_COPIES = 3, 4
PROBE_SIDE = 256


@dataclass(frozen=True)
class InitialCosts:
    """frozen: numbers in terms that take the start off, beside those that train; kept: numbers that are kept on disk;
    working_bytes: what decomposing the largest matrix holds; moments_bytes: the least that second moments can be measured
    in; seconds: of decomposing them all; tokens: that inputs are measured on.
    """

    frozen: int = 0
    kept: int = 0
    working_bytes: int = 0
    moments_bytes: int = 0
    seconds: float = 0.0
    tokens: int = 0


def initial_costs(blueprint: Blueprint, config: RunConfig, targets: Sequence[str]) -> InitialCosts:
    """What making the terms' start takes; loftq and qera are for the targets in nf4 alone. targets: names of layers.

    Decompositions are taken to cost 2 `eigh` of the matrix's longer side, 1 where it is pissa's or loftq's shorter one,
    each n^3 times what a small one is measured to.
    """
    if config.init == "default":
        return InitialCosts()
    layers, spec = low_rank_layers(blueprint.skeleton), adapter_spec(config)
    linear = [name for name in targets if not isinstance(layers[name], LowRankEmbedding)]
    if config.init in NEEDS_ORIGINALS:
        linear = [name for name in linear if blueprint.storages.get(f"{name}.weight") == "nf4"]
    if not linear:
        return InitialCosts()
    shapes = {name: layers[name].matrix.shape for name in linear}
    numbers = sum(spec.rank_of(name) * sum(shapes[name]) for name in linear)
    largest, longest = max(rows * columns for rows, columns in shapes.values()), max(map(max, shapes.values()))
    measures = config.init in NEEDS_ROWS
    cubes = sum(2 * max(shape) ** 3 if measures else min(shape) ** 3 for shape in shapes.values())
    return InitialCosts(
        frozen=numbers if config.init in TAKES_OFF else 0,
        kept=numbers,
        working_bytes=DOUBLE_BYTES * (MATRIX_COPIES * largest + SQUARE_COPIES * longest**2),
        moments_bytes=max(DOUBLE_BYTES * columns**2 for _, columns in shapes.values()) if measures else 0,
        seconds=cubes / PROBE_SIDE**3 * _probe_seconds(),
        tokens=config.init_tokens if measures else 0,
    )


def _probe_seconds() -> float:
    """The quicker of two eigendecompositions of side PROBE_SIDE."""
    square = torch.linspace(0, 1, PROBE_SIDE**2, dtype=torch.float64).view(PROBE_SIDE, PROBE_SIDE)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        torch.linalg.eigh(square + square.T)
        times.append(time.perf_counter() - started)
    return min(times)
