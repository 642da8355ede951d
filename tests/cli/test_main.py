"""The edge of the program: help, exit codes, and one message for a person's mistake."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.cli.main import run
from luthier.cli.quiet import quiet_libraries
from luthier.disk import staged_folder


def invoke(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `luthier ...`, in this process."""
    code = 0
    try:
        run(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_needs_neither_torch_nor_pydantic() -> None:
    program = (
        "import sys\n"
        "from luthier.cli.main import run\n"
        "try:\n    run(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_import_is_lazy_and_names_resolve() -> None:
    program = "import sys, luthier\nassert 'torch' not in sys.modules\nassert callable(luthier.load) and 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert all(getattr(luthier, name) is not None for name in luthier.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = luthier.trian


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(capsys, "--version") == (0, f"luthier {luthier.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train"], 2, "error: data is needed."),
        (["train", "x.jsonl", "--method", "prefix"], 2, "error: method must be 'lora', 'qlora' or 'full'; got 'prefix'."),
        (["train", "x.jsonl", "--rank", "0"], 2, "error: rank must be greater than or equal to 1; got 0."),
        (["train", "x.jsonl", "--set", "rnk=3"], 2, "error: unknown key 'rnk'. Did you mean 'rank'?"),
        (["train", "x.jsonl", "--epochs", "1", "--steps", "2"], 2, "error: give epochs or steps, not both."),
        (["train", "x.jsonl", "--config", "absent.yaml"], 2, "error: the config file must be readable UTF-8; absent.yaml"),
        (
            ["eval", "smollm2-135m", "--data", "x.jsonl", "--metrics", "exct"],
            2,
            "; got 'exct'. Did you mean 'exact'?",
        ),
        (["train", "x.jsonl", "--rnk", "3"], 2, "No such option: --rnk"),
        (["trian"], 2, "No such command 'trian'"),
    ],
)
def test_mistakes_on_the_line(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    got, out, err = invoke(capsys, *arguments)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback_anywhere_on_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = invoke(capsys, "train", "x.jsonl", "--debug", "--rank", "0")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize(
    "arguments",
    [["--debug", "train", "x.jsonl", "--rank", "0"], ["runs", "--debug", "show", "x"], ["runs", "show", "x", "--debug"]],
)
def test_debug_on_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert "Traceback" in invoke(capsys, *arguments)[2]


def test_debug_as_the_value_of_an_option_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = invoke(capsys, "train", "x.jsonl", "--rank", "0", "--set", "--debug")
    assert code == 2
    assert "--set takes key=value; got '--debug'." in err
    assert "Traceback" not in err
    code, _, err = invoke(capsys, "train", "--", "--debug")
    assert "--debug" in err
    assert "Traceback" not in err


def test_debug_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(capsys, "--help")[1].count("--debug") == 1
    assert "--debug" not in invoke(capsys, "train", "--help")[1]


def test_runs_ls_of_an_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = invoke(capsys, "runs", "ls", "--root", str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out) == {"runs": []}


def in_a_process(*arguments: str, **keys: Any) -> subprocess.CompletedProcess[str]:
    program = "import sys\nfrom luthier.cli.main import run\nrun(sys.argv[1:])"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **keys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_takes_nothing_more_is_no_fault_of_ours() -> None:
    with open("/dev/full", "w") as full:
        done = in_a_process("runs", "ls", "--root", "/nonexistent", "--json", stdout=full)
    assert done.returncode == 3, done.stderr
    assert (
        done.stderr
        == "error: what is written needs room on the disk; the output or a file: No space left on device. Free some.\n"
    )


def test_a_file_that_takes_nothing_more_does_not_take_what_was_printed_along() -> None:
    """The error of a write names no file, so that it might be the output's."""
    command = "import errno, sys\nfrom luthier.cli import main\ndef say():\n sys.stdout.write('figures')\n"
    command += " raise OSError(errno.ENOSPC, 'No space left on device')\nmain.app.command('say')(say)\nmain.run(['say'])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "figures")
    assert done.stderr.startswith("error: what is written needs room on the disk; the output or a file: ")


def test_characters_that_an_output_cannot_hold_are_written_out() -> None:
    """As with a pipe on Windows, whose encoding is an old one."""
    command = "import sys\nfrom luthier.cli import main\n"
    command += "main.app.command('say')(lambda: sys.stdout.write('caf\\u00e9 \\U0001f3bb'))\nmain.run(['say'])"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"caf\\xe9 \\U0001f3bb"


def test_ctrl_c_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("luthier.training.run_index.list_runs", stop)
    assert invoke(capsys, "runs", "ls", "--root", str(tmp_path)) == (130, "", "error: interrupted\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no SIGTERM that can be caught")
def test_sigterm_leaves_nothing_half_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(_: object) -> None:
        with staged_folder(tmp_path / "out", lambda stage, target: None) as stage:
            (stage / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on")

    monkeypatch.setattr("luthier.training.run_index.list_runs", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert invoke(capsys, "runs", "ls", "--root", str(tmp_path)) == (143, "", "")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_libraries_do_not_chatter() -> None:
    quiet_libraries()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    with warnings.catch_warnings(record=True) as heard:
        warnings.warn_explicit("old name", FutureWarning, "x.py", 1, module="transformers.modeling_utils")
    assert heard == []
