"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from luthier.disk import remove_tree, sha256_of, staged_file, staged_folder, write_atomically


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")

    def interrupt() -> None:
        with staged_file(tmp_path / "a") as staged:
            staged.write_text("half")
            assert (tmp_path / "a").read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert (tmp_path / "a").read_text() == "old"
    write_atomically(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "new")]


def test_a_link_in_the_place_of_what_is_staged_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / ".staging-a").symlink_to(tmp_path / "mine")
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "mine").read_text() == "years of work"
    assert (tmp_path / "a").read_text() == "new"


def test_a_folder_comes_whole(tmp_path: Path) -> None:
    target = tmp_path / "above" / "folder"
    with staged_folder(target, os.rename) as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "a").write_text("x")
        assert not target.exists()
    assert (target / "inner" / "a").read_text() == "x"
    assert os.listdir(target.parent) == ["folder"]
    remove_tree(target)
    remove_tree(target)
    assert not target.exists()


@pytest.mark.parametrize("function", ["fsync", "rename"])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, function, fail)
    with (
        pytest.raises(OSError, match="Input/output error"),
        staged_folder(tmp_path / "folder", lambda staged, target: os.rename(staged, target)) as staged,
    ):
        (staged / "a").write_text("x")
    assert os.listdir(tmp_path) == []


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
