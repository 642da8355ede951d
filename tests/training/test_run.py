"""Whole runs on a tiny model: what they leave, what they refuse, and that they can be repeated."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import write_tiny
from tiny_runs import Recorder, adapter_hash, metrics, numbers, tiny_config, write_rows
from transformers import AutoModelForCausalLM

from luthier.config import make_config
from luthier.errors import ConfigError, DataError, NumericError, PreflightError
from luthier.models import packed
from luthier.training import loop, prepare
from luthier.training.checkpoint import read_newest
from luthier.training.optimizer import Optimizer
from luthier.training.run import train
from luthier.training.run_index import changed_files

pytestmark = pytest.mark.usefixtures("without_plots")

RESULT_KEYS = {
    "run_dir", "adapter_dir", "steps", "tokens", "tokens_per_second", "seconds", "loss_first", "loss_last", "peak_rss_bytes",
    "trainable_parameters",
}  # fmt: skip


def test_a_run_learns_and_leaves_its_directory(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 66 too: a token in the environment is in no file of the run."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret_0123456789")
    listener = Recorder()
    result = train(tiny_config(tiny_llama, tmp_path, epochs=10, steps=None), listener=listener)
    run = tmp_path / "run"
    assert result.loss_last < 0.7 * result.loss_first
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.resolved.yaml", "env.json", "data_manifest.json", "metrics.jsonl", "samples.json", "plan.json", "result.json",
        "report.html", "checkpoints", "adapter", "MANIFEST.json",
    }  # fmt: skip
    assert result.to_json().keys() >= RESULT_KEYS
    assert json.loads((run / "result.json").read_text()) == result.to_json()
    assert "eval" not in result.to_json()
    assert result.steps == 35
    assert result.tokens / result.seconds == pytest.approx(result.tokens_per_second)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-33", "step-35"]
    assert changed_files(run) == []
    assert listener.finished
    assert listener.info["total_steps"] == 35
    assert not any(b"hf_secret" in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_metrics_have_one_line_a_step(tiny_llama: Path, tmp_path: Path) -> None:
    listener = Recorder()
    result = train(tiny_config(tiny_llama, tmp_path, steps=5), listener=listener)
    lines = metrics(tmp_path / "run")
    assert lines == listener.records
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {line["kind"] for line in lines} == {"step"}
    assert lines[-1]["epoch"] == pytest.approx(20 / 14, abs=1e-5)
    assert lines[0]["loss"] == lines[0]["loss_smooth"] == result.loss_first
    assert sum(line["tokens"] for line in lines) == result.tokens
    assert sum(line["supervised_tokens"] for line in lines) == result.supervised_tokens < result.tokens
    assert all(line["grad_norm"] > 0 and line["rss_bytes"] > 0 and line["skipped"] == 0 for line in lines)


def test_resolved_configuration_has_every_key_and_runs_again(tiny_llama: Path, tmp_path: Path) -> None:
    train(tiny_config(tiny_llama, tmp_path, learning_rate=None, steps=None, save_every=None))
    content = yaml.safe_load((tmp_path / "run" / "config.resolved.yaml").read_text())
    assert content["learning_rate"] == pytest.approx(1.3e-3 * (2000 / 64) ** 0.781, rel=5e-3)
    assert (content["epochs"], content["save_every"], content["alpha"]) == (1.0, 1, 8.0)
    again = make_config(content, {"out": str(tmp_path / "again")})
    train(again)
    assert adapter_hash(tmp_path / "run") == adapter_hash(tmp_path / "again")


def test_same_seed_same_adapter_and_the_callers_randomness_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 22, with dropout; a run neither reads nor moves torch's generator."""
    hashes = []
    for name, seed, global_seed in (("a", 1, 5), ("b", 1, 6), ("c", 2, 5)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        train(tiny_config(tiny_llama, tmp_path, dropout=0.1, seed=seed, steps=4, out=str(tmp_path / name)))
        assert torch.equal(torch.get_rng_state(), before)
        hashes.append(adapter_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]


def test_micro_batches_do_not_change_the_trajectory(tiny_llama: Path, tmp_path: Path) -> None:
    losses = {}
    for tokens in (8, 4096):
        out = tmp_path / str(tokens)
        train(tiny_config(tiny_llama, tmp_path, micro_batch_tokens=tokens, out=str(out)))
        losses[tokens] = [line["loss"] for line in metrics(out)]
    assert losses[8] == pytest.approx(losses[4096], rel=1e-4)


@pytest.mark.parametrize("micro_batch_tokens", [8, 4096])
def test_gradient_equals_a_float64_reference(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_tokens: int
) -> None:
    """One step against Transformers in float64: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW at W + s B A, the loss
    summed row by row without packing and divided by the number of supervised tokens of the whole batch."""
    seen: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "gradients": {}}
    batches: list[Any] = []
    real_attach, real_step = prepare.attach, loop.train_step

    def attach_with_random_b(model: Any, *arguments: Any, **named: Any) -> Any:
        report = real_attach(model, *arguments, **named)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.1, generator=generator)
        return report

    def clip(optimizer: Optimizer) -> float:
        seen["weights"] = {name: parameter.detach().clone() for parameter, name in optimizer.names.items()}
        seen["gradients"] = {name: parameter.grad.clone() for parameter, name in optimizer.names.items()}
        return 1.0

    monkeypatch.setattr(prepare, "attach", attach_with_random_b)
    monkeypatch.setattr(Optimizer, "clip", clip)
    monkeypatch.setattr(loop, "train_step", lambda job, batch: batches.append(batch) or real_step(job, batch))
    result = train(tiny_config(tiny_llama, tmp_path, steps=1, micro_batch_tokens=micro_batch_tokens))

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    scaling = 8 / 4
    layers = sorted({name.split(".terms.")[0] for name in seen["weights"]})
    factors = {
        layer: [seen["weights"][f"{layer}.terms.default.{factor}"].double() for factor in ("lora_A", "lora_B")]
        for layer in layers
    }
    with torch.no_grad():
        for layer, (A, B) in factors.items():
            model.get_submodule(layer).weight += scaling * B @ A
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for example in batches[0]:
        labels = torch.tensor([token if on else -100 for token, on in zip(example.ids, example.supervised, strict=True)])
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    (loss / count).backward()
    assert result.loss_first == pytest.approx(float(loss.detach()) / count, rel=1e-6)
    for layer, (A, B) in factors.items():
        gradient = model.get_submodule(layer).weight.grad
        for factor, expected in (("lora_A", scaling * B.T @ gradient), ("lora_B", scaling * gradient @ A.T)):
            got = seen["gradients"][f"{layer}.terms.default.{factor}"].double()
            assert float((got - expected).norm() / expected.norm()) < 1e-4, (layer, factor)


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_other_variants_learn(tiny_llama: Path, tmp_path: Path, variant: str) -> None:
    result = train(tiny_config(tiny_llama, tmp_path, variant=variant, steps=15, learning_rate=3e-3))
    assert result.loss_last < result.loss_first
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (written["use_rslora"], written["use_dora"]) == (variant == "rslora", variant == "dora")


