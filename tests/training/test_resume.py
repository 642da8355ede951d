"""Interrupting a run and going on with it: the result is that of a run never interrupted, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import write_tiny
from tiny_runs import Recorder, adapter_hash, numbers, send_at, tiny_config, write_rows

from luthier.config import RunConfig
from luthier.errors import CheckpointError, Interrupted, PreflightError
from luthier.training import checkpoint as checkpoint_module
from luthier.training import evaluations, loop, prepare
from luthier.training.lock import RunLock
from luthier.training.run import resume, train
from luthier.training.run_index import changed_files

pytestmark = pytest.mark.usefixtures("without_plots")

# Dropout, several packs a step, epochs that end inside steps, and an evaluation: everything that has a state.
BUSY = {"dropout": 0.2, "micro_batch_tokens": 64, "save_every": 3, "eval_every": 4, "max_new_tokens": 4}


def busy_config(model: Path, folder: Path, **changes: Any) -> RunConfig:
    held_out = folder / "held_out.jsonl"
    if not held_out.exists():
        write_rows(held_out, 3, first=30)
    return tiny_config(model, folder, **{"eval_data": str(held_out), **BUSY, **changes})


@pytest.fixture(scope="module")
def straight(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted, its data beside it."""
    folder = tmp_path_factory.mktemp("straight")
    train(busy_config(tiny_llama, folder))
    return folder / "run"


def begin_and_stop(model: Path, folder: Path, step: int, **changes: Any) -> Path:
    """A run stopped by Ctrl-C after `step`; returns its directory."""
    with pytest.raises(Interrupted):
        train(busy_config(model, folder, **changes), listener=send_at(step, signal.SIGINT))
    return folder / "run"


@pytest.mark.parametrize("step", [4, 5, 10])
def test_interrupted_and_resumed_is_bit_exact(tiny_llama: Path, tmp_path: Path, straight: Path, step: int) -> None:
    """Cases 13 and 19; steps 4 and 10 are also due for an evaluation, which then happens after resuming."""
    with pytest.raises(Interrupted) as caught:
        train(busy_config(tiny_llama, tmp_path), listener=send_at(step, signal.SIGINT))
    run = tmp_path / "run"
    assert caught.value.exit_code == 130
    assert str(caught.value) == f"stopped after step {step} of 10; everything is saved. Go on with `luthier resume {run}`."
    assert not (run / "adapter").exists()
    result = resume(run)
    assert adapter_hash(run) == adapter_hash(straight)
    assert numbers(run) == numbers(straight)
    one, other = (json.loads((path / "result.json").read_text()) for path in (run, straight))
    for key in ("steps", "tokens", "supervised_tokens", "loss_first", "loss_last", "eval", "samples", "skipped_steps"):
        assert one[key] == other[key], key
    assert result.seconds > 0


