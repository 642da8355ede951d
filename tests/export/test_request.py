"""What may be asked of an export, and where it may go: said before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from exporting import adapted, row_file

from luthier.errors import ConfigError, DataError, PreflightError
from luthier.export.export import export
from luthier.export.request import NAME_BYTES, file_name, new_folder


def test_a_link_that_leads_nowhere_is_in_the_way_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"an export goes to a new folder; .*link exists\. Choose another --out"):
        new_folder(tmp_path / "link")


@pytest.mark.parametrize(
    ("out", "reason"), [("x" * 300, "File name too long"), ("~nobody-here/x", "Could not determine home directory")]
)
def test_a_name_that_can_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--out needs the name of a new folder; {out}: {reason}. Choose another."):
        new_folder(out)


def test_a_parent_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        PreflightError, match=r"file must be a folder that can be written to; File exists\. Choose another --out\."
    ):
        new_folder(tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PreflightError, match=r"must be a folder that can be written to; it is not\. Choose another --out"):
        new_folder(tmp_path / "out")
    monkeypatch.undo()
    assert new_folder(tmp_path / "more" / "out") == tmp_path / "more" / "out"


def test_names_of_files(tmp_path: Path) -> None:
    assert file_name("a b/c\nd") == "a-b-c-d"
    assert file_name("..") == "model"
    assert file_name("ünï-模型") == "ünï-模型"
    long = file_name("模" * 200)
    assert long == "模" * (NAME_BYTES // 3)
    adapter = adapted(tmp_path).rename(tmp_path / ("n" * 250))
    report = export(str(adapter), to="gguf-adapter", out=tmp_path / "out")
    assert f"{'n' * NAME_BYTES}-adapter.gguf" in report.files


def test_what_the_disk_refuses_is_not_always_its_space(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"could not be written: File name too long\. Choose another --out\."):
        export(str(adapted(tmp_path)), to="peft", out=tmp_path / ("y" * 245))


def test_a_full_disk_as_numpy_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("24576 requested and 23496 written")  # has no errno

    monkeypatch.setattr("luthier.export.gguf_adapter.GGUFWriter.write_tensors_to_file", full)
    with pytest.raises(PreflightError, match=r"24576 requested and 23496 written\. Check the disk's free space\."):
        export(str(adapted(tmp_path)), to="gguf-adapter", out=tmp_path / "out")


def test_rows_that_nothing_is_compared_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option is followed or refused, and a file that is not there is said before a model is loaded."""
    adapter, rows, out = str(adapted(tmp_path)), row_file(tmp_path), tmp_path / "out"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("luthier.export.export.open_subject", never)
    with pytest.raises(ConfigError, match=r"which --to peft does with --verify alone\. Add it, or leave --data out\."):
        export(adapter, to="peft", out=out, data=rows)
    with pytest.raises(ConfigError, match=r"got --rows 0 beside it\. Leave one of them out\."):
        export(adapter, to="merged", out=out, data=rows, rows=0)
    with pytest.raises(DataError, match=r"there is no file .*nowhere\.jsonl"):
        export(adapter, to="merged", out=out, data=str(tmp_path / "nowhere.jsonl"))