def test_full_training_leaves_a_model_folder(tiny_llama: Path, tmp_path: Path) -> None:
    keys = {"method": "full", "rank": 16, "alpha": 32, "learning_rate": 1e-3}
    result = train(tiny_config(tiny_llama, tmp_path, **keys))
    assert result.loss_last < result.loss_first
    assert result.adapter_dir is None
    assert result.model_dir == str(tmp_path / "run" / "model")
    assert result.trainable_parameters == result.total_parameters
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert sum(parameter.numel() for parameter in model.parameters()) == result.total_parameters
    checkpoint = read_newest(tmp_path / "run" / "checkpoints", weights_only=False, note=print)
    assert checkpoint.state.step == 10


def test_output_that_exists_is_refused_and_overwritten_when_told(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 17."""
    config = tiny_config(tiny_llama, tmp_path, steps=2)
    train(config)
    before = (tmp_path / "run" / "MANIFEST.json").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config)
    assert (tmp_path / "run" / "MANIFEST.json").read_bytes() == before
    with pytest.raises(DataError):
        train(config.model_copy(update={"data": str(tmp_path / "absent.jsonl")}), overwrite=True)
    assert (tmp_path / "run" / "MANIFEST.json").read_bytes() == before
    result = train(config.model_copy(update={"steps": 3}), overwrite=True)
    assert result.steps == 3
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


def test_cheap_checks_come_before_the_model(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 11, and data that is not there: nothing is loaded and no directory is left."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded too early")

    monkeypatch.setattr(prepare, "load", fail)
    monkeypatch.setattr(prepare, "load_tokenizer", fail)
    (tmp_path / "file").write_text("")
    config = tiny_config(tiny_llama, tmp_path)
    with pytest.raises(PreflightError, match="the run directory must be writable"):
        train(config.model_copy(update={"out": str(tmp_path / "file" / "run")}))
    for key in ("data", "eval_data"):
        with pytest.raises(DataError, match="absent"):
            train(config.model_copy(update={key: str(tmp_path / "absent.jsonl")}))
    assert not (tmp_path / "run").exists()


def test_out_of_memory_while_loading(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 27, before there is a job."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(prepare, "load", fail)
    with pytest.raises(PreflightError, match=r"memory ran out while .* was loaded; .* were in use\. Close other programs"):
        train(tiny_config(tiny_llama, tmp_path))
    assert not (tmp_path / "run").exists()


def test_ways_that_are_slower_are_noted_once_and_in_the_report(tiny_llama: Path, tmp_path: Path) -> None:
    """Terms with a magnitude (DoRA) keep the halves from being one operation each."""
    listener = Recorder()
    train(tiny_config(tiny_llama, tmp_path, variant="dora", steps=3), listener=listener)
    notes = [note for note in listener.notes if "half layers are composed of parts" in note or "Transformers' modules" in note]
    assert len(notes) == 1
    assert json.loads((tmp_path / "run" / "notes.json").read_text()) == notes
    assert notes[0].split(":")[0] in (tmp_path / "run" / "report.html").read_text()


def test_packing_and_head_that_are_not_known_are_noted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_measure", lambda _: packed._Facts("one document changes the next", None))
    listener = Recorder()
    train(tiny_config(tiny_llama, tmp_path, steps=2), listener=listener)
    kept = json.loads((tmp_path / "run" / "notes.json").read_text())
    assert sorted(kept) == [
        "llama cannot be packed (one document changes the next); its documents run one by one.",
        "the head of LlamaForCausalLM is not one that is known; all logits of a pack are computed at once.",
    ]
    assert all(listener.notes.count(note) == 1 for note in kept)


def test_ctrl_c_while_loading_leaves_no_directory(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "load", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(tiny_llama, tmp_path))
    assert not (tmp_path / "run").exists()


def test_data_errors_leave_no_directory(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "train.jsonl").write_text('{"messages": [}\n')
    with pytest.raises(DataError):
        train(tiny_config(tiny_llama, tmp_path))
    assert not (tmp_path / "run").exists()


def test_rows_must_fit_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 49, and rows longer than the model has positions."""
    folder = write_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    small = {name: tensor[:200].clone() if tensor.shape[0] == 512 else tensor for name, tensor in weights.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))
    with pytest.raises(
        PreflightError, match=r"token ids must be below the model's vocabulary of 200; .*train\.jsonl:1.* has \d+\."
    ):
        train(tiny_config(folder, tmp_path))
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "word " * 200}) + "\n")
    with pytest.raises(
        PreflightError, match=r"rows must fit the model's 512 positions; the longest has \d+ tokens\. Try --max-length 512"
    ):
        train(tiny_config(tiny_llama, tmp_path, max_length=2048))


