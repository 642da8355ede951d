"""Checkpoints: whole or absent, verified, with a fall-back."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.errors import CheckpointError
from luthier.training import checkpoint as module
from luthier.training.checkpoint import checkpoint_paths, prune, read_newest, remove_staging, save_checkpoint
from luthier.training.files import MANIFEST
from luthier.training.state import Identity, TrainState

IDENTITY = Identity({"rank": 16}, "d" * 64, None, "f" * 64)
PARTS = ("weights.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


def tensors(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"a": torch.full((4, 4), float(step))}, {"a.exp_avg": torch.full((4, 4), -float(step))}


def save(root: Path, step: int) -> Path:
    return save_checkpoint(root, *tensors(step), TrainState(step=step, examples=8 * step, loss_average=0.1 * step), IDENTITY)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two whole checkpoints, step 3 and step 6."""
    save(tmp_path, 3)
    save(tmp_path, 6)
    return tmp_path


def read(root: Path, weights_only: bool = False) -> tuple[int, list[str]]:
    """The step read, after checking what was read against what was saved, and the notes."""
    notes: list[str] = []
    found = read_newest(root, weights_only=weights_only, note=notes.append)
    step = found.state.step
    assert torch.equal(found.weights["a"], tensors(step)[0]["a"])
    assert found.state.examples == 8 * step
    assert found.identity == IDENTITY
    if not weights_only:
        assert torch.equal(found.optimizer["a.exp_avg"], tensors(step)[1]["a.exp_avg"])
        assert found.state.loss_average == 0.1 * step
    return step, notes


def test_round_trip_and_no_pickle(root: Path) -> None:
    assert read(root) == (6, [])
    assert {path.name for path in (root / "step-6").iterdir()} == set(PARTS)
    assert json.loads((root / "step-6" / "state.json").read_text())["step"] == 6


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_file_falls_back_and_is_named(root: Path, name: str, keep: float) -> None:
    """Cases 3, 4 and 7."""
    path = root / "step-6" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    step, notes = read(root)
    assert step == 3
    assert len(notes) == 1
    assert notes[0].startswith(f"checkpoint step-6: {name}")
    assert notes[0].endswith("it is passed over.")


@pytest.mark.parametrize("name", PARTS)
def test_any_bit_flipped_is_noticed(root: Path, name: str) -> None:
    """Case 5: every eleventh bit of every file. A flip may only go unnoticed where it changes nothing that is read."""
    path = root / "step-6" / name
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 11):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(flipped))
        step, notes = read(root)
        assert (step == 3 and notes) or name == MANIFEST
    path.write_bytes(content)
    assert read(root) == (6, [])


@pytest.mark.parametrize("garbage", ["{}", "[]", "null", '{"step": 6}', "\x00\x01", "[" * 100_000])
def test_garbage_in_the_manifest_falls_back(root: Path, garbage: str) -> None:
    """Case 7."""
    (root / "step-6" / MANIFEST).write_text(garbage)
    assert read(root)[0] == 3


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_missing_part_is_refused_unless_weights_only(root: Path, name: str) -> None:
    """Case 6."""
    (root / "step-6" / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        read(root)
    assert str(caught.value) == (
        f"a checkpoint needs its optimiser, schedule and random-number state; {root / 'step-6'} has no {name}. "
        "Put it back, delete the folder to use the one before, or add --weights-only to go on from the weights alone."
    )
    assert read(root, weights_only=True) == (6, [])


def test_missing_weights_fall_back(root: Path) -> None:
    (root / "step-6" / "weights.safetensors").unlink()
    assert read(root) == (3, ["checkpoint step-6: weights.safetensors is missing; it is passed over."])


def test_empty_folders_and_leftovers_are_ignored_and_cleaned(root: Path) -> None:
    """Cases 8 and 9."""
    (root / "step-9").mkdir()
    (root / ".staging-step-12").mkdir()
    (root / ".staging-step-12" / "weights.safetensors").write_bytes(b"half")
    (root / "step-latest").mkdir()
    assert read(root) == (6, [])
    remove_staging(root)
    assert not (root / ".staging-step-12").exists()
    assert save(root, 9).name == "step-9"
    assert read(root)[0] == 9


def test_no_valid_checkpoint_is_an_error(root: Path, tmp_path: Path) -> None:
    """Case 18."""
    with pytest.raises(CheckpointError, match=r"a run goes on from a whole checkpoint below .*; there is none\. Start again"):
        read(tmp_path / "nowhere")
    for step in (3, 6):
        (root / f"step-{step}" / MANIFEST).unlink()
    with pytest.raises(CheckpointError) as caught:
        read(root)
    assert "step-6: MANIFEST.json is missing or damaged" in str(caught.value)
    assert "step-3: MANIFEST.json is missing or damaged" in str(caught.value)


def test_prune_keeps_the_newest(root: Path) -> None:
    """Case 2: until pruning, all stand; after it, the newest do."""
    save(root, 12)
    assert [path.name for path in checkpoint_paths(root)] == ["step-12", "step-6", "step-3"]
    prune(root, 2, 12)
    assert [path.name for path in checkpoint_paths(root)] == ["step-12", "step-6"]
    assert read(root)[0] == 12


def test_what_cannot_be_deleted_or_read_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / ".staging-step-9").mkdir()

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("shutil.rmtree", fail)
    for remove in (lambda: prune(root, 1, 6), lambda: remove_staging(root)):
        with pytest.raises(CheckpointError, match=r"must be deletable; .*Permission denied\. The newest one is whole"):
            remove()
    monkeypatch.setattr("luthier.training.checkpoint.sha256_of", fail)
    with pytest.raises(CheckpointError, match=r"step-6: weights\.safetensors cannot be read \(Permission denied\)"):
        read(root)
    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(CheckpointError, match=r"checkpoints must be readable; .*Permission denied"):
        checkpoint_paths(root)


