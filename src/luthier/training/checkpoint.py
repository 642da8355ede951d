"""Checkpoints of a run: whole or absent, verified before use, safetensors and JSON only.

checkpoints/step-N/ holds weights.safetensors, optimizer.safetensors, state.json and MANIFEST.json, which has the
sha256 of each and the run's identity (configuration, data, base model).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from luthier.disk import STAGING_PREFIX, remove_tree, sha256_of
from luthier.errors import CheckpointError, bulleted
from luthier.training.files import MANIFEST, read_manifest, to_json, write_folder
from luthier.training.state import Identity, TrainState

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
KIND = {"kind": "luthier checkpoint", "format": 1}


@dataclass
class Checkpoint:
    """What is read back. `optimizer` is empty and `state` counts only steps and examples with weights_only."""

    path: Path
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainState
    identity: Identity


class _Damaged(Exception):
    """This checkpoint is not whole; the one before may be."""


def save_checkpoint(
    root: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: TrainState, identity: Identity
) -> Path:
    """Write root/step-N and return it. weights, optimizer: tensors by name, on the CPU.

    Raises CheckpointError if the disk refuses; older checkpoints are then untouched. Call `prune` only after this.
    """

    def fill(folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
        save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, folder / OPTIMIZER)
        (folder / STATE).write_text(to_json(state.to_json()), encoding="utf-8")

    path = root / f"step-{state.step}"
    tensors = [*weights.values(), *optimizer.values()]
    needed_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) + (1 << 16)
    facts = {**KIND, "step": state.step, "examples": state.examples, "identity": identity.to_json()}
    write_folder(path, fill, needed_bytes, facts)
    return path


def checkpoint_paths(root: Path) -> list[Path]:
    """The folders named step-N below `root`, newest first, whole or not; empty ones and other names are left out.

    Raises CheckpointError if they cannot be read.
    """
    try:
        named = [path for path in root.iterdir() if re.fullmatch(r"step-\d+", path.name)] if root.is_dir() else []
        found = [path for path in named if path.is_dir() and any(path.iterdir())]
    except OSError as error:
        raise CheckpointError(f"checkpoints must be readable; {error}. Change their permissions.") from error
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def prune(root: Path, keep: int, step: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, the one just saved. Those of later steps go too: they
    were damaged and passed over when the run went on from before them. Raises CheckpointError if one cannot be deleted."""
    paths = checkpoint_paths(root)
    kept = [path for path in paths if _step_of(path) <= step][:keep]
    _remove([path for path in paths if path not in kept])


def remove_staging(root: Path) -> None:
    """Delete what an interrupted save has left behind. Raises CheckpointError if it cannot be deleted."""
    _remove(list(root.glob(f"{STAGING_PREFIX}*")) if root.is_dir() else [])


def _remove(paths: list[Path]) -> None:
    try:
        for path in paths:
            remove_tree(path)
    except OSError as error:
        raise CheckpointError(
            f"old checkpoints and what an interrupted save has left must be deletable; {error}. "
            "The newest one is whole. Change the permissions, then go on with `luthier resume`."
        ) from error


def read_newest(root: Path, *, weights_only: bool, note: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint whose files all match their sha256. Damaged ones are named through `note` and passed over.

    weights_only: the optimiser's state and state.json need not be there and are not read.
    Raises CheckpointError if no checkpoint is whole, or if the newest lacks its optimiser state or state.json and
    weights_only is not set: going on would quietly be another run.
    """
    problems = []
    for path in checkpoint_paths(root):
        try:
            return _read(path, weights_only)
        except _Damaged as damage:
            problems.append(f"{path.name}: {damage}")
            note(f"checkpoint {problems[-1]}; it is passed over.")
    found = f"; found:\n{bulleted(problems)}\n" if problems else "; there is none. "
    raise CheckpointError(
        f"a run goes on from a whole checkpoint below {root}{found}"
        "Start again with `luthier train` and --overwrite, or another --out."
    )


def _read(path: Path, weights_only: bool) -> Checkpoint:
    try:
        manifest = read_manifest(path)
        listed, identity = manifest["files"], Identity(**manifest["identity"])
        state = TrainState(step=manifest["step"], examples=manifest["examples"])
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(str(error)) from error
    missing = [name for name in (WEIGHTS, OPTIMIZER, STATE) if not (path / name).is_file()]
    if WEIGHTS in missing:
        raise _Damaged(f"{WEIGHTS} is missing")
    if missing and not weights_only:
        raise CheckpointError(
            f"a checkpoint needs its optimiser, schedule and random-number state; {path} has no {', '.join(missing)}. "
            "Put it back, delete the folder to use the one before, or add --weights-only to go on from the weights alone."
        )
    _check_file(path, WEIGHTS, listed)
    optimizer: dict[str, Tensor] = {}
    if not weights_only:
        _check_file(path, OPTIMIZER, listed)
        _check_file(path, STATE, listed)
        optimizer = _tensors(path / OPTIMIZER)
        state = _state(path / STATE)
    return Checkpoint(path, _tensors(path / WEIGHTS), optimizer, state, identity)


def _check_file(folder: Path, name: str, listed: dict[str, Any]) -> None:
    expected = listed.get(name)
    if expected is None:
        raise _Damaged(f"{name} is not listed in {MANIFEST}")
    try:
        size, sha256 = (folder / name).stat().st_size, sha256_of(folder / name)
    except OSError as error:
        raise _Damaged(f"{name} cannot be read ({error.strerror})") from error
    if size != expected["bytes"]:
        raise _Damaged(f"{name} should have {expected['bytes']} bytes and has {size}")
    if sha256 != expected["sha256"]:
        raise _Damaged(f"{name} does not match its sha256")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _Damaged(f"{path.name} cannot be read ({error})") from error


def _state(path: Path) -> TrainState:
    try:
        return TrainState.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _Damaged(f"{path.name} cannot be read ({error})") from error
