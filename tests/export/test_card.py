"""The model card: what it says of an export, whatever names and licences hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from exporting import adapted
from tiny import write_tiny

from luthier.errors import ConfigError
from luthier.export import export as export_module
from luthier.export.card import _yaml, license_of
from luthier.export.export import export
from luthier.export.subject import open_subject
from luthier.models.gguf_file import read_gguf


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text()
    content = yaml.safe_load(text.split("---")[1])
    assert isinstance(content, dict)
    return content


def test_names_of_any_kind_stay_values(tmp_path: Path) -> None:
    """A folder's name may hold what YAML, Markdown and HTML take for their own."""
    name = "lo: ra #1\n- `x|y` <b>"
    model = write_tiny(tmp_path / name, "llama")
    export(str(model), to="merged", out=tmp_path / "out", rows=0)
    assert front_matter(tmp_path / "out")["base_model"] == "lo: ra #1\\n- `x|y` <b>"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# lo: ra #1\\n- `x|y` &lt;b&gt;\n" in card
    assert "\n- `x|y`" not in card.split("## ", 1)[0]


@pytest.mark.parametrize("name", ["no", "Null", "on", "true", "llama", "org/no", "3.1"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(name: str) -> None:
    assert yaml.safe_load(f"base_model: {_yaml(name)}") == {"base_model": name}


def test_a_licence_of_any_kind_stays_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny(tmp_path / "model", "llama")
    export(str(model), to="gguf", out=tmp_path / "gguf", rows=0)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    subject = open_subject(str(file))
    found = read_gguf(file)
    monkeypatch.setitem(found.metadata, "general.license", "mit\ntags: [x]\n" + "y" * 200)
    monkeypatch.setattr("luthier.export.card.read_gguf", lambda _: found)
    stated = license_of(subject)
    assert stated is not None
    assert stated.startswith("mit\\ntags: [x]")
    assert len(stated) == 80
    export(str(file), to="merged", out=tmp_path / "out", rows=0)
    assert front_matter(tmp_path / "out")["license"] == stated
    assert front_matter(tmp_path / "out")["tags"] == ["luthier"]


@pytest.mark.parametrize("to", ["gguf", "gguf-adapter"])
def test_where_the_base_stands_is_not_told(tmp_path: Path, to: str) -> None:
    export(str(adapted(tmp_path)), to=to, out=tmp_path / "out", rows=0)
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert read_gguf(file).metadata["general.base_model.0.name"] == "model"
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path).encode() not in file.read_bytes()


def test_a_folder_that_appeared_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another program put there stays, and the export says that it was not written."""
    adapter, out = adapted(tmp_path), tmp_path / "out"
    written = export_module.write_card

    def then_another(*arguments: Any, **keys: Any) -> None:
        written(*arguments, **keys)
        out.mkdir()
        (out / "theirs").write_text("x")

    monkeypatch.setattr(export_module, "write_card", then_another)
    with pytest.raises(ConfigError, match=r"out was made by another program meanwhile\. Choose another --out"):
        export(str(adapter), to="peft", out=out)
    assert [path.name for path in out.iterdir()] == ["theirs"]
    shutil.rmtree(out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".staging")]
