"""`luthier export` from the command line."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from exporting import adapted, row_file
from safetensors import SafetensorError
from tiny_runs import tiny_config

from luthier.cli.export import DEFAULT_ROWS
from luthier.cli.main import run
from luthier.export import request
from luthier.export import write as write_module
from luthier.training.run import train


def output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_a_run_in_every_form(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(train(tiny_config(tiny_llama, tmp_path, steps=4)).run_dir)
    capsys.readouterr()
    for number, (target, to) in enumerate(
        [(folder, "merged"), (folder, "gguf"), (folder / "adapter", "gguf-adapter"), (folder, "peft"), (folder, "mlx")]
    ):
        out = tmp_path / str(number)
        code, text, err = output(["export", str(target), "--to", to, "--out", str(out), "--rows", "2", "--json"], capsys)
        assert code == 0, err
        report = json.loads(text.splitlines()[-1])
        assert report["to"] == to
        assert set(report["files"]) == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert report["size_bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        assert (report["dtype"] is None) == (to not in ("merged", "gguf"))
        assert len(report["report"]) == (0 if report["dtype"] is None else 5 if to == "merged" else 4)


def test_what_a_person_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = adapted(tmp_path)
    arguments = ["export", str(adapter), "--to", "merged", "--out", str(tmp_path / "out"), "--verify"]
    arguments += ["--data", row_file(tmp_path)]
    code, text, err = output(arguments, capsys)
    assert code == 0, err
    assert "the weights trained on, f32" in text
    assert "the weights trained on, re-quantized to nf4" in text
    assert "as trained: loss" in text
    assert "Recommended: " in text
    assert "verified by Transformers" in text
    assert f": {tmp_path / 'out'}" in text
    code, _, err = output(arguments, capsys)
    assert code == 2
    assert "an export goes to a new folder" in err


def test_a_result_that_computes_something_else_is_not_left_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapted(tmp_path)
    written = write_module.write_merged

    def without_the_adapter(stage, merge, tokenizer, kind, *, progress=None):
        for layer in merge.layers.values():
            layer.terms.clear()
        return written(stage, merge, tokenizer, kind, progress=progress)

    monkeypatch.setattr(write_module, "write_merged", without_the_adapter)
    arguments = ["export", str(adapter), "--to", "merged", "--out", str(tmp_path / "out"), "--verify"]
    arguments += ["--data", row_file(tmp_path)]
    code, _, err = output(arguments, capsys)
    assert code == 5
    assert "an export must compute what was trained (logits within 0.0001 of the largest); the merge in memory" in err
    assert not (tmp_path / "out").exists()


def test_what_a_library_cannot_open_is_not_the_disks_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise OSError("base has no file named model.safetensors")  # as Transformers says it, without a number

    monkeypatch.setattr("luthier.export.verify.AutoModelForCausalLM.from_pretrained", unreadable)
    arguments = ["export", str(adapted(tmp_path)), "--to", "peft", "--out", str(tmp_path / "out"), "--verify"]
    code, _, err = output([*arguments, "--data", row_file(tmp_path)], capsys)
    assert code == 3
    assert "--verify opens what was written; that failed: base has no file named model.safetensors." in err
    assert "disk" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["peft", "mlx", "gguf-adapter", "merged"])
def test_a_full_disk_is_said_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    adapter = adapted(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_for_safetensors(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("luthier.adapters.peft_format.save_file", full_for_safetensors)
    monkeypatch.setattr("luthier.export.mlx.save_file", full_for_safetensors)
    monkeypatch.setattr("luthier.export.gguf_adapter.GGUFWriter", full)
    monkeypatch.setattr("luthier.export.merged_folder.write_safetensors", full)
    before = set(tmp_path.iterdir())
    code, _, err = output(["export", str(adapter), "--to", to, "--out", str(tmp_path / "out"), "--rows", "0"], capsys)
    assert code == 3
    assert f"{tmp_path / 'out'} could not be written: " in err
    assert "No space left on device" in err
    assert set(tmp_path.iterdir()) == before


def test_weights_that_cannot_fit_the_disk_are_refused_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapted(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    code, _, err = output(["export", str(adapter), "--to", "gguf", "--out", str(tmp_path / "out"), "--rows", "0"], capsys)
    assert code == 3
    assert f"{tmp_path} must have room for the weights: " in err
    assert "Free some space, or choose another --out or a smaller --dtype." in err
    assert not (tmp_path / "out").exists()


def test_the_number_of_rows_is_stated_once() -> None:
    assert DEFAULT_ROWS == request.DEFAULT_ROWS