def test_nan_in_the_base_is_named_before_training(tmp_path: Path) -> None:
    """Case 26."""
    folder = write_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreflightError, match=r"NaN or Inf in:\n  - model\.layers\.1\.mlp\.up_proj\.weight: 1 of"):
        train(tiny_config(folder, tmp_path))
    assert not (tmp_path / "run").exists()


def test_nan_loss_stops_before_the_weights(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 24."""
    real = loop.supervised_loss
    calls = iter(range(100))
    monkeypatch.setattr(
        loop, "supervised_loss", lambda *arguments: real(*arguments) * (float("nan") if next(calls) == 4 else 1)
    )
    with pytest.raises(NumericError) as caught:
        train(tiny_config(tiny_llama, tmp_path))
    message = str(caught.value)
    assert "the loss must be a finite number; it was nan at step 5, in" in message
    assert "train.jsonl:" in message
    assert f"The step was not applied; the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-3'}." in message
    assert message.endswith("Try a lower learning rate than 0.01 (--lr).")
    checkpoint = read_newest(tmp_path / "run" / "checkpoints", weights_only=False, note=print)
    assert checkpoint.state.step == 3
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.weights.values())
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_learning_rate_that_explodes_never_saves_it(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 24 without a trick."""
    with pytest.raises(NumericError, match="Try a lower learning rate than"):
        train(tiny_config(tiny_llama, tmp_path, learning_rate=1e38, save_every=1))
    checkpoint = read_newest(tmp_path / "run" / "checkpoints", weights_only=False, note=print)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint.weights.values())


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Put an Inf into the gradient of the given steps of the run, its plan's own measurements left alone."""
    calls = iter(range(1, 100))

    class Spoiled(Optimizer):
        def clip(self) -> float:
            if next(calls) in steps:
                self.parameters[0].grad.view(-1)[0] = float("inf")
            return super().clip()

    monkeypatch.setattr("luthier.training.run.Optimizer", Spoiled)


