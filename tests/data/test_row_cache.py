"""Rendered rows kept in the cache: the same data set as without, found by content, checked, bounded."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file, save_file
from tiny import tiny_tokenizer

from luthier.data import Dataset, Renderer, RowCache, load_examples
from luthier.data import load as load_module
from luthier.data.encoder import Encoder
from luthier.data.row_file import DTYPES, FORMAT, RowFile, _sha256_of, read_row_file, write_row_file
from luthier.errors import DataError
from luthier.models.tokenizer import read_tokenizer

DIALOGUE = [
    {"role": "system", "content": "You paint."},
    {"role": "user", "content": "paint the door\nred <|im_end|>"},
    {"role": "assistant", "content": "naïve 日本 🙂"},
    {"role": "user", "content": "and the wall"},
    {"role": "assistant", "content": "done"},
]
ROWS = [
    [{"messages": DIALOGUE}, {"messages": DIALOGUE[:3], "id": 7}],
    [{"prompt": "q", "completion": "a"}, {"prompt": "x " * 100, "completion": "b"}, {"prompt": "q", "completion": "y " * 200}],
    [{"text": "The quick brown fox"}, {"text": "jumps"}],
    [{"instruction": "Book a table", "input": "noon", "output": "done"}],
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@functools.cache
def renderer(**settings: object) -> Renderer:
    return Renderer(tiny_tokenizer(), **({"max_length": 64} | settings))


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def cached(path: str, notes: list[str] | None = None, most_bytes: int = 10**9, settings: dict | None = None) -> Dataset:
    cache = RowCache([].append if notes is None else notes.append, most_bytes)
    return load_examples(path, renderer(**(settings or {})), on_long="truncate", cache=cache)


def plain(path: str) -> Dataset:
    return load_examples(path, renderer(), on_long="truncate")


def assert_same(got: Dataset, expected: Dataset, state: str) -> None:
    assert got.manifest == expected.manifest | {"cache": state}
    assert [vars(example) for example in got.examples] == [vars(example) for example in expected.examples]
    for one, other in zip(got.examples, expected.examples, strict=True):
        assert [type(value) for value in vars(one).values()] == [type(value) for value in vars(other).values()]
        assert {*map(type, one.ids), *map(type, one.prompt_ids)} <= {int}
        assert set(map(type, one.supervised)) == {bool}


@pytest.mark.parametrize("rows", ROWS)
def test_the_data_set_is_the_one_without_a_cache(tmp_path: Path, rows: list[dict]) -> None:
    path = written(tmp_path / "d.jsonl", rows)
    expected = plain(path)
    assert expected.manifest["cache"] == "off"
    assert_same(cached(path), expected, "made")
    assert_same(cached(path), expected, "used")


def test_notes_of_the_data_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", ROWS[0])
    cached(path)
    notes = cached(path).manifest["notes"]
    assert f"keys that are not used: 'id' (1 row, first {path}:2)" in notes
    assert any("kept as plain text (2 rows, first" in note for note in notes)


def test_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {number}", "completion": "a"} for number in range(3)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("d.json", "d.csv", "d.parquet"):
        path = str(tmp_path / name)
        expected = plain(path)
        assert_same(cached(path), expected, "made")
        assert_same(cached(path), expected, "used")


def test_the_tokenizer_is_called_once_a_batch_of_rows_and_never_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "d.jsonl", [{"prompt": f"question {number}", "completion": "a"} for number in range(600)])
    calls: list[int] = []
    real = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, spans: calls.append(len(texts)) or real(self, texts, spans))
    cached(path)
    assert calls == [256, 256, 88]
    cached(path)
    assert sum(calls) == 600


def test_the_same_rows_in_another_file_are_known_with_their_places(tmp_path: Path, folder: Path) -> None:
    cached(written(tmp_path / "d.jsonl", ROWS[0]))
    moved = written(tmp_path / "moved.jsonl", ROWS[0])
    assert_same(cached(moved), plain(moved), "used")
    assert cached(moved).examples[1].where == f"{moved}:2"
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("settings", [{"max_length": 63}, {"loss_on": "all"}])
def test_other_settings_are_other_rows(tmp_path: Path, settings: dict) -> None:
    path = written(tmp_path / "d.jsonl", ROWS[1])
    cached(path)
    assert cached(path, settings=settings).manifest["cache"] == "made"
    assert load_examples(path, renderer(), on_long="drop", cache=RowCache([].append)).manifest["cache"] == "made"
    written(tmp_path / "d.jsonl", [*ROWS[1], ROWS[1][0]])
    assert cached(path).manifest["cache"] == "made"


def test_another_tokenizer_or_template_is_another_identity() -> None:
    own = renderer().identity()
    assert own == Renderer(tiny_tokenizer(), max_length=64).identity()
    changed = [tiny_tokenizer() for _ in range(4)]
    changed[0].chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    changed[1].add_tokens(["paint"])
    changed[2].eos_token = "<|endoftext|>"
    changed[3].add_special_tokens({"additional_special_tokens": ["quick"]})
    assert len({own, *(Renderer(tokenizer, max_length=64).identity() for tokenizer in changed)}) == 5
    padded = tiny_tokenizer()
    padded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert Renderer(padded, max_length=64).identity() == own


def test_every_process_gives_the_same_identity(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|special {number}|>" for number in range(8)]})
    tokenizer.save_pretrained(tmp_path)
    program = (
        "import sys; from pathlib import Path; from luthier.data import Renderer; from luthier.models.tokenizer import "
        "read_tokenizer; print(Renderer(read_tokenizer(Path(sys.argv[1])), max_length=64).identity())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    other = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    assert other == Renderer(read_tokenizer(tmp_path), max_length=64).identity()


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path / "d.jsonl", ROWS[0])
    expected = plain(path)
    cached(path)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    draw = np.random.default_rng(0)
    for place in draw.integers(0, len(whole), 12):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(draw.integers(8))
        kept.write_bytes(flipped)
        notes: list[str] = []
        got = cached(path, notes)
        # White space in the header may be another letter without changing anything that is read.
        if got.manifest["cache"] == "made":
            assert re.fullmatch(r"rows kept in the cache were damaged \(.*\); they are removed and made again\.", notes[0])
        assert_same(got, expected, got.manifest["cache"])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 16, (2**40).to_bytes(8, "little") + b"{}"])
def test_other_files_are_removed_and_made_again(tmp_path: Path, folder: Path, content: bytes) -> None:
    path = written(tmp_path / "d.jsonl", ROWS[0])
    cached(path)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content or whole[: len(whole) // 2])
    notes: list[str] = []
    assert_same(cached(path, notes), plain(path), "made")
    assert "damaged" in notes[0]
    assert_same(cached(path), plain(path), "used")
    kept.unlink()
    kept.mkdir()
    assert_same(cached(path, notes), plain(path), "made")
    assert kept.is_file()


def forged(change: Callable[[dict[str, np.ndarray], dict], None]) -> Callable[[Path], None]:
    """A change to a whole file after which its own sha256 fits again."""

    def forge(path: Path) -> None:
        tensors = load_file(path)
        text = json.loads(tensors["text"].tobytes())
        change(tensors, text)
        tensors["text"] = np.frombuffer(json.dumps(text).encode(), np.uint8)
        save_file(tensors, path, metadata={"format": FORMAT, "sha256": _sha256_of(tensors)})

    return forge


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, _: t.update(lengths=t["lengths"] + 1), "lengths of its rows"),
        (lambda t, _: t.update(lengths=np.array([-1, 10**18])), "lengths of its rows"),
        (lambda t, _: t.update(lengths=np.array([2**62, 2**62, 2**62, 2**62])), "lengths of its rows"),
        (lambda t, _: t.update(ids=-t["ids"]), "a token below 0"),
        (lambda t, _: t.update(supervised=t["supervised"][:-1]), "one mark a token"),
        (lambda t, _: t.update(ids=t["ids"].astype(np.int64)), "another type or shape"),
        (lambda t, _: t.update(ids=t["ids"].reshape(1, -1)), "another type or shape"),
        (lambda _, text: text.update(where=[1, 2]), "one where a row"),
        (lambda _, text: text.update(prompt=[None, None]), "one prompt a row"),
        (lambda _, text: text.pop("key"), "one key a row"),
        (lambda _, text: text["facts"].update(rows="2"), "not those of a manifest"),
        (lambda _, text: text["facts"].update(more=1), "not those of a manifest"),
        (lambda _, text: text["facts"].update(kept=3), "about other rows"),
        (lambda _, text: text.update(notes=[["a", "b", "c"]]), "not notes"),
    ],
)
def test_files_made_to_look_whole_are_refused(tmp_path: Path, folder: Path, change: Callable, reason: str) -> None:
    path = written(tmp_path / "d.jsonl", ROWS[0])
    cached(path)
    (kept,) = folder.iterdir()
    forged(change)(kept)
    with pytest.raises(ValueError, match=reason):
        read_row_file(kept)
    notes: list[str] = []
    assert_same(cached(path, notes), plain(path), "made")
    assert reason in notes[0]


def test_text_that_is_deep_or_no_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    for text in (b"[" * 10**6, b"\xff", b"[]", b"3"):
        tensors = {name: np.empty(0, dtype) for name, dtype in DTYPES.items()}
        tensors["text"] = np.frombuffer(text, np.uint8)
        save_file(tensors, path, metadata={"format": FORMAT, "sha256": _sha256_of(tensors)})
        with pytest.raises(ValueError, match="it"):
            read_row_file(path)


def test_no_rows_are_rows_too(tmp_path: Path) -> None:
    facts = {"form": "text", **dict.fromkeys(("rows", "kept", "dropped", "truncated", "tokens"), 0)}
    rows = RowFile([], facts | {"supervised_tokens": 0, "longest": 0}, [])
    write_row_file(tmp_path / "rows.safetensors", rows)
    assert read_row_file(tmp_path / "rows.safetensors") == rows


def test_the_oldest_make_room_and_it_is_said(tmp_path: Path, folder: Path) -> None:
    paths = [written(tmp_path / f"{number}.jsonl", [{"prompt": "q" * (9 + number), "completion": "a"}]) for number in range(3)]
    kept = []
    for number, path in enumerate(paths[:2]):
        cached(path)
        (new,) = set(folder.iterdir()) - set(kept)
        os.utime(new, (1000 + number, 1000 + number))
        kept.append(new)
    cached(paths[0])  # used last, so the other one is the oldest now
    room = sum(path.stat().st_size for path in kept) + 100
    notes: list[str] = []
    assert cached(paths[2], notes, room).manifest["cache"] == "made"
    assert re.fullmatch(r"the cache keeps .* of rendered rows; .* of the oldest \(1 file\) were removed\.", notes[0])
    assert cached(paths[0], most_bytes=room).manifest["cache"] == "used"
    assert cached(paths[1], most_bytes=room).manifest["cache"] == "made"


def test_rows_too_large_for_the_cache_are_not_kept(tmp_path: Path, folder: Path) -> None:
    path, notes = written(tmp_path / "d.jsonl", ROWS[0]), []
    assert_same(cached(path, notes, most_bytes=100), plain(path), "not kept")
    assert "more than the 100 B that the cache keeps" in notes[0]
    assert list(folder.iterdir()) == []


def test_what_killed_processes_leave_is_removed_after_a_day(tmp_path: Path, folder: Path) -> None:
    (folder / ".staging-old").mkdir(parents=True)
    (folder / ".staging-new").mkdir()
    os.utime(folder / ".staging-old", (1000, 1000))
    cached(written(tmp_path / "d.jsonl", ROWS[0]))
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [".staging-new"]


def test_a_cache_that_cannot_be_written_to_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    path, notes = written(tmp_path / "d.jsonl", ROWS[0]), []
    assert_same(cached(path, notes), plain(path), "not kept")
    assert "rendered rows are not kept: the cache must be a folder that can be written to" in notes[0]


def test_a_full_disk_stops_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("luthier.data.row_cache.write_row_file", full)
    path, notes = written(tmp_path / "d.jsonl", ROWS[0]), []
    assert_same(cached(path, notes), plain(path), "not kept")
    assert "could not be kept in" in notes[0]
    assert list(folder.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "d.jsonl", ROWS[0])
    real = load_module.render_source

    def render(*arguments: object) -> object:
        yield from real(*arguments)
        written(tmp_path / "d.jsonl", ROWS[0] * 2)

    with monkeypatch.context() as patch:
        patch.setattr(load_module, "render_source", render)
        assert cached(path).manifest["cache"] == "not kept"
    assert cached(path).manifest["cache"] == "made"


def test_rows_with_problems_are_never_kept(tmp_path: Path, folder: Path) -> None:
    path = written(tmp_path / "d.jsonl", [*ROWS[0], {"messages": []}])
    for _ in range(2):
        with pytest.raises(DataError, match=re.escape(f"{path}:3")):
            cached(path)
    assert list(folder.iterdir()) == []
