"""docs/cli.md: the same text from every terminal, all commands in it, and a check that notices when it is stale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "make_cli.py"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The script in a folder of its own, where it writes its cli.md."""
    target = tmp_path / "make_cli.py"
    target.write_bytes(SCRIPT.read_bytes())
    return target


def run_script(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=script.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_text_does_not_depend_on_the_terminal(copied: Path) -> None:
    texts = []
    for environment in (
        {"COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1", "LANG": "C", "PYTHONHASHSEED": "1"},
        {"COLUMNS": "300", "TERM": "xterm-256color", "FORCE_COLOR": "1", "LANG": "C.UTF-8", "PYTHONHASHSEED": "2"},
    ):
        done = run_script(copied, **environment)
        assert done.returncode == 0, done.stderr
        texts.append((copied.parent / "cli.md").read_bytes())
    assert texts[0] == texts[1]
    text = texts[0].decode("utf-8")
    assert "\x1b" not in text
    assert str(Path.home()) not in text
    for command in ("train", "resume", "eval", "chat", "doctor", "runs", "runs ls", "runs show", "data", "data check"):
        assert f"\n## luthier {command}\n" in text


def test_check_fails_only_when_it_is_stale(copied: Path) -> None:
    target = copied.parent / "cli.md"
    missing = run_script(copied, "--check")
    assert missing.returncode == 1
    assert "docs/cli.md is stale; run `make fix`." in missing.stderr
    assert not target.exists()
    assert run_script(copied).returncode == 0
    assert run_script(copied, "--check").returncode == 0
    target.write_text(target.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert run_script(copied, "--check").returncode == 1
