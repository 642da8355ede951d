"""`luthier train`, `resume` and `runs`: JSON, exit codes, messages."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from test_main import invoke

from luthier.training import loop
from luthier.training.lock import RunLock

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.training.report.write_plots", lambda *_: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"say {number}", "completion": f"{number}!"} for number in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def line(tiny_llama: Path, data: Path, tmp_path: Path) -> list[str]:
    """`luthier train` with a tiny model, four steps."""
    return [
        "train", str(data), "--model", str(tiny_llama), "--steps", "4", "--rank", "4", "--max-length", "64",
        "--out", str(tmp_path / "run"), "--offline",
    ]  # fmt: skip


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C after that step, whatever listens."""
    real = loop._record

    def record(job: loop.Job, outcome: loop.StepOutcome) -> None:
        real(job, outcome)
        if job.state.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "_record", record)


def test_train_prints_one_json_object(capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path) -> None:
    code, out, err = invoke(capsys, *line, "--json")
    assert code == 0, err
    content = json.loads(out.splitlines()[-1])
    assert len(out.splitlines()) == 1
    wanted = {"run_dir", "adapter_dir", "steps", "tokens", "tokens_per_second", "seconds", "loss_first", "loss_last"}
    assert wanted | {"peak_rss_bytes", "trainable_parameters"} <= content.keys()
    assert content["run_dir"] == str(tmp_path / "run")
    assert content["steps"] == 4
    assert "eval" not in content


def test_train_with_eval_data_has_before_and_after(capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "say twelve", "completion": "twelve!"}\n')
    code, out, err = invoke(capsys, *line, "--eval-data", str(held_out), "--set", "max_new_tokens=4", "--json")
    assert code == 0, err
    assert json.loads(out)["eval"].keys() == {"before", "after"}


def test_runs_list_and_show(capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path) -> None:
    invoke(capsys, *line, "--json")
    code, out, _ = invoke(capsys, "runs", "ls", "--root", str(tmp_path), "--json")
    assert code == 0
    (run,) = json.loads(out)["runs"]
    assert (run["run_dir"], run["status"], run["steps"]) == (str(tmp_path / "run"), "finished", 4)
    code, out, _ = invoke(capsys, "runs", "show", str(tmp_path / "run"), "--json")
    assert code == 0
    assert json.loads(out)["config"]["rank"] == 4
    code, _, err = invoke(capsys, "runs", "show", str(tmp_path / "absent"))
    assert code == 3
    assert "a run directory holds a readable config.resolved.yaml" in err