def test_sigterm_saves_and_leaves(tiny_llama: Path, tmp_path: Path, straight: Path) -> None:
    """Case 14, twice in one run."""
    with pytest.raises(Interrupted, match="stopped after step 2"):
        train(busy_config(tiny_llama, tmp_path), listener=send_at(2, signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped after step 7"):
        resume(tmp_path / "run", listener=send_at(7, signal.SIGTERM))
    resume(tmp_path / "run")
    assert adapter_hash(tmp_path / "run") == adapter_hash(straight)


def test_second_ctrl_c_leaves_at_once(tiny_llama: Path, tmp_path: Path, straight: Path) -> None:
    """Case 13: nothing is saved any more, and the run goes on from the checkpoint before."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(busy_config(tiny_llama, tmp_path), listener=send_at(5, signal.SIGINT, signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is handler
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-0", "step-3"]
    resume(tmp_path / "run")
    assert adapter_hash(tmp_path / "run") == adapter_hash(straight)


@pytest.mark.parametrize("evaluation", [0, 1, 2])
def test_ctrl_c_inside_an_evaluation(
    tiny_llama: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int
) -> None:
    """Case 13: before training, between steps and after the last one."""
    real, calls = evaluations.evaluate, iter(range(100))

    def evaluate(*arguments: Any, **named: Any) -> Any:
        if next(calls) == evaluation:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    monkeypatch.setattr(evaluations, "evaluate", evaluate)
    with pytest.raises(Interrupted, match=f"stopped after step {(0, 4, 8)[evaluation]} of 10"):
        train(busy_config(tiny_llama, tmp_path))
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert adapter_hash(tmp_path / "run") == adapter_hash(straight)
    assert numbers(tmp_path / "run") == numbers(straight)


def test_damaged_newest_checkpoint_falls_back_and_ends_the_same(tiny_llama: Path, tmp_path: Path, straight: Path) -> None:
    """Case 3 in a whole run."""
    run = begin_and_stop(tiny_llama, tmp_path, 7)
    weights = run / "checkpoints" / "step-7" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    listener = Recorder()
    resume(run, listener=listener)
    assert any(note.startswith("checkpoint step-7: weights.safetensors should have") for note in listener.notes)
    assert adapter_hash(run) == adapter_hash(straight)
    assert numbers(run) == numbers(straight)


def test_weights_only_goes_on_with_a_fresh_optimiser(tiny_llama: Path, tmp_path: Path, straight: Path) -> None:
    """Case 6 in a whole run."""
    run = begin_and_stop(tiny_llama, tmp_path, 7)
    (run / "checkpoints" / "step-7" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no optimizer\.safetensors"):
        resume(run)
    listener = Recorder()
    result = resume(run, listener=listener, weights_only=True)
    assert "going on from the weights of step 7 with a fresh optimiser." in listener.notes
    assert result.steps == 10
    assert [record["step"] for record in listener.records if record["kind"] == "step"] == [8, 9, 10]
    assert adapter_hash(run) != adapter_hash(straight)


def test_finished_run_has_nothing_to_do(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 16, and files that were changed since are named."""
    finished = train(tiny_config(tiny_llama, tmp_path, steps=1))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    listener = Recorder()
    again = resume(tmp_path / "run", listener=listener)
    assert again.nothing_to_do
    assert {**again.to_json(), "nothing_to_do": False} == finished.to_json()
    assert listener.notes == [f"{tmp_path / 'run'} is finished; there is nothing to do."]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    (tmp_path / "run" / "env.json").write_text("{}")
    resume(tmp_path / "run", listener=listener)
    assert any(note.startswith(f"{tmp_path / 'run' / 'env.json'} is not as the run wrote it. ") for note in listener.notes)


def test_a_finished_run_with_a_damaged_manifest(tiny_llama: Path, tmp_path: Path) -> None:
    """It is still finished; how to write its results again is said, and that works."""
    train(tiny_config(tiny_llama, tmp_path, steps=1))
    run, listener = tmp_path / "run", Recorder()
    before = adapter_hash(run)
    (run / "MANIFEST.json").write_text("{}")
    assert resume(run, listener=listener).nothing_to_do
    assert listener.notes == [
        f"{run}: MANIFEST.json is damaged: its content does not match its own sha256, so that its files cannot be checked. "
        f"To write the results again from the last checkpoint, delete {run / 'MANIFEST.json'} and resume the run.",
        f"{run} is finished; there is nothing to do.",
    ]
    (run / "result.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"must be the result of a run; .* delete .*MANIFEST\.json and resume the run"):
        resume(run)
    (run / "adapter" / "adapter_model.safetensors").write_text("damaged")
    (run / "MANIFEST.json").unlink()
    assert not resume(run).nothing_to_do
    assert adapter_hash(run) == before
    assert changed_files(run) == []


def test_another_machine_is_noted_and_no_error(tiny_llama: Path, tmp_path: Path, straight: Path) -> None:
    """What decides the last bits of a result is compared with env.json."""
    run = begin_and_stop(tiny_llama, tmp_path, 4)
    environment = json.loads((run / "env.json").read_text())
    now = environment["threads"], environment["packages"]["torch"]
    environment["threads"] += 1
    environment["packages"]["torch"] = "2.9.0"
    (run / "env.json").write_text(json.dumps(environment))
    listener = Recorder()
    resume(run, listener=listener)
    note = (
        f"the run goes on under other conditions than it began under (threads {now[0] + 1} then, {now[0]} now; "
        f"torch 2.9.0 then, {now[1]} now): its result may differ in the last bits from that of a run never interrupted."
    )
    assert note in listener.notes
    assert note in json.loads((run / "notes.json").read_text())
    assert note in (run / "report.html").read_text()
    assert adapter_hash(run) == adapter_hash(straight)


def test_the_same_machine_is_not_noted(tiny_llama: Path, tmp_path: Path) -> None:
    run = begin_and_stop(tiny_llama, tmp_path, 4)
    listener = Recorder()
    resume(run, listener=listener)
    assert not any("other conditions" in note for note in listener.notes)


def test_lost_metrics_are_said(tiny_llama: Path, tmp_path: Path, straight: Path) -> None:
    """Without the record of the first evaluation the run still goes on to the same weights."""
    run = begin_and_stop(tiny_llama, tmp_path, 5)
    (run / "metrics.jsonl").unlink()
    listener = Recorder()
    result = resume(run, listener=listener)
    assert "metrics.jsonl has lost the evaluation before training; the result has none." in listener.notes
    assert result.eval is not None
    assert result.eval["before"] == {}
    assert result.eval["after"]["loss"] > 0
    assert adapter_hash(run) == adapter_hash(straight)


def test_out_of_memory_in_a_resumed_run_says_what_can_be_done_there(
    tiny_llama: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 27: the advice is followed to the letter, and the result stays the same."""
    run = begin_and_stop(tiny_llama, tmp_path, 4)
    monkeypatch.setattr(loop, "supervised_loss", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(PreflightError) as caught:
        resume(run)
    monkeypatch.undo()
    file = run / "config.resolved.yaml"
    assert f"Close other programs, then resume it again. Or set `recompute_layers: 2` in {file}: slower" in str(caught.value)
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "recompute_layers": 2}))
    resume(run)
    assert adapter_hash(run) == adapter_hash(straight)


def test_a_resumed_run_that_does_not_fit_says_what_can_be_done_there(tiny_llama: Path, tmp_path: Path) -> None:
    run = begin_and_stop(tiny_llama, tmp_path, 4)
    file = run / "config.resolved.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "memory": "1MB"}))
    with pytest.raises(PreflightError, match=r"\nThat is for a new run\. To go on with this one, close other programs"):
        resume(run)


def test_killed_while_the_results_are_written(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is finished only when its manifest is there; until then resuming writes the results again."""
    monkeypatch.setattr("luthier.training.finish.write_report", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
    with pytest.raises(CheckpointError, match="must reach the disk"):
        train(tiny_config(tiny_llama, tmp_path, steps=2))
    monkeypatch.undo()
    assert (tmp_path / "run" / "result.json").exists()
    result = resume(tmp_path / "run")
    assert not result.nothing_to_do
    assert (tmp_path / "run" / "MANIFEST.json").exists()


def test_no_checkpoint_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 18."""
    run = begin_and_stop(tiny_llama, tmp_path, 2)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"a run goes on from a whole checkpoint below .*; there is none\."):
        resume(run)
    with pytest.raises(CheckpointError, match="a run directory holds"):
        resume(tmp_path)


def test_changed_data_is_refused_before_the_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 20."""
    run = begin_and_stop(tiny_llama, tmp_path, 2)
    data = tmp_path / "train.jsonl"
    original = data.read_bytes()
    data.write_bytes(original.replace(b"red", b"RED", 1))
    monkeypatch.setattr(prepare, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(CheckpointError, match=r"it has changed:\n  - data: sha256 was \w{12}\.\.\. and is now \w{12}\.\.\."):
        resume(run)
    monkeypatch.undo()
    data.rename(tmp_path / "moved.jsonl")
    (tmp_path / "moved.jsonl").write_bytes(original)
    config = yaml.safe_load((run / "config.resolved.yaml").read_text())
    (run / "config.resolved.yaml").write_text(yaml.safe_dump({**config, "data": str(tmp_path / "moved.jsonl")}))
    assert resume(run).steps == 10


@pytest.mark.parametrize(("key", "value"), [("learning_rate", 0.02), ("rank", 8), ("batch_size", 2), ("base", "bf16")])
def test_changed_configuration_is_refused(tiny_llama: Path, tmp_path: Path, key: str, value: Any) -> None:
    """Case 21."""
    run = begin_and_stop(tiny_llama, tmp_path, 1, eval_data=None, eval_every=None, max_new_tokens=128)
    path = run / "config.resolved.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**config, key: value}))
    with pytest.raises(CheckpointError) as caught:
        resume(run)
    assert f"  - {key} was {config[key]!r} and is now {value!r}\n" in str(caught.value)


def test_changed_base_is_refused(tmp_path: Path) -> None:
    """Case 21: the same folder with other weights."""
    folder = write_tiny(tmp_path / "model", "llama")
    run = begin_and_stop(folder, tmp_path, 1)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its weights have changed: fingerprint was"):
        resume(run)


def test_run_in_use_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 15."""
    run = begin_and_stop(tiny_llama, tmp_path, 1)
    lock = RunLock(run)
    with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
        resume(run)
    lock.release()
    assert resume(run).steps == 10


def test_disk_full_in_the_middle(tiny_llama: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 10 in a whole run: it ends with an error, and goes on once there is room."""
    real, calls = checkpoint_module.save_file, iter(range(100))

    def sometimes(content: Any, path: Path) -> None:
        if next(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(content, path)

    monkeypatch.setattr(checkpoint_module, "save_file", sometimes)
    with pytest.raises(CheckpointError, match=r"step-6 needs [\d,]+ bytes of free disk; the disk is full"):
        train(busy_config(tiny_llama, tmp_path))
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-0", "step-3"]
    resume(tmp_path / "run")
    assert adapter_hash(tmp_path / "run") == adapter_hash(straight)


@pytest.mark.parametrize("keys", [{}, {"method": "full", "rank": 16, "alpha": 32, "learning_rate": 1e-3}])
def test_disk_full_at_the_end(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]) -> None:
    """Case 10 while the weights are written: safetensors has an error of its own for that."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("luthier.adapters.peft_format.save_file", full)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"the disk is full .* go on with `luthier resume`"):
        train(tiny_config(tiny_llama, tmp_path, steps=1, **keys))
    monkeypatch.undo()
    assert resume(tmp_path / "run").steps == 1


def test_full_training_resumes_bit_exactly(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 19 for method full."""
    keys = {"method": "full", "rank": 16, "alpha": 32, "dropout": 0, "learning_rate": 1e-3, "steps": 5}
    train(busy_config(tiny_llama, tmp_path, out=str(tmp_path / "straight"), **keys))
    run = begin_and_stop(tiny_llama, tmp_path, 2, **keys)
    resume(run)
    one, other = ((path / "model" / "model.safetensors").read_bytes() for path in (run, tmp_path / "straight"))
    assert one == other