def test_inf_gradient_is_skipped_and_counted(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 25."""
    spoil_gradients(monkeypatch, 2, 4)
    listener = Recorder()
    result = train(tiny_config(tiny_llama, tmp_path, steps=5, save_every=1, keep_checkpoints=9), listener=listener)
    assert result.skipped_steps == 2
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [0, 1, 1, 2, 2]
    assert [line["grad_norm"] is None for line in metrics(tmp_path / "run")] == [False, True, False, True, False]
    assert "step 2: the gradient is not finite; the step is skipped (1 so far)." in listener.notes
    weights = [load_file(tmp_path / "run" / "checkpoints" / f"step-{step}" / "weights.safetensors") for step in range(6)]
    same = [
        all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))
        for one, two in itertools.pairwise(weights)
    ]
    assert same == [False, True, False, True, False]


def test_inf_gradients_in_a_row_stop(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 25."""
    spoil_gradients(monkeypatch, 4, 5, 6)
    with pytest.raises(NumericError) as caught:
        train(tiny_config(tiny_llama, tmp_path))
    assert "they were not in 3 steps in a row, the last being step 6. None of them was applied; the last good" in str(
        caught.value
    )
    assert "step-3." in str(caught.value)


def test_out_of_memory_in_a_step(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 27."""
    monkeypatch.setattr(loop, "supervised_loss", lambda *_: torch.empty(1 << 60))
    with pytest.raises(
        PreflightError, match=r"memory ran out with packs of 2048 tokens; .* Try --set micro_batch_tokens=1024, with"
    ):
        train(tiny_config(tiny_llama, tmp_path))


def test_evaluation_before_during_and_after(tiny_llama: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", 6, first=30)
    config = tiny_config(tiny_llama, tmp_path, eval_data=str(held_out), epochs=10, steps=None, samples=2, max_new_tokens=8)
    listener = Recorder()
    result = train(config, listener=listener)
    content = result.to_json()["eval"]
    assert content["after"]["loss"] < content["before"]["loss"]
    assert {"loss", "perplexity", "exact_match"} <= content["before"].keys() == content["after"].keys()
    assert not {"kind", "step", "rows", "seconds"} & content["before"].keys()
    records = [line for line in metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert [record["step"] for record in records] == [0, 7, 14, 21, 28, 35]
    assert {record["rows"] for record in records} == {6}
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert samples == result.samples
    assert [set(sample) for sample in samples] == [{"prompt", "expected", "before", "after"}] * 2
    assert samples[0]["expected"] == '{"thing": "boat", "colour": "white"}' or json.loads(samples[0]["expected"])
    assert isinstance(samples[0]["before"], str)
    assert isinstance(samples[0]["after"], str)
    manifests = json.loads((tmp_path / "run" / "data_manifest.json").read_text())
    assert (manifests["train"]["kept"], manifests["eval"]["kept"]) == (14, 6)


def test_evaluation_leaves_training_alone(tiny_llama: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held_out.jsonl", 3, first=30)
    train(tiny_config(tiny_llama, tmp_path, out=str(tmp_path / "without"), dropout=0.1))
    keys = {"eval_data": str(held_out), "eval_every": 2, "eval_rows": 2, "max_new_tokens": 4}
    train(tiny_config(tiny_llama, tmp_path, out=str(tmp_path / "with"), dropout=0.1, **keys))
    assert adapter_hash(tmp_path / "with") == adapter_hash(tmp_path / "without")
    steps = [record for record in numbers(tmp_path / "with") if record["kind"] == "step"]
    assert steps == numbers(tmp_path / "without")


def test_rows_trained_on_and_held_out_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 46."""
    held_out = write_rows(tmp_path / "held_out.jsonl", 4, first=12)
    listener = Recorder()
    train(tiny_config(tiny_llama, tmp_path, eval_data=str(held_out), steps=1, max_new_tokens=2), listener=listener)
    assert any(note.startswith("2 of 4 held-out rows are also in the training data") for note in listener.notes)


def test_a_run_does_not_write_where_it_reads(tmp_path: Path, tiny_llama: Path) -> None:
    """Reliability: --overwrite must never delete the run's own data or model."""
    config = tiny_config(tiny_llama, tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    data = Path(config.data).rename(out / "train.jsonl")
    with pytest.raises(ConfigError, match=r"a run must not write where it reads; data .*train\.jsonl lies in .*run"):
        train(config.model_copy(update={"data": str(data), "out": str(out)}), overwrite=True)
    assert data.is_file()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_run_with_the_paged_optimizer_is_moved_and_learns_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the place of the GPU: bitsandbytes has a version for it that pages nothing."""
    pytest.importorskip("bitsandbytes")
    plain = train(tiny_config(tiny_llama, tmp_path, out=str(tmp_path / "plain"), steps=4))
    monkeypatch.setattr("luthier.training.run.check_optimizer", lambda _config: None)
    moved: list[str] = []
    monkeypatch.setattr("luthier.training.prepare.device_of", lambda config: moved.append(config.optimizer) or "cpu")
    paged = train(tiny_config(tiny_llama, tmp_path, out=str(tmp_path / "paged"), steps=4, optimizer="paged_adamw"))
    assert moved == ["paged_adamw"]
    assert paged.loss_last == pytest.approx(plain.loss_last, rel=1e-3)
