"""The plan: its figures against a real model's, what it chooses, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf
from safetensors.torch import load_file
from tiny import FAMILIES, write_tiny
from tiny_runs import tiny_config, write_rows

from luthier.adapters import trainable_parameters
from luthier.config import RunConfig, make_config
from luthier.data import Example
from luthier.data.packing import pack_examples
from luthier.errors import ConfigError, DataError, PreflightError
from luthier.matrices import StoredMatrix
from luthier.models import nf4_cache
from luthier.models.load import load
from luthier.models.skeleton import build_skeleton
from luthier.models.skeleton import make_config as make_model_config
from luthier.training import plan as planning
from luthier.training import planner as planner_module
from luthier.training.blueprint import read_blueprint, stored_bytes
from luthier.training.calibrate import ByteCosts, Line, TimeCosts
from luthier.training.events import Listener
from luthier.training.footprint import Memory
from luthier.training.order import Order
from luthier.training.plan import plan_run
from luthier.training.planner import Cut, Planner, count_trained
from luthier.training.prepare import read_data, read_model
from luthier.training.sample import sample_matrix, sample_model
from luthier.training.workload import Row, Workload, workload
from luthier.units import parse_size

MB = 10**6
SETTINGS: list[dict[str, Any]] = [{}, {"method": "qlora"}, {"base": "bf16"}, {"variant": "dora"}, {"method": "full"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_tiny(root / family, family) for family in FAMILIES}


def settings(model: Path, folder: Path, changes: dict[str, Any]) -> RunConfig:
    removed = {"rank": 16, "alpha": 32.0} if changes.get("method") == "full" else {}
    return tiny_config(model, folder, **removed, **changes)


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: str(*changes.values()) or "plain")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3"])
def test_headers_tell_what_the_loaded_model_is(
    folders: dict[str, Path], tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    config = settings(folders[family], tmp_path, {**changes, "micro_batch_tokens": 64})
    blueprint = read_blueprint(config, Listener())
    targets, trained = count_trained(blueprint, config)
    prepared = read_model(config, read_data(config, Listener()), Listener())
    matrices = {id(module): module for module in prepared.model.modules() if isinstance(module, StoredMatrix)}
    assert blueprint.matrix_bytes == sum(matrix.size_bytes for matrix in matrices.values())
    assert trained == prepared.trainable_parameters
    inside = {id(parameter) for matrix in matrices.values() for parameter in matrix.parameters()}
    terms = {id(parameter) for name, parameter in trainable_parameters(prepared.model) if config.method != "full"}
    plain = [p for p in prepared.model.parameters() if id(p) not in inside | terms]
    assert blueprint.plain_bytes == sum(parameter.nbytes for parameter in plain)
    assert all(".terms." not in target for target in targets)


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "nf4", "q4_0", "q8_0"])
def test_bytes_of_a_stored_matrix(kind: str) -> None:
    for double in (True, False):
        matrix = sample_matrix(kind, 96, 160, double=double)
        assert matrix.shape == (96, 160)
        assert stored_bytes(kind, 96, 160, double=double) == matrix.size_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_sampled_and_planned(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    plan = plan_run(settings(folders[family], tmp_path, {}), Listener())
    assert plan.fits
    assert plan.layers == 2
    assert 0 < plan.footprint.activation_bytes < 20 * MB
    assert plan.seconds_per_step > 0
    assert plan.trainable_parameters > 0


def test_one_layer_stands_for_each_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    config = settings(folders["gemma3"], tmp_path, {})
    blueprint = read_blueprint(config, Listener())
    model = sample_model(blueprint, config, count_trained(blueprint, config)[0])
    assert model.config.layer_types == list(dict.fromkeys(blueprint.config.layer_types))
    assert all(not parameter.is_meta for parameter in model.parameters())
    assert trainable_parameters(model)


def test_random_numbers_are_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    config = settings(tiny_llama, tmp_path, {})
    write_rows(Path(config.data), 14)
    torch.manual_seed(5)
    plan_run(config, Listener())
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_workload_is_what_the_loop_draws() -> None:
    examples = [Example([1] * n, [False] + [True] * (n - 1), [], "", None, f"row {n}") for n in (10, 20, 30)]
    load = workload(make_config({"data": "x", "batch_size": 2, "epochs": 1}), examples)
    assert load.total_steps == 2
    assert [len(step) for step in load.steps] == [2, 1]
    assert sum(row.tokens for step in load.steps for row in step) == 60
    assert sum(row.supervised for step in load.steps for row in step) == 57
    assert load.longest == 30
    assert load.usual_length == round(1400 / 60)


def test_packing_keeps_order_and_lets_long_rows_alone() -> None:
    load = Workload([[Row(10, 5, 10), Row(20, 6, 20), Row(30, 7, 30)], [Row(25, 1, 25)]], 2, 30)
    both = load.packing(30)
    assert (both.largest, both.supervised_largest, both.packs, both.most, both.tokens) == (30, 11, 1.5, 2, 42.5)
    assert load.packing(60).largest == 60
    assert load.packing(8).largest == 30
    assert load.truncated(15).packing(1000).largest == 40


@pytest.mark.parametrize("max_tokens", [8, 40, 64, 1000])
def test_shared_beginnings_are_counted_as_the_packer_lays_them(max_tokens: int) -> None:
    draw = random.Random(3)
    ids = [[*[7] * draw.choice((0, 3, 9, 20)), *(draw.randrange(50) for _ in range(draw.randrange(2, 12)))] for _ in range(24)]
    examples = [Example(one, [draw.random() < 0.6 for _ in one], [], "", None, "row") for one in ids]
    config = make_config({"data": "x", "batch_size": 8, "epochs": 1})
    packing = workload(config, examples, share=True).packing(max_tokens)
    order = Order(config.seed, 24)
    steps = [[examples[row] for row in order.row_numbers(first, first + 8)] for first in (0, 8, 16)]
    packs = [pack_examples(step, max_tokens=max_tokens, share=True) for step in steps]
    every = [pack for step in packs for pack in step]
    assert packing.largest == max(pack.tokens for pack in every)
    assert packing.supervised_largest == max(pack.supervised_tokens for pack in every)
    assert packing.packs * 3 == len(every)
    assert packing.tokens * 3 == pytest.approx(sum(pack.tokens for pack in every))
    if max_tokens == 1000:
        assert packing.tokens * 3 < sum(map(len, ids))


class _Blueprint:
    base_bytes, loading_bytes, layers, hidden_size = 100 * MB, 0, 4, 8
    storages = {"a": "nf4"}  # noqa: RUF012


def planner(allowed_mb: float, length: int = 256, **keys: Any) -> Planner:
    """A model of 100 MB with 4 layers that keep 1 MB for 8 tokens each and 8 kB where recomputed; 50 MB of program."""
    costs = ByteCosts(kept=MB / 8, input=1000, working=MB / 16, recomputing=MB / 4, head=MB)
    memory = Memory(50 * MB, _Blueprint(), costs, 1000, False)  # type: ignore[arg-type]
    load = Workload([[Row(length, 200, length)] * 8], 1, length)
    return Planner(RunConfig(data="x", **keys), load, memory, int(allowed_mb * MB))


def test_everything_is_kept_where_there_is_room() -> None:
    assert planner(10_000).cut() == (Cut(2048, 0, True), True)


def test_smaller_packs_come_before_recomputing() -> None:
    assert planner(1000).cut() == (Cut(1024, 0, True), True)


def test_only_as_many_layers_are_recomputed_as_needed() -> None:
    cut, fits = planner(350).cut()
    assert (cut, fits) == (Cut(512, 2, False), True)
    tight = planner(350)
    assert tight.footprint(Cut(512, 1, False)).peak_bytes > 0.97 * tight.allowed >= tight.footprint(cut).peak_bytes


def test_recomputing_everything_needs_one_layer_at_a_time() -> None:
    footprint = planner(1000).footprint(Cut(512, 4, False))
    assert footprint.activation_bytes == 512 * (4 * 1000 + MB / 4)


def test_what_does_not_fit_gets_the_nearest_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_module, "available_bytes", lambda: 0)
    monkeypatch.setattr(planner_module, "rss_bytes", lambda: 0)
    pinned = planner(300, method="qlora", micro_batch_tokens=2048)
    assert pinned.cut()[1] is False
    assert pinned.suggestions() == ["leave micro_batch_tokens and recompute_layers to the plan"]
    long = planner(300, length=2048, method="qlora")
    assert long.cut()[1] is False
    (advice,) = long.suggestions()
    fitting = int(advice.removeprefix("--max-length ").removesuffix(" --on-long truncate"))
    assert replace(long, load=long.load.truncated(fitting)).cut()[1]
    assert not replace(long, load=long.load.truncated(fitting + 8)).cut()[1]


@pytest.fixture(scope="module")
def broad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 llama whose weights are most of what a run takes; of them there is only the header, the rest is a hole."""
    folder = write_tiny(tmp_path_factory.mktemp("broad"), "llama")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 8}
    config = json.loads((folder / "config.json").read_text()) | sizes | {"num_key_value_heads": 8, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    entries, end = {}, 0
    for name, parameter in build_skeleton(make_model_config(config, "broad"), "broad").named_parameters():
        start, end = end, end + 2 * parameter.numel()
        entries[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(folder / "model.safetensors", 8 + len(header) + end)
    return folder


@pytest.mark.parametrize(
    ("changes", "share", "advice"),
    [
        ({"base": "f32"}, 0.6, ["leave --base out", "--method qlora without --base f32"]),
        ({"base": "f32"}, 0.3, ["--method qlora without --base f32"]),
        ({"base": "bf16"}, 0.5, ["--method qlora without --base bf16"]),
        ({}, 0.5, ["--method qlora"]),
        ({"method": "full"}, 0.5, ["--method lora", "--method qlora"]),
        ({"method": "qlora"}, 0.5, []),
    ],
)
def test_other_bases_that_fit_are_named_by_flags_that_go_together(
    broad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], share: float, advice: list[str]
) -> None:
    """share: of what the run takes, program left out. A person who follows the advice must not meet another error."""
    monkeypatch.setattr(planner_module, "available_bytes", lambda: 0)
    monkeypatch.setattr(planner_module, "rss_bytes", lambda: 0)
    config = settings(broad, tmp_path, changes)
    blueprint = read_blueprint(config, Listener())
    trains_base = config.method == "full"
    costs = ByteCosts(kept=1.0, input=1.0, working=1.0, recomputing=1.0, head=1)
    memory = Memory(0, blueprint, costs, count_trained(blueprint, config)[1], trains_base)
    own = Planner(config, Workload([[Row(20, 9, 20)]], 1, 20), memory, 10**12)
    small = replace(own, allowed=int(share * own.footprint(own.cut()[0]).peak_bytes))
    assert small.suggestions() == advice
    for flags in advice:
        method = re.search(r"--method (\w+)", flags)
        base = {"base": None} if "leave --base out" in flags or "without --base" in flags else {}
        make_config(config.model_dump(exclude_unset=True), {"method": method[1]} if method else {}, base)


def test_the_memory_that_is_named_is_enough_for_the_plan_to_choose_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made again is a little off the first one, so what it asks for has the room that it leaves itself."""
    monkeypatch.setattr(planner_module, "available_bytes", lambda: 400 * MB)
    monkeypatch.setattr(planner_module, "rss_bytes", lambda: 0)
    small = planner(100, method="qlora", length=8)
    (advice,) = small.suggestions()
    named = parse_size(advice.removeprefix("--memory ").removesuffix(", which is there"))
    assert replace(small, allowed=named).cut()[1]
    smallest = min(small.footprint(cut).peak_bytes for cut in small._cuts())
    monkeypatch.setattr(planner_module, "available_bytes", lambda: smallest + MB)
    assert small.suggestions() == [f"--memory {(smallest + MB) // MB}MB, which is there"]
    monkeypatch.setattr(planner_module, "available_bytes", lambda: smallest)
    assert smallest % MB  # the whole megabytes that are there are fewer than the run takes
    assert small.suggestions() == []


def test_a_base_that_the_model_cannot_have_is_not_advised(tmp_path: Path) -> None:
    """Q2_K blocks cannot stay as they are: leaving --base bf16 out is no way."""
    source = random_model("llama", hidden_size=256, intermediate_size=256)
    path = write_gguf(tmp_path / "tiny.gguf", source, "llama", Kind.F16, blocks={"blk.0.ffn_up.weight": Kind.Q2_K})
    (tmp_path / "out").mkdir()
    plan = plan_run(settings(path, tmp_path, {"base": "bf16", "memory": "20MB"}), Listener())
    assert not plan.fits
    assert not any("--base out" in one for one in plan.suggestions)


def test_figures_add_up() -> None:
    own = planner(10_000)
    times = TimeCosts(Line(0.0, 1e-3), Line(0.5, 2e-3), 1e-3, 0.25, 4e6, 8e6, 1e10)
    cut = Cut(1024, 1, False)
    # two packs of 1024 tokens: 4 layers both ways, one of them forward once more
    layers = 2 * (4 * (1.024 + 0.5 + 2.048) + 1.024)
    assert own.seconds_per_step(cut, times) == pytest.approx(layers + 1600 * 1e-3 + 0.25)
    assert own.flops_per_step(cut, times) == 4 * 4e6 * 2048 + 8e6 * 1600


def test_memory_is_read_and_refused() -> None:
    assert RunConfig(data="x", memory="6GB").memory == "6GB"
    with pytest.raises(ConfigError) as caught:
        make_config({"data": "x", "memory": "plenty"})
    assert str(caught.value) == "memory: a size is a number above 0 with MB, GB, MiB or GiB, such as 6GB; got 'plenty'."


def test_a_run_that_does_not_fit_is_refused_before_loading(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 27, exit code 3."""
    from luthier.training import run

    monkeypatch.setattr(run, "read_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(PreflightError, match="a run must fit in the memory it is allowed; it needs") as caught:
        run.train(settings(tiny_llama, tmp_path, {"memory": "20MB"}))
    assert caught.value.exit_code == 3
    assert "--memory" in str(caught.value)


def test_the_plan_is_kept_with_the_run(tiny_llama: Path, tmp_path: Path, without_plots: None) -> None:
    from luthier.training.run import train

    result = train(settings(tiny_llama, tmp_path, {"steps": 2, "recompute_layers": 1}))
    plan = json.loads((Path(result.run_dir) / "plan.json").read_text())
    assert plan["recompute_layers"] == 1
    assert plan["trainable_parameters"] == result.trainable_parameters
    assert plan["total_parameters"] == result.total_parameters
    assert {"peak_bytes", "seconds_per_step", "trainable_parameters", "fits"} <= plan.keys()


def test_a_row_beyond_the_vocabulary_is_found_without_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 49."""
    config = settings(tiny_llama, tmp_path, {})
    data = read_data(config, Listener())
    data.train.examples[3].ids[0] = 512
    with pytest.raises(PreflightError, match="token ids must be below the model's vocabulary of 512"):
        planning.make_plan(config, data, Listener())


def test_disk_counts_the_quantized_weights_that_will_be_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    plain = settings(tiny_llama, tmp_path, {"method": "qlora"})
    keeps = plain.model_copy(update={"cache_quantized": True})
    before = [plan_run(config, Listener()).disk_bytes for config in (plain, keeps)]
    load(str(tiny_llama), base="nf4", nf4=keeps.nf4_options)
    (kept,) = (tmp_path / "cache" / "nf4").glob("*/model.safetensors")
    quantized = sum(tensor.nbytes for name, tensor in load_file(kept).items() if "quant_state" not in name)
    assert before[1] - before[0] == quantized
    assert plan_run(keeps, Listener()).disk_bytes == before[0]


def test_a_cache_on_another_disk_needs_room_there(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    plain = settings(tiny_llama, tmp_path, {"method": "qlora"})
    keeps = plain.model_copy(update={"cache_quantized": True})
    monkeypatch.setattr(planning, "_disk_of", lambda folder: folder.is_relative_to(tmp_path / "cache"))
    assert plan_run(keeps, Listener()).disk_bytes == plan_run(plain, Listener()).disk_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(nf4_cache.shutil, "disk_usage", lambda _folder: usage._replace(free=1000))
    with pytest.raises(PreflightError, match=r"room for the quantized weights, \d+ bytes; .*/cache/nf4: 1000 are free\. Leave"):
        plan_run(keeps, Listener())


@pytest.mark.parametrize(("base", "loading"), [("asis", 0), ("bf16", 512 * 64 * 4), ("nf4", 96 * 64 * 4)])
def test_blocks_stand_in_float32_while_they_are_converted(tmp_path: Path, base: str, loading: int) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", Kind.Q8_0)
    assert read_blueprint(settings(path, tmp_path, {"base": base}), Listener()).loading_bytes == loading


def test_an_optimizer_that_cannot_run_here_is_refused_as_train_does(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"paged_adamw .* needs CUDA; there is none here"):
        plan_run(settings(tiny_llama, tmp_path, {"optimizer": "paged_adamw"}), Listener())


def test_all_rows_too_long_is_told_by_the_plan(tiny_llama: Path, tmp_path: Path) -> None:
    """Case 42."""
    config = settings(tiny_llama, tmp_path, {"max_length": 8, "on_long": "drop"})
    with pytest.raises(DataError, match="all 14 have more"):
        plan_run(config, Listener())


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("6GB", 6 * 10**9), ("750 MB", 750 * MB), ("1.5GiB", 3 * 2**29), ("64mib", 2**26), ("1000000", MB), ("2G", 2 * 10**9)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "6 apples", "6iB", "1e9", "0.5", "9" * 400 + "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size is a number above 0"):
        parse_size(text)


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16"])
def test_rows_of_a_sample_do_not_cancel(kind: str) -> None:
    """Constant inputs into weights that sum to 0 leave rounding errors, which norms make as large as values."""
    weight = sample_matrix(kind, 4, 96, double=False).dequantize()
    assert (weight.sum(1).abs() > 0.1 * weight.abs().sum(1)).all()