def test_ctrl_c_and_resume(
    capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases 13 and 16 on the command line."""
    stop_after(monkeypatch, 2)
    code, out, err = invoke(capsys, *line, "--json")
    assert (code, out) == (130, "")
    run = tmp_path / "run"
    assert f"error: stopped after step 2 of 4; everything is saved. Go on with `luthier resume {run}`.\n" in err
    assert "Traceback" not in err
    monkeypatch.undo()
    code, out, err = invoke(capsys, "resume", str(run), "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 4
    code, out, err = invoke(capsys, "resume", str(run), "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 4
    assert f"{run} is finished; there is nothing to do." in err


def test_exit_codes_and_messages(capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path) -> None:
    def expect(code: int, message: str, *arguments: str) -> None:
        got, out, err = invoke(capsys, *arguments)
        assert (got, out) == (code, ""), err
        assert f"error: {message}" in err
        assert "Traceback" not in err

    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    (tmp_path / "file").write_text("")
    model = line[line.index("--model") + 1]
    expect(2, "--out must be a folder", *line, "--out", str(tmp_path / "file"))
    expect(2, "--out must be a new or empty folder", *line, "--out", str(tmp_path))
    expect(3, "the run directory must be writable", *line, "--out", str(tmp_path / "file" / "run"))
    expect(4, "the data must be a file", "train", str(tmp_path / "absent.jsonl"), "--model", model)
    expect(
        4, f"{tmp_path / 'bad.jsonl'}:2", "train", str(tmp_path / "bad.jsonl"), "--model", model, "--out", str(tmp_path / "new")
    )
    expect(2, "no", *line, "--model", str(tmp_path / "no" / "model"))
    expect(3, "a run directory holds", "resume", str(tmp_path))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "new").exists()


def test_targets_that_match_nothing(capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path) -> None:
    """Case 53: the candidates are listed and no directory is left."""
    code, _, err = invoke(capsys, *line, "--targets", "q_proj,qq_proj")
    assert code == 2
    assert "qq_proj" in err
    assert "k_proj" in err
    assert not (tmp_path / "run").exists()


def test_nan_loss_ends_with_5(capsys: pytest.CaptureFixture[str], line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 24 on the command line."""
    real = loop.supervised_loss
    monkeypatch.setattr(loop, "supervised_loss", lambda *arguments: real(*arguments) * float("nan"))
    code, _, err = invoke(capsys, *line)
    assert code == 5
    assert "error: the loss must be a finite number; it was nan at step 1, in" in err


def test_overwrite(capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path) -> None:
    """Case 17 on the command line."""
    assert invoke(capsys, *line, "--json")[0] == 0
    code, _, err = invoke(capsys, *line, "--json")
    assert code == 2
    assert "replace it with --overwrite, or choose another name." in err
    code, out, _ = invoke(capsys, *line, "--overwrite", "--steps", "2", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 2


def test_run_in_use(capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path) -> None:
    """Case 15 on the command line."""
    assert invoke(capsys, *line, "--json")[0] == 0
    lock = RunLock(tmp_path / "run")
    code, _, err = invoke(capsys, *line, "--overwrite")
    assert code == 3
    assert "one process at a time may work on a run" in err
    lock.release()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "full", "--rank", "8"],
            "method full trains every weight in float32, without an adapter; rank would do nothing.",
        ),
        (["--method", "full", "--base", "bf16"], "base would do nothing."),
        (["--eval-every", "3"], "without eval_data nothing is evaluated; eval_every would do nothing."),
    ],
)
def test_settings_without_effect_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = invoke(capsys, "train", "x.jsonl", *arguments)
    assert code == 2
    assert message in err


def test_default_run_directory(
    capsys: pytest.CaptureFixture[str], line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = line.index("--out")
    code, out, err = invoke(capsys, *line[:place], *line[place + 2 :], "--steps", "1", "--json")
    assert code == 0, err
    run = Path(json.loads(out)["run_dir"])
    assert run.parent == Path("runs")
    assert run.name.endswith("-train")
    monkeypatch.chdir("/")
    assert invoke(capsys, "resume", str(tmp_path / run), "--json")[0] == 0


def test_doctor_bench_adds_the_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"op": "forward", "shape": "1x2x3", "storage": "nf4", "bound": "fma", "seconds": 1e-3, "rate": 1e9, "share": 0.5}
    row |= {"target": 0.85, "ratios": {"torch": 1.5}, "peer_targets": {}}
    bounds = {"fma": 2e11, "read": 2e10, "copy": 2e10}
    result = {"threads": 2, "instruction_set": "avx2", "bounds": bounds, "rows": [row]}
    monkeypatch.setattr("luthier.kernels.bench.quick_bench", lambda _progress: result)
    _, out, _ = invoke(capsys, "doctor", "--bench")
    assert "2 threads, avx2: multiply-adds 200 GFLOP/s" in out
    assert "1x2x3" in out
    _, out, _ = invoke(capsys, "doctor", "--bench", "--json")
    assert json.loads(out)["bench"] == result


def test_doctor_prints_facts(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = invoke(capsys, "doctor", "--json")
    facts = json.loads(out)
    assert {"packages", "processor", "memory_bytes", "disk_free_bytes", "kernels", "cache", "problems"} <= facts.keys()
