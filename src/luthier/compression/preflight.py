"""What can be said of a compression before it is begun: from headers, configuration and the disk alone."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from luthier.adapters.targets import low_rank_layers
from luthier.compression.candidates import RANK_STEP
from luthier.compression.reading import check_readable
from luthier.compression.settings import CompressSettings
from luthier.compression.specs import Spec, factor_kinds, part_bytes, rounded_kinds, spec_bytes, whole, whole_kinds
from luthier.config import NF4Options, Storage
from luthier.errors import PreflightError
from luthier.generation.generator import position_limit
from luthier.linear import LowRankEmbedding
from luthier.matrices import DenseMatrix
from luthier.models.checkpoint import WeightSource
from luthier.models.fill import Filler
from luthier.models.load import open_weights
from luthier.models.skeleton import build_skeleton
from luthier.models.source import resolve
from luthier.models.stored import stored_as
from luthier.progress import Progress
from luthier.training.blueprint import put_layers, stored_bytes
from luthier.units import size_text

# Weights in these lie on a grid of 4 bits already, which the same storage finds again.
FOUR_BIT_BLOCKS = ("q4_0", "q4_1", "q4_k", "nf4")
# Plans that stand on the disk until one is chosen, plain NF4 not counted: allocated and uniform; with healing one in factors
# throughout and the healed one.
PLANS, PLANS_TO_HEAL = 2, 4


@dataclass(frozen=True)
class Survey:
    """sixteen: which 16 bits the model is taken in; numbers: of all its weights; own_bytes: as they are stored where it comes
    from; budget: in bytes; window: tokens of a window, as many as were asked for or as the model has positions."""

    sixteen: Storage
    numbers: int
    own_bytes: int
    budget: int
    window: int
    notes: list[str] = field(default_factory=list)


def survey(settings: CompressSettings, progress: Progress | None = None) -> Survey:
    """Look at all that a compression needs; no weight is read, nothing is written.

    Raises PreflightError for a budget below the smallest form of the model or that the model fits as it is, a folder that
    cannot be written to and a disk without room; DataError for texts that are not there; and what loading raises for what
    configuration and headers show.
    """
    for path, flag in ((settings.data, "--data"), (settings.eval_data, "--eval-data")):
        if path is not None:
            check_readable(path, flag, offline=settings.offline)
    _check_folder(settings.out)
    source = resolve(settings.model, offline=settings.offline, progress=progress)
    config, weights = open_weights(source.path)
    sixteen: Storage = "f16" if _plain_dtypes(weights) == {torch.float16} else "bf16"
    outline = _outline(config, weights, sixteen, str(source.path))
    window = min(settings.window, position_limit(outline.model) or settings.window)
    budget = settings.budget.bytes_of(outline.numbers)
    found = Survey(sixteen, outline.numbers, outline.own_bytes, budget, window, _origin_notes(weights))
    if window < settings.window:
        found.notes.append(f"Windows have {window} tokens, as many as the model has positions.")
    smallest = _smallest_bytes(outline.model, settings, sixteen) + 2 * outline.rest
    _check_budget(settings, found, smallest)
    _check_room(settings, found)
    return found


@dataclass(frozen=True)
class _Outline:
    """A model without its numbers. numbers: how many it has, rest of them in no matrix; own_bytes: as it comes, the rest in
    16 bits."""

    model: PreTrainedModel
    numbers: int
    rest: int
    own_bytes: int


def _outline(config: PretrainedConfig, weights: WeightSource, sixteen: Storage, where: str) -> _Outline:
    model = build_skeleton(config, where)
    filler = Filler(model, weights, sixteen, where, NF4Options())
    keys, tied = filler.storages(), filler.tied
    shapes = {key: tuple(model.get_parameter(key).shape) for key in keys}
    kinds = {key: stored_as(weights, filler.source_name(key)) for key in keys}
    own = sum(stored_bytes(kinds[key], *shapes[key], double=True) for key in keys)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    rest = numbers - sum(rows * columns for rows, columns in shapes.values())
    put_layers(model, lambda _name, rows, columns: DenseMatrix(torch.empty(rows, columns, device="meta")), tied=tied)
    return _Outline(model, numbers, rest, own + 2 * rest)


def _plain_dtypes(weights: WeightSource) -> set[torch.dtype | None]:
    return {weights.dtype(name) for name in weights.names() if weights.kind(name) is None}


def _origin_notes(weights: WeightSource) -> list[str]:
    """What should be known of where the weights come from."""
    kinds = {weights.kind(name) for name in weights.names()}
    blocks = sorted(kind for kind in kinds if kind in FOUR_BIT_BLOCKS)
    if not blocks:
        return []
    return [
        f"This model comes in {', '.join(blocks)}: it was rounded to 4 bits before, so the same storage loses next to "
        "nothing on it, Q8_0 and 16 bits very little, and a comparison with them says nothing of other models. The "
        "original of this report is the model in 16 bits."
    ]


def _smallest_bytes(model: PreTrainedModel, settings: CompressSettings, sixteen: Storage) -> int:
    """Of all matrices, in the smallest form that --bits leaves each."""
    head = model.get_output_embeddings()
    total, seen = 0, set[int]()
    for layer in low_rank_layers(model).values():
        rows, columns = layer.matrix.shape
        if id(layer.matrix) in seen:
            continue
        seen.add(id(layer.matrix))
        if isinstance(layer, LowRankEmbedding) or layer is head:
            kinds = (sixteen, *rounded_kinds(columns, settings.bits))
            total += min(part_bytes(kind, rows, columns) for kind in kinds)
        else:
            total += min(spec_bytes(spec, (rows, columns)) for spec in _forms((rows, columns), settings, sixteen))
    return total


def _forms(shape: tuple[int, int], settings: CompressSettings, sixteen: Storage) -> list[Spec]:
    """The forms of a layer without factors, and with the lowest rank that is tried."""
    wholes = [whole(kind) for kind in whole_kinds(shape[1], settings.bits, sixteen)]
    kinds = factor_kinds(settings.bits, sixteen) if min(shape) > RANK_STEP else []
    return [*wholes, *(Spec("low-rank", "", RANK_STEP, kind) for kind in kinds)]


def _check_budget(settings: CompressSettings, found: Survey, smallest: int) -> None:
    dense = 2 * found.numbers
    if smallest > found.budget:
        raise PreflightError(
            f"the budget must hold the smallest form of every layer, {size_text(smallest)} in all with --bits {settings.bits}; "
            f"got {size_text(found.budget)}, and the model has {size_text(dense)} in 16 bits. Raise --budget"
            f"{'' if settings.bits == 'auto' else ', or allow all storages with --bits auto'}."
        )
    if found.budget >= dense and settings.bits != "4":
        raise PreflightError(
            f"the budget must be below what the model takes in 16 bits, {size_text(dense)}; got {size_text(found.budget)}: "
            "there is nothing to compress. Lower --budget, or keep the model as it is."
        )
    if found.budget >= found.own_bytes:
        found.notes.append(
            f"The budget of {size_text(found.budget)} is not below the {size_text(found.own_bytes)} that the model takes as it "
            "comes: the original file is as small as what was asked for."
        )


def _check_folder(out: Path) -> None:
    above = _existing(out.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise PreflightError(f"{out} must be in a folder that can be written to; {above} is not. Choose another --out.")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(one for one in (folder, *folder.parents) if os.path.lexists(one))


def _check_room(settings: CompressSettings, found: Survey) -> None:
    plans = PLANS_TO_HEAL if settings.heal else PLANS
    dense = 2 * found.numbers
    needed = plans * min(found.budget, dense) + dense // 3
    above = _existing(settings.out.absolute().parent)
    free = shutil.disk_usage(above).free
    if needed > free:
        raise PreflightError(
            f"{above} must have room for the plans that are compared, about {size_text(needed)}; {size_text(free)} are free. "
            "Free some space, or choose another --out."
        )
