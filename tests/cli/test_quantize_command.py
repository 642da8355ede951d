"""`luthier quantize`, and `luthier train` on quantised bases, from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf
from safetensors import safe_open

from luthier.cli.main import run
from luthier.matrices import GGUFMatrix, NF4Matrix
from luthier.models.load import load


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {i}", "completion": f"number {i}"}) + "\n" for i in range(8)))
    return path


def output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    return out


def result(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(output([*arguments, "--json"], capsys).splitlines()[-1])


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    return int(caught.value.code or 0), capsys.readouterr().err


def test_quantize_writes_a_folder_that_loads(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nf4"
    arguments = ["quantize", str(tiny_llama), "--to", "nf4", "--out", str(out), "--skip-modules", "o_proj, down_proj"]
    report = result([*arguments, "--no-double-quant"], capsys)
    assert report["quantized"] == 10
    assert report["size_bytes"] < report["size_bytes_in_16_bits"] * 1.5
    model = load(str(out)).model
    found = [matrix for matrix in model.modules() if isinstance(matrix, NF4Matrix)]
    assert len(found) == 10
    assert not any(matrix.double_quant for matrix in found)
    code, message = failure(arguments, capsys)
    assert code == 2
    assert "a quantized model goes to a new folder" in message
    text = output(["quantize", str(tiny_llama), "--to", "nf4", "--out", str(tmp_path / "two")], capsys)
    assert "14 matrices in nf4, as they were: lm_head" in text
    assert re.search(r"^\d+ kB, \d+ kB in 16 bits: .*two$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "nf5"], "--to is one of nf4; got 'nf5'. Did you mean 'nf4'?"),
        (["--to", "nf4", "--skip-modules", "q_porj"], "'q_porj' matches nothing. Did you mean 'q_proj'?"),
    ],
)
def test_mistakes(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, text = failure(["quantize", str(tiny_llama), "--out", str(tmp_path / "out"), *arguments], capsys)
    assert code == 2
    assert message in text
    assert not (tmp_path / "out").exists()


def test_qlora_trains_saves_and_answers(
    tmp_path: Path, tiny_llama: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["--method", "qlora", "--skip-modules", "o_proj", "--set", "cache_quantized=true", "--rank", "4", "--lr", "0.01"]
    report = result(
        ["train", str(data), "--model", str(tiny_llama), *flags, "--steps", "12", "--out", str(out), "--json"], capsys
    )
    assert report["loss_last"] < report["loss_first"]
    assert report["total_parameters"] > 100_000
    assert len(list((tmp_path / "cache" / "nf4").iterdir())) == 1
    with safe_open(out / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F32"}  # noqa: SIM118 - not a dict
    scores = result(["eval", str(out), "--data", str(data), "--metrics", "loss", "--vs-base"], capsys)
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    assert output(["chat", str(out), "--prompt", "Say 3", "--max-new-tokens", "4"], capsys)


def test_a_gguf_model_trains_on_its_own_blocks(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", Kind.Q4_1)
    assert any(isinstance(module, GGUFMatrix) for module in load(str(path)).model.modules())
    for number, flags in enumerate((["--method", "lora"], ["--method", "qlora", "--base", "asis"], ["--method", "full"])):
        report = result(
            ["train", str(data), "--model", str(path), *flags, "--steps", "2", "--out", str(tmp_path / str(number))],
            capsys,
        )
        assert report["steps"] == 2


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--method", "qlora", "--base", "bf16"], 2, "method qlora trains on a base in 4 bits, nf4 or asis"),
        (["--method", "qlora", "--base", "asis"], 2, "trains on a model that is quantized already"),
        (["--set", "double_quant=false"], 2, "only a base in nf4 is quantized while loading; double_quant would do nothing"),
        (["--method", "full", "--base", "nf4"], 2, "method full trains every weight in float32, without an adapter; base"),
        (["--optimizer", "paged_adamw"], 2, "paged_adamw moves its moments between a GPU's memory and the host's"),
        (["--base", "nf5"], 2, "base must be 'f32', 'bf16', 'f16', 'nf4' or 'asis'; got 'nf5'"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path,
    tiny_llama: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    code: int,
    message: str,
) -> None:
    out = tmp_path / "run"
    got, text = failure(["train", str(data), "--model", str(tiny_llama), *flags, "--steps", "1", "--out", str(out)], capsys)
    assert got == code
    assert message in text
    assert not out.exists()


def test_full_training_of_an_nf4_checkpoint_is_refused(
    tmp_path: Path, tiny_llama: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output(["quantize", str(tiny_llama), "--to", "nf4", "--out", str(tmp_path / "nf4")], capsys)
    flags = ["--model", str(tmp_path / "nf4"), "--method", "full", "--steps", "1", "--out", str(tmp_path / "run")]
    code, text = failure(["train", str(data), *flags], capsys)
    assert code == 2
    assert "Load the original model, or train an adapter: --method qlora" in text
    report = result(
        ["train", str(data), "--model", str(tmp_path / "nf4"), "--steps", "1", "--out", str(tmp_path / "run"), "--json"], capsys
    )
    assert report["steps"] == 1


def test_folders_that_hold_no_model_are_told_apart(
    tmp_path: Path, tiny_llama: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    result(["train", str(data), "--model", str(tiny_llama), "--steps", "1", "--rank", "2", "--out", str(run_folder)], capsys)
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "tiny.gguf").touch()
    (tmp_path / "empty").mkdir()
    for folder, advice in (
        (run_folder, f"It is a run: give what `luthier export {run_folder} --to merged --out NEW` writes."),
        (run_folder / "adapter", "It is an adapter: give the model that it was trained on"),
        (tmp_path / "several", f"In it there are {tmp_path / 'several' / 'tiny.gguf'}."),
        (tmp_path / "empty", "Check the path, or download the model again."),
    ):
        quantize_it = ["quantize", str(folder), "--to", "nf4", "--out", str(tmp_path / "out")]
        for arguments in (quantize_it, ["plan", str(data), "--model", str(folder)]):
            code, text = failure(arguments, capsys)
            assert code == 3
            assert f"a model folder holds config.json; {folder} does not. {advice}" in text
