"""The inputs of the lowest trained layer on disk: exact, checked, refused where they save nothing, removed at the end."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny
from tiny_runs import Recorder, adapter_hash, numbers, send_at, tiny_config, write_rows

from luthier.cli.plan_table import print_plan
from luthier.config import make_config
from luthier.data import Example
from luthier.data.packing import pack_examples
from luthier.errors import CheckpointError, ConfigError, Interrupted, ModelError, PreflightError
from luthier.kernels import native
from luthier.models.load import load
from luthier.models.packed import packed_inputs, shares_prefixes
from luthier.training import frozen_cache, loop
from luthier.training.depth import Frozen
from luthier.training.events import Listener
from luthier.training.frozen_cache import FACTS, VECTORS, FrozenCache, open_frozen_cache, remove_frozen
from luthier.training.plan import plan_run
from luthier.training.run import resume, train
from luthier.units import size_text

pytestmark = [
    pytest.mark.skipif(not native.use_native(), reason="the blocks run on the compiled kernels"),
    pytest.mark.usefixtures("without_plots"),
]

UPPER = r".*\.1\..*_proj"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def some_examples() -> list[Example]:
    """Six rows, four of which begin with the same 20 tokens."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(3, 390, (count,), generator=generator).tolist()  # noqa: E731
    head = draw(20)
    rows = [[*head, *draw(5)], draw(7), [*head, *draw(40)], [*head], draw(33), [*head, *draw(3)]]
    return [Example(ids, [True] * len(ids), [], "", None, f"row {number}") for number, ids in enumerate(rows)]


