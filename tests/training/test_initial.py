"""Runs whose terms start from the weights or their inputs: what they start as, what is written, how they go on."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config as tiny_model_config
from tiny import tiny_tokenizer, write_tiny
from tiny_runs import Recorder, adapter_hash, numbers, send_at, tiny_config, write_rows
from transformers import AutoModelForCausalLM

import luthier
from luthier.config import RunConfig
from luthier.errors import CheckpointError, ConfigError, Interrupted
from luthier.lowrank import eva, pissa, qera
from luthier.models.originals import Originals
from luthier.training.load_run import load_target
from luthier.training.plan import plan_run
from luthier.training.run import resume, train

pytestmark = pytest.mark.usefixtures("without_plots")

INITS = [("lora", "pissa"), ("lora", "eva"), ("qlora", "pissa"), ("qlora", "eva"), ("qlora", "loftq"), ("qlora", "qera")]
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("initial")
    return {family: write_tiny(root / family, family) for family in ("llama", "phi3", "gpt2")}


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Finished runs of three steps, each made once: runs(family, method, init)."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def made(family: str, method: str, init: str) -> Path:
        config = config_of(folders[family], root / f"{family}-{method}-{init}", method, init)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("luthier.training.report.write_plots", lambda *_: None)
            train(config)
        return Path(str(config.out))

    return made


def config_of(model: Path, folder: Path, method: str, init: str, **changes: Any) -> RunConfig:
    folder.mkdir(exist_ok=True)
    # Packs of one size, whatever memory is free: sums over them are the same to the last bit.
    fixed = {"steps": 3, "save_every": 1, "micro_batch_tokens": 256}
    return tiny_config(model, folder, method=method, init=init, **{**fixed, **changes})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.to(torch.float32)


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def dequantized(folder: Path, target: Path) -> Path:
    """The base that QLoRA trains on, as plain Transformers weights."""
    loaded = luthier.load(str(folder), base="nf4").model
    model = AutoModelForCausalLM.from_pretrained(folder)
    own = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in luthier.adapters.targets.low_rank_layers(loaded).items():
            weight = layer.matrix.dequantize()
            own[name].weight.copy_(weight.T if type(own[name]).__name__ == "Conv1D" else weight)
    model.save_pretrained(target)
    return target


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in numbers(run) if record["kind"] == "step"]


@pytest.mark.parametrize(
    ("family", "method", "init"),
    [*(("llama", *pair) for pair in INITS), ("phi3", "lora", "pissa"), ("phi3", "qlora", "qera")],
)
def test_the_adapter_stands_on_the_base_as_anyone_has_it(
    folders: dict[str, Path], runs: Callable[..., Path], tmp_path: Path, family: str, method: str, init: str
) -> None:
    """Plain PEFT, on the weights as they were published or as NF4 gives them back, computes what was trained."""
    peft = pytest.importorskip("peft")
    run = runs(family, method, init)
    tuned = load_target(str(run)).model
    base = folders[family] if method == "lora" else dequantized(folders[family], tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    before = logits(plain)
    theirs = logits(peft.PeftModel.from_pretrained(plain, run / "adapter"))
    assert difference(logits(tuned), theirs) < 1e-4
    assert difference(theirs, before) > 1e-3
    fields = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == ((8, 16) if init == "pissa" else (4, 8))


def shapes_of_whole_blocks() -> Any:
    """A tiny llama whose rows are whole blocks, which bitsandbytes asks for on CPUs."""
    wide: Any = tiny_model_config("llama")
    wide.intermediate_size = 128
    return wide


def test_bitsandbytes_own_base_takes_the_adapter_of_a_repaired_run(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from luthier.config import NF4Options
    from luthier.models.quantize import quantize

    wide = shapes_of_whole_blocks()
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    config = config_of(tmp_path / "llama", tmp_path / "a", "qlora", "loftq")
    train(config)
    quantize(str(tmp_path / "llama"), tmp_path / "nf4", nf4=NF4Options())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map={"": "cpu"})
    theirs = peft.PeftModel.from_pretrained(base, f"{config.out}/adapter").train()  # it computes in bfloat16 in evaluation
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    assert difference(logits(load_target(str(config.out)).model), expected) < 1e-4


@pytest.mark.parametrize(("method", "init"), INITS)
def test_the_first_loss_is_that_of_the_model_or_of_the_repaired_one(runs: Callable[..., Path], method: str, init: str) -> None:
    first, expected = losses(runs("llama", method, init))[0], losses(runs("llama", method, "default"))[0]
    if init in ("pissa", "eva"):
        assert first == pytest.approx(expected, rel=1e-5)
        return
    assert first != pytest.approx(expected, rel=1e-5)
    assert first == pytest.approx(expected, rel=0.2)


def started_factors(config: RunConfig) -> dict[str, torch.Tensor]:
    train(config)
    return load_file(Path(str(config.out)) / "initial.safetensors")


@pytest.mark.parametrize(("family", "variant"), [("llama", "rslora"), ("gpt2", "dora")])
def test_factors_are_those_of_the_formula_for_every_scale(
    folders: dict[str, Path], tmp_path: Path, family: str, variant: str
) -> None:
    """s B A is the repair whatever s is: of rsLoRA, of DoRA, of a pattern."""
    from luthier.adapters.targets import low_rank_layers
    from luthier.calibration import collect_moments, row_packs
    from luthier.data import Renderer, load_examples

    wide = {"llama": "down_proj", "gpt2": "c_fc"}[family]
    changes = {"variant": variant, "rank_pattern": {wide: 6}, "alpha_pattern": {wide: 5.0}, "steps": 1}
    config = config_of(folders[family], tmp_path / "a", "qlora", "qera", **changes)
    factors = started_factors(config)
    loaded = luthier.load(str(folders[family]), base="nf4")
    examples = load_examples(config.data, Renderer(loaded.tokenizer, max_length=128)).examples
    moments = collect_moments(loaded.model, row_packs(examples, tokens=10**6, max_tokens=2048))
    originals, layers = Originals(folders[family]), low_rank_layers(loaded.model)
    for name, own in moments.items():
        rank, alpha = (6, 5.0) if name.endswith(wide) else (4, 8.0)
        s = alpha / (rank**0.5 if variant == "rslora" else rank)
        expected = qera(originals.weight(name), layers[name].matrix.dequantize(), own.second, rank)
        product = s * factors[f"{name}.B"] @ factors[f"{name}.A"]
        assert difference(product, expected.B @ expected.A) < 1e-3
    tuned = load_target(str(config.out))
    assert torch.isfinite(logits(tuned.model)).all()


def test_pissa_and_eva_factors(folders: dict[str, Path], runs: Callable[..., Path]) -> None:
    from luthier.adapters.targets import low_rank_layers
    from luthier.calibration import collect_moments, row_packs
    from luthier.data import Renderer, load_examples

    principal = load_file(runs("llama", "lora", "pissa") / "initial.safetensors")
    loaded = luthier.load(str(folders["llama"]))
    layers = low_rank_layers(loaded.model)
    for name in {key.rpartition(".")[0] for key in principal}:
        expected = pissa(layers[name].matrix.dequantize(), 4)
        product = 2 * principal[f"{name}.B"] @ principal[f"{name}.A"]
        assert difference(product, expected.B @ expected.A) < 1e-5
    run = runs("llama", "lora", "eva")
    directions = load_file(run / "initial.safetensors")
    examples = load_examples(run.parent / "train.jsonl", Renderer(loaded.tokenizer, max_length=128)).examples
    for name, own in collect_moments(loaded.model, row_packs(examples, tokens=10**6, max_tokens=2048)).items():
        overlap = eva(own.second, 4) @ directions[f"{name}.A"].T
        assert torch.allclose(overlap.abs(), torch.eye(4), atol=1e-3)
        assert not directions[f"{name}.B"].any()


def test_patterns_and_tied_embeddings_come_out_right_where_the_rank_is_doubled(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    changes = {
        "variant": "rslora", "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"q_proj": 3.0}, "dropout": 0.1,
        "targets": ["q_proj", "down_proj", "embed_tokens"],
    }  # fmt: skip
    config = config_of(folders["llama"], tmp_path / "a", "lora", "pissa", **changes)
    notes = Recorder()
    train(config, listener=notes)
    assert any("init pissa has nothing for model.embed_tokens" in note for note in notes.notes)
    run = Path(str(config.out))
    plain = AutoModelForCausalLM.from_pretrained(folders["llama"]).eval()
    theirs = logits(peft.PeftModel.from_pretrained(plain, run / "adapter"))
    assert difference(logits(load_target(str(run)).model), theirs) < 2e-5


@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("qlora", "qera")])
def test_a_stopped_run_goes_on_bit_for_bit(folders: dict[str, Path], tmp_path: Path, method: str, init: str) -> None:
    whole, stopped = (config_of(folders["llama"], tmp_path / name, method, init, steps=4) for name in "ab")
    train(whole)
    with pytest.raises(Interrupted):
        train(stopped, listener=send_at(2, signal.SIGINT))
    resume(str(stopped.out))
    one, other = Path(str(whole.out)), Path(str(stopped.out))
    assert numbers(one) == numbers(other)
    assert adapter_hash(one) == adapter_hash(other)
    listed = json.loads((other / "MANIFEST.json").read_text())["files"]
    assert "initial.safetensors" in listed


def test_a_run_does_not_go_on_without_what_it_started_from(folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(folders["llama"], tmp_path / "a", "lora", "pissa", steps=4)
    with pytest.raises(Interrupted):
        train(config, listener=send_at(1, signal.SIGINT))
    path = Path(str(config.out)) / "initial.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    next(iter(tensors.values()))[0, 0] += 1

    def change() -> None:
        save_file(tensors, path, metadata={"taken_off": "true"})

    for harm in (path.unlink, lambda: path.write_bytes(whole[:-100]), change):
        harm()
        with pytest.raises(CheckpointError, match="what its terms started with"):
            resume(str(config.out))
    path.write_bytes(whole)
    assert resume(str(config.out)).steps == 4


def test_a_checkpoint_from_before_there_was_an_init_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    from luthier.training.state import Identity

    old = Identity({"rank": 4})
    old.refuse_other_config({"rank": 4, "init": "default"})
    with pytest.raises(CheckpointError, match="init was 'default' and is now 'eva'"):
        old.refuse_other_config({"rank": 4, "init": "eva"})


def test_evaluation_data_does_not_move_the_start_and_fewer_tokens_do(
    folders: dict[str, Path], runs: Callable[..., Path], tmp_path: Path
) -> None:
    first = load_file(runs("llama", "qlora", "qera") / "initial.safetensors")
    held_out = write_rows(tmp_path / "eval.jsonl", 4, first=30)
    beside = config_of(folders["llama"], tmp_path / "b", "qlora", "qera", steps=1, eval_data=str(held_out), samples=0)
    second = started_factors(beside)
    assert all(torch.equal(first[key], second[key]) for key in first)
    few = started_factors(config_of(folders["llama"], tmp_path / "a", "qlora", "qera", steps=1, init_tokens=64))
    assert any(not torch.equal(few[key], first[key]) for key in few)


def test_the_base_is_the_base_while_adapters_are_switched_off(folders: dict[str, Path]) -> None:
    model, _ = luthier.load(str(folders["llama"]))
    before = logits(model)
    name = "model.layers.0.mlp.down_proj"
    weight = model.get_submodule(name).matrix.dequantize()
    A, B = pissa(weight, 4)
    start = luthier.adapters.Start({name: (A, B)}, taken_off=True)
    luthier.attach(model, luthier.AdapterSpec(rank=4, alpha=4, targets=[name]), start=start)
    assert difference(logits(model), before) < 1e-5
    with torch.no_grad():
        model.get_submodule(name).terms["default"].lora_A += 0.1
    assert difference(logits(model), before) > 1e-3
    with luthier.disabled(model):
        assert torch.equal(logits(model), before)
    luthier.detach(model)
    assert torch.equal(logits(model), before)
    assert not len(model.get_submodule(name).terms)


def test_a_start_that_does_not_fit_is_refused(folders: dict[str, Path]) -> None:
    from luthier.errors import AdapterError

    model, _ = luthier.load(str(folders["llama"]))
    spec = luthier.AdapterSpec(rank=4, targets=["down_proj"])
    wrong = {
        "model.layers.0.mlp.down_proj": (torch.zeros(3, 96), torch.zeros(64, 3)),
        "lm_head": (torch.zeros(1), torch.zeros(1)),
    }
    with pytest.raises(AdapterError, match=r"(?s)A must be \(4, 96\) and B \(64, 4\).*lm_head is no linear layer"):
        luthier.attach(model, spec, start=luthier.adapters.Start(wrong))
    dora = luthier.AdapterSpec(rank=4, targets=["down_proj"], variant="dora")
    with pytest.raises(AdapterError, match="have no magnitude"):
        luthier.attach(model, dora, start=luthier.adapters.Start({}, taken_off=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "qera"}, "repairs what quantizing takes away"),
        ({"init": "loftq", "method": "qlora", "base": "asis"}, "repairs what quantizing takes away"),
        ({"init": "pissa", "variant": "dora"}, "lengths of dora's rows"),
        ({"init": "pissa", "init_tokens": 5}, "init_tokens would do nothing"),
        ({"init": "eva", "method": "full", "rank": 16, "alpha": 32.0}, "init would do nothing"),
        ({"init": "qeera"}, "init must be"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_llama, tmp_path, **changes)


def test_a_model_in_nf4_already_has_nothing_to_repair(folders: dict[str, Path], tmp_path: Path) -> None:
    from luthier.config import NF4Options
    from luthier.models.quantize import quantize

    quantize(str(folders["llama"]), tmp_path / "nf4", nf4=NF4Options())
    with pytest.raises(ConfigError, match="none of the adapter's targets is one"):
        train(config_of(tmp_path / "nf4", tmp_path / "a", "qlora", "loftq"))


def test_layers_that_stay_as_they_are_begin_as_by_default(folders: dict[str, Path], tmp_path: Path) -> None:
    listener = Recorder()
    config = config_of(folders["llama"], tmp_path / "a", "qlora", "qera", skip_modules=["down_proj"], steps=1)
    train(config, listener=listener)
    assert any("init qera has nothing for model.layers.0.mlp.down_proj" in note for note in listener.notes)
    factors = load_file(Path(str(config.out)) / "initial.safetensors")
    assert factors
    assert not any("down_proj" in key for key in factors)


@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("qlora", "qera")])
def test_the_plan_counts_what_the_start_takes(folders: dict[str, Path], tmp_path: Path, method: str, init: str) -> None:
    started = plan_run(config_of(folders["llama"], tmp_path / "a", method, init), Recorder())
    plain = plan_run(config_of(folders["llama"], tmp_path / "b", method, "default"), Recorder())
    assert started.fits
    assert (started.init, plain.init) == (init, "default")
    assert started.initial_seconds > 0 == plain.initial_seconds
    assert started.disk_bytes > plain.disk_bytes
    assert started.footprint.initial_bytes > started.footprint.base_bytes
    doubled = started.footprint.adapter_bytes / plain.footprint.adapter_bytes
    assert doubled == (2 if init == "pissa" else 1)
    assert (started.moments_bytes > 0) == (init == "qera")
