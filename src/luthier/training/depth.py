"""How much of a model lies below the lowest thing that trains: no gradient has to reach it, and its output never changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from luthier.errors import PreflightError
from luthier.models.packed import entry_obstacle
from luthier.training.recompute import decoder_layers

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Frozen:
    """The decoder layers below the lowest one that trains, and what keeping their output takes.

    layers: how many, from the first one. cached: their output for every row, `tokens` vectors of `hidden_size` float32, is
    kept on disk, so that a step begins above them.
    """

    layers: int = 0
    cached: bool = False
    tokens: int = 0
    hidden_size: int = 0

    @property
    def cache_bytes(self) -> int:
        return self.tokens * self.hidden_size * FLOAT_BYTES if self.cached else 0


def frozen_layers(model: Any, trained: Iterable[str]) -> int:
    """The number of decoder layers, from the first one, that come before everything that trains.

    trained: names of the modules or parameters that train. What stands neither in a layer nor is the head or the final norm
    is taken to come before all layers, as embeddings do.
    """
    layers = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(layers[0])].removesuffix("0")
    later = (model.get_output_embeddings(), getattr(model.base_model, "norm", None))
    after = [names[id(module)] for module in later if module is not None]
    lowest = len(layers)
    for name in trained:
        number = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and number.isdigit():
            lowest = min(lowest, int(number))
        elif not any(name == other or name.startswith(f"{other}.") for other in after):
            return 0
    return lowest


def refuse_cache(layers: int, drawn: int, rows: int) -> None:
    """Raise PreflightError if keeping the output of the frozen layers would save nothing.

    layers: how many there are; drawn: the examples that the run draws from its `rows`.
    """
    if layers == 0:
        raise PreflightError(
            "cache_frozen keeps what goes into the lowest layer that trains; the first layer, or the embeddings, train, so "
            "there is nothing below. Restrict --targets to upper layers, such as '.*layers\\.2.\\..*_proj', or leave it out."
        )
    if drawn <= rows:
        raise PreflightError(
            f"cache_frozen pays where rows are seen more than once; this run draws {drawn} examples from {rows} rows. "
            "Try --epochs 2 or more, or leave it out."
        )


def refuse_entry(model: Any) -> None:
    """Raise PreflightError if steps of this model cannot begin above its first layer."""
    obstacle = entry_obstacle(model)
    if obstacle is not None:
        raise PreflightError(
            f"cache_frozen needs a model that runs as fused blocks; {type(model).__name__} does not: {obstacle}. Leave it out."
        )