def opened(folder: Path, model: Any, examples: list[Example], **changes: Any) -> FrozenCache:
    keys = {"layer": 1, "base": "base", "max_tokens": 64, "share": True, "progress": lambda *_: None, "note": lambda _: None}
    return open_frozen_cache(folder / "frozen", model, examples, **(keys | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_pack_of_the_rows_gets_its_inputs(tmp_path: Path, family: str) -> None:
    model, examples = load(str(write_tiny(tmp_path / "model", family))).model, some_examples()
    assert shares_prefixes(model)
    for share in (True, False):
        cache = opened(tmp_path, model, examples, share=share)
        batch = [examples[row] for row in (4, 0, 3, 5, 2)]
        for pack in pack_examples(batch, max_tokens=80, share=True):
            entry = cache.entry(pack, batch)
            expected = packed_inputs(model, pack.ids, pack.starts, 1, pack.parents)
            assert entry.layer == 1
            assert entry.hidden.dtype == torch.float32
            assert (entry.hidden - expected).norm() < 1e-6 * expected.norm()
        cache.close()
        remove_frozen(tmp_path / "frozen")
        assert not (tmp_path / "frozen").exists()


def test_a_whole_file_is_used_again_and_any_other_made_again(tmp_path: Path, tiny_llama: Path) -> None:
    model, examples = load(str(tiny_llama)).model, some_examples()
    calls: list[int] = []
    told: list[str] = []

    def again(rows: list[Example] = examples, **changes: Any) -> bool:
        calls.clear()
        progress = lambda _stage, done, _total: calls.append(done)  # noqa: E731
        opened(tmp_path, model, rows, progress=progress, note=told.append, **changes)
        return bool(calls)

    assert again()
    assert calls[-1] == len(examples)
    assert not again()
    assert told == []
    for changes in ({"base": "other"}, {"layer": 2}, {"max_tokens": 32}, {"share": False}, {"rows": examples[::-1]}):
        assert again(**changes)
        assert "made from something else" in told.pop()
        assert again()
        told.clear()
    vectors, facts = tmp_path / "frozen" / VECTORS, tmp_path / "frozen" / FACTS
    for damage in (_flip, _cut_short, Path.unlink):
        damage(vectors)
        assert again()
        assert "damaged" in told.pop()
    for text in ("", "[]", "{", "[" * 100_000, json.dumps({"sha256": 1})):
        facts.write_text(text)
        assert again()
        assert told.pop().startswith(f"the inputs kept in {tmp_path / 'frozen'} are made again: ")
    facts.unlink()  # as after a kill
    assert again()
    assert told == []


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def test_no_room_on_disk_names_both_figures(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = load(str(tiny_llama)).model, some_examples()
    size = sum(len(example.ids) for example in examples) * 64 * 4
    free = type("Usage", (), {"free": size - 1})
    monkeypatch.setattr(frozen_cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(PreflightError, match=rf"it needs {size / 1000:.1f} kB and {(size - 1) / 1000:.1f} kB are free\. Free"):
        opened(tmp_path, model, examples)
    assert not (tmp_path / "frozen").exists()


def test_a_disk_that_gets_full_meanwhile(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen_cache, "_write_vectors", full)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes of free disk; the disk is full"):
        opened(tmp_path, load(str(tiny_llama)).model, some_examples())
    assert not (tmp_path / "frozen").exists()


def run_config(model: Path, folder: Path, **changes: Any) -> Any:
    return tiny_config(model, folder, targets=UPPER, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Path, list[Any]]:
    """Two runs over the same rows, `plain` and `kept` with the flag, and how each of the latter's packs began."""
    folder, entries = tmp_path_factory.mktemp("runs"), []
    real = loop.supervised_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.training.report.write_plots", lambda *_: None)
        train(run_config(tiny_llama, folder, out=str(folder / "plain")))
        patch.setattr(loop, "supervised_loss", lambda model, pack, entry: entries.append(entry) or real(model, pack, entry))
        train(run_config(tiny_llama, folder, out=str(folder / "kept"), cache_frozen=True))
    return folder, entries


def test_a_run_learns_the_same_and_leaves_no_file(runs: tuple[Path, list[Any]]) -> None:
    folder, entries = runs
    assert len(entries) >= 10
    assert {entry.layer for entry in entries} == {1}
    plain, kept = (numbers(folder / name) for name in ("plain", "kept"))
    assert [record["loss"] for record in kept] == pytest.approx([record["loss"] for record in plain], rel=1e-5)
    assert [record["tokens"] for record in kept] == [record["tokens"] for record in plain]
    assert not (folder / "kept" / "frozen").exists()
    assert not any("frozen" in name for name in json.loads((folder / "kept" / "MANIFEST.json").read_text())["files"])


def test_resuming_is_bit_for_bit_with_the_file_and_without(
    tmp_path: Path, tiny_llama: Path, runs: tuple[Path, list[Any]]
) -> None:
    whole = runs[0] / "kept"
    cut, lost = tmp_path / "cut", tmp_path / "lost"
    with pytest.raises(Interrupted):
        train(run_config(tiny_llama, tmp_path, out=str(cut), cache_frozen=True), listener=send_at(5, signal.SIGINT))
    assert (cut / "frozen" / FACTS).is_file()
    planned = [plan_run(run_config(tiny_llama, tmp_path, out=out, cache_frozen=True), Listener()) for out in (str(cut), None)]
    assert planned[1].disk_bytes - planned[0].disk_bytes == planned[0].frozen_cache_bytes  # the file is there already
    shutil.copytree(cut, lost)
    shutil.rmtree(lost / "frozen")
    for path, made_again in ((cut, False), (lost, True)):
        stages: list[str] = []
        listener = Recorder()
        listener.stage = lambda name, *_, stages=stages: stages.append(name)  # type: ignore[method-assign]
        resume(path, listener=listener)
        assert ("computing the frozen layers" in stages) == made_again
        assert adapter_hash(path) == adapter_hash(whole)
        assert numbers(path) == numbers(whole)
        assert not (path / "frozen").exists()


def test_stopped_at_the_last_step_nothing_of_it_is_part_of_the_run(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after step 10 of 10"):
        train(run_config(tiny_llama, tmp_path, cache_frozen=True), listener=send_at(10, signal.SIGINT))
    assert resume(tmp_path / "run").steps == 10
    assert not (tmp_path / "run" / "frozen").exists()
    assert not any("frozen" in name for name in json.loads((tmp_path / "run" / "MANIFEST.json").read_text())["files"])


def test_stopped_while_it_is_made(tmp_path: Path, tiny_llama: Path) -> None:
    class Stopper(Recorder):
        def stage(self, name: str, done: int, total: int) -> None:
            if name == "computing the frozen layers":
                signal.raise_signal(signal.SIGINT)

    config = run_config(tiny_llama, tmp_path, cache_frozen=True, micro_batch_tokens=64)
    with pytest.raises(Interrupted, match="stopped after step 0 of 10; everything is saved"):
        train(config, listener=Stopper())
    assert not (tmp_path / "run" / "frozen" / FACTS).exists()
    assert resume(tmp_path / "run").steps == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "all-linear"}, r"so there is nothing below\. Restrict --targets to upper layers"),
        ({"modules_to_save": ["embed_tokens"]}, "or the embeddings, train"),
        ({"steps": 3}, r"this run draws 12 examples from 14 rows\. Try --epochs 2 or more"),
        ({"steps": None}, r"this run draws 14 examples from 14 rows\."),
    ],
)
def test_refused_where_it_saves_nothing(tmp_path: Path, tiny_llama: Path, changes: dict, message: str) -> None:
    config = run_config(tiny_llama, tmp_path, cache_frozen=True).model_copy(update=changes)
    for start in (train, lambda config: plan_run(config, Listener())):
        with pytest.raises(PreflightError, match=message) as caught:
            start(config)
        assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_refused_with_full_fine_tuning() -> None:
    with pytest.raises(ConfigError, match=r"method full trains every layer; cache_frozen would keep nothing\. Leave it out"):
        make_config({"data": "x", "method": "full", "cache_frozen": True})


@pytest.mark.parametrize("family", ["gpt2", "olmo2"])
def test_refused_for_a_family_without_blocks(tmp_path: Path, family: str) -> None:
    model = write_tiny(tmp_path / "model", family)
    config = tiny_config(model, tmp_path, cache_frozen=True, targets=r".*\.1\.(mlp|attn|self_attn)\..*")
    with pytest.raises(PreflightError, match=r"needs a model that runs as fused blocks; .* its family has no blocks"):
        train(config)


def test_recomputing_counts_from_the_lowest_trained_layer(
    tmp_path: Path, tiny_llama: Path, runs: tuple[Path, list[Any]]
) -> None:
    again = train(run_config(tiny_llama, tmp_path, recompute_layers=1))
    assert again.loss_last == pytest.approx(numbers(runs[0] / "plain")[-1]["loss"], rel=1e-5)
    with pytest.raises(ModelError, match=r"at most the 1 trained decoder layers can be computed again; got 2\. Try 1\."):
        plan_run(run_config(tiny_llama, tmp_path, recompute_layers=2), Listener())


def test_the_plan_says_what_it_takes_and_saves(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "train.jsonl", 14)
    whole = plan_run(tiny_config(tiny_llama, tmp_path, micro_batch_tokens=512), Listener())
    upper = plan_run(run_config(tiny_llama, tmp_path, micro_batch_tokens=512), Listener())
    kept = plan_run(run_config(tiny_llama, tmp_path, micro_batch_tokens=512, cache_frozen=True), Listener())
    assert (whole.frozen_layers, upper.frozen_layers, kept.frozen_layers) == (0, 1, 1)
    tokens = sum(len(example.ids) for example in _examples(tiny_llama, tmp_path))
    assert kept.frozen_cache_bytes == tokens * 64 * 4
    assert kept.disk_bytes == upper.disk_bytes + kept.frozen_cache_bytes
    assert upper.footprint.activation_bytes < whole.footprint.activation_bytes
    assert 0 < kept.frozen_share < 1
    assert kept.seconds == pytest.approx(kept.frozen_seconds + 10 * kept.seconds_per_step)
    assert (upper.frozen_cache_bytes, upper.frozen_share, upper.frozen_seconds) == (0, 0.0, 0.0)
    for plan, shown in ((whole, False), (upper, False), (kept, True)):
        print_plan(plan)
        table = " ".join(capsys.readouterr().out.split())
        assert (f"frozen cache {size_text(kept.frozen_cache_bytes)} of that; saves" in table) == shown
        assert ("1 of 2 layers kept, 1 frozen" in table) == (plan is not whole)


def _examples(model: Path, folder: Path) -> list[Example]:
    from luthier.training.prepare import read_data

    return read_data(tiny_config(model, folder), Listener()).train.examples


def test_a_disk_too_small_is_refused_by_the_plan(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Frozen, "cache_bytes", property(lambda frozen: 10**15 if frozen.cached else 0))
    plan = plan_run(run_config(tiny_llama, tmp_path, cache_frozen=True), Listener())
    assert not plan.fits
    with pytest.raises(PreflightError, match=r"it needs 1000000 GB, 1000000 GB of it for cache_frozen, and .* are free"):
        plan.require_fit()
