"""A few numbers of the base model, saved beside an adapter, that tell later whether it is loaded onto the same base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapters.attachment import disabled
from luthier.adapters.targets import low_rank_layers
from luthier.errors import AdapterError, one_line
from luthier.strict_json import read_json

BASE_FILE = "luthier_base.json"
SAMPLED_VALUES = 512

# Rounding to bfloat16 moves a number by at most 2^-9 of itself; storing the base in another dtype stays below this.
LARGEST_DIFFERENCE = 2.0**-8
# How far rounding to a kind moves the weights of trained models, as a share of their norm, generously: measured 0.095 for nf4.
ROUNDING = {
    **dict.fromkeys(("nf4", "q4_0", "q4_1", "q4_k"), 0.15),
    **dict.fromkeys(("q5_0", "q5_1", "q5_k"), 0.08),
    **{"q6_k": 0.04, "q8_0": 0.015},
}


def write_base_record(model: nn.Module, folder: Path, base_name: str | None) -> None:
    """Write `folder`/luthier_base.json: the base's name and, of each matrix, the shape and a few values evenly spread."""
    record = {"version": 1, "name": base_name, "matrices": _sample(model)}
    (folder / BASE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Comparison:
    """problem: what shows that the base is another one; note: how the same base is stored otherwise; None if nothing does."""

    problem: str | None = None
    note: str | None = None


def compare_base(model: nn.Module, folder: Path) -> Comparison | None:
    """Whether the adapter in `folder` was made on the base that `model` is.

    Weights may differ by what rounding to 16 bits does; where one of the two is stored in fewer bits than the other, by
    what rounding to these does, which is worth a note. An adapter of another program has no record: None, nothing is known.
    Raises AdapterError if the record is damaged.
    """
    path = folder / BASE_FILE
    if not path.exists():
        return None
    try:
        record = read_json(path)
        name = record["name"]
        before = _Sample.of(record["matrices"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise AdapterError(f"{path} must be as it was saved; {reason}. Copy the adapter again.") from error
    now = _Sample.of(_sample(model))
    made_on = f" It was made on {name!r}." if name else ""
    if before.shapes.keys() != now.shapes.keys():
        return Comparison(f"{len(before.shapes.keys() ^ now.shapes.keys())} layers differ by name.{made_on}")
    for key, shape in before.shapes.items():
        if shape != now.shapes[key] or before.values[key].shape != now.values[key].shape:
            return Comparison(f"{key} was {shape} and is {now.shapes[key]}.{made_on}")
    was, is_now = before.joined(), now.joined()
    difference = float((was - is_now).norm() / was.norm().clamp_min(1e-30))
    if difference <= LARGEST_DIFFERENCE:
        return Comparison()
    kinds = " and ".join(sorted(before.kinds)), " and ".join(sorted(now.kinds))
    if kinds[0] != kinds[1] and difference <= before.rounding() + now.rounding():
        return Comparison(
            note=f"The adapter was trained on weights stored in {kinds[0]}, here they are in {kinds[1]}, "
            f"which differ by {difference:.2g} of their size."
        )
    what = "16 bits" if kinds[0] == kinds[1] else f"{kinds[1]} from {kinds[0]}"
    return Comparison(f"its weights differ by {difference:.2g} of their size, more than rounding to {what} can.{made_on}")


@dataclass(frozen=True)
class _Sample:
    """Of each matrix the shape and a few values, by name; and in which kinds they are stored."""

    shapes: dict[str, tuple[int, ...]]
    values: dict[str, Tensor]
    kinds: frozenset[str]

    @classmethod
    def of(cls, matrices: dict[str, dict[str, Any]]) -> _Sample:
        shapes = {key: tuple(entry["shape"]) for key, entry in matrices.items()}
        values = {key: torch.tensor(entry["values"], dtype=torch.float64) for key, entry in matrices.items()}
        return cls(shapes, values, frozenset(str(entry.get("kind", "f32")) for entry in matrices.values()))

    def joined(self) -> Tensor:
        return torch.cat(list(self.values.values()))

    def rounding(self) -> float:
        return max(ROUNDING.get(kind, LARGEST_DIFFERENCE) for kind in self.kinds)


@torch.no_grad()
def _sample(model: nn.Module) -> dict[str, dict[str, Any]]:
    with disabled(model):
        layers = low_rank_layers(model)
        each = max(1, SAMPLED_VALUES // len(layers))
        sample = {}
        for name, layer in layers.items():
            rows, columns = layer.matrix.shape
            flat = torch.arange(1, each + 1, dtype=torch.int64) * (rows * columns) // (each + 1)
            values = layer.matrix.rows(flat // columns)[torch.arange(each), flat % columns]
            sample[name] = {"shape": [rows, columns], "kind": layer.matrix.kind, "values": values.tolist()}
        return sample