def test_prune_drops_what_was_passed_over(root: Path) -> None:
    """A damaged checkpoint of a later step does not count as one of those kept."""
    (root / "step-6" / "state.json").write_text("garbage")
    assert read(root)[0] == 3
    save(root, 5)
    prune(root, 2, 5)
    assert [path.name for path in checkpoint_paths(root)] == ["step-5", "step-3"]


def test_disk_full_says_how_much_is_needed_and_leaves_the_old(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 10."""

    def full(content: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError) as caught:
        save(root, 9)
    assert str(caught.value) == (
        f"saving {root / 'step-9'} needs 65,664 bytes of free disk; the disk is full (No space left on device). "
        "Free some space, then go on with `luthier resume`."
    )
    assert sorted(path.name for path in root.iterdir()) == ["step-3", "step-6"]
    assert read(root) == (6, [])


@pytest.mark.parametrize("function", ["fsync", "rename"])
@pytest.mark.parametrize("failing_call", range(9))
def test_no_failing_call_leaves_a_checkpoint_marked_complete(
    root: Path, monkeypatch: pytest.MonkeyPatch, function: str, failing_call: int
) -> None:
    """Case 12: each fsync and rename of a save fails once."""
    real, calls = getattr(os, function), iter(range(100))

    def sometimes(*arguments: object) -> object:
        if next(calls) == failing_call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, function, sometimes)
    used = {"fsync": 8, "rename": 1}[function]
    if failing_call >= used:
        save(root, 9)
        assert next(calls) == used
        return
    with pytest.raises(CheckpointError, match=r"must reach the disk; it did not: Input/output error\. Check the disk"):
        save(root, 9)
    monkeypatch.undo()
    assert sorted(path.name for path in root.iterdir()) == ["step-3", "step-6"]
    assert read(root) == (6, [])


def test_identity_names_what_changed() -> None:
    """Cases 20 and 21."""
    identity = Identity({"rank": 16, "learning_rate": 1e-3, "out": "a"}, "a" * 64, None, "b" * 64)
    identity.refuse_other_config({"rank": 16, "learning_rate": 1e-3, "out": "b"})
    with pytest.raises(CheckpointError) as caught:
        identity.refuse_other_config({"rank": 8, "learning_rate": 2e-3, "out": "a"})
    assert "  - learning_rate was 0.001 and is now 0.002\n  - rank was 16 and is now 8\n" in str(caught.value)
    identity.refuse_other_data("a" * 64, None)
    with pytest.raises(CheckpointError, match=r"data: sha256 was aaaaaaaaaaaa\.\.\. and is now cccccccccccc\.\.\."):
        identity.refuse_other_data("c" * 64, None)
    with pytest.raises(CheckpointError, match=r"eval_data: sha256 was none and is now c"):
        identity.refuse_other_data("a" * 64, "c" * 64)
    with pytest.raises(CheckpointError, match=r"fingerprint was bbbbbbbbbbbb\.\.\. and is now c"):
        identity.refuse_other_base("c" * 64)
