"""The texts of a compression: kept apart whatever files they come from, read as far as needed, bad files named."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from luthier.compression import reading
from luthier.compression.reading import read_file
from luthier.compression.settings import Budget, CompressSettings
from luthier.compression.texts import Texts, read_texts
from luthier.errors import DataError

RUN = 32
TOKENIZER = tiny_tokenizer()


def sentences(seed: int, count: int) -> list[str]:
    """Different sentences of random words, about 30 tokens each."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdefghijklmnop") for _ in range(5)) for _ in range(400)]
    return [" ".join(draw.choice(words) for _ in range(8)) + "." for _ in range(count)]


def texts_of(data: Path, evaluation: Path | None, **more) -> Texts:
    small = {"windows": 12, "window": 64, "eval_windows": 4}
    wanted = CompressSettings(
        "model", Budget.parse("50%"), Path("nowhere"), str(data), evaluation and str(evaluation), **{**small, **more}
    )
    return read_texts(wanted, None, TOKENIZER)


def runs(packs, length: int = RUN) -> set[tuple[int, ...]]:
    found = set()
    for pack in packs:
        ids = pack.ids.tolist()
        found |= {tuple(ids[at : at + length]) for at in range(len(ids) - length + 1)}
    return found


def assert_apart(texts: Texts) -> None:
    parts = [runs(packs) for packs in (texts.calibration, texts.validation, texts.evaluation)]
    assert all(parts)
    assert not runs(texts.healing) & (parts[1] | parts[2])
    used = {tuple(pack.ids.tolist()) for pack in texts.calibration}
    assert not used & {tuple(pack.ids.tolist()) for pack in texts.healing}
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def written(path: Path, lines: list[str], sep: str = " ") -> Path:
    path.write_text(sep.join(lines), encoding="utf-8")
    return path


def as_rows(path: Path, lines: list[str]) -> Path:
    return written(path, [json.dumps({"text": line}) for line in lines], "\n")


def test_plain_text_with_parts_of_the_evaluation_at_any_offset_is_left_out(tmp_path: Path) -> None:
    own, held = sentences(1, 120), sentences(2, 30)
    mixed = [*own[:37], *held[3:6], *own[37:71], "x", *held[1:4], *own[71:]]
    texts = texts_of(written(tmp_path / "data.txt", mixed), written(tmp_path / "held.txt", held), windows=80)
    assert_apart(texts)
    (note,) = [note for note in texts.notes if "held.txt too and were left out of calibration" in note]
    assert " windows of data.txt hold text" in note
    clean = texts_of(written(tmp_path / "data.txt", own), tmp_path / "held.txt", windows=80)
    assert not [note for note in clean.notes if "left out" in note]


def test_rows_that_stand_in_a_plain_text_of_the_evaluation_are_left_out(tmp_path: Path) -> None:
    own, held = sentences(3, 60), sentences(4, 8)
    data = as_rows(tmp_path / "data.jsonl", [*own[:20], *held[1:4], *own[20:]])
    texts = texts_of(data, written(tmp_path / "held.txt", held))
    assert_apart(texts)
    assert "3 of 63 rows of data.jsonl hold text that is in held.txt too and were left out of calibration." in texts.notes


def test_plain_text_that_holds_measured_rows_is_left_out(tmp_path: Path) -> None:
    own, held = sentences(5, 120), sentences(6, 6)
    data = written(tmp_path / "data.txt", [*own[:50], held[1], *own[50:]])
    texts = texts_of(data, as_rows(tmp_path / "held.jsonl", held), windows=80)
    assert_apart(texts)
    assert any("of data.txt hold text that is in held.jsonl too" in note for note in texts.notes)


def test_rows_that_say_the_same_count_once(tmp_path: Path) -> None:
    own = sentences(7, 40)
    data = as_rows(tmp_path / "data.jsonl", [*own, *own[:15], own[0]])
    texts = texts_of(data, None)
    assert "16 rows of data.jsonl that say the same as another were left out." in texts.notes
    assert_apart(texts)


def test_within_one_plain_text_the_three_are_stretches_with_a_window_between(tmp_path: Path) -> None:
    own = sentences(8, 150)
    data = written(tmp_path / "data.txt", [*own, *own[:20]])  # its end says what its beginning said
    texts = texts_of(data, None, windows=200)
    assert_apart(texts)
    ids = TOKENIZER.encode(data.read_text(), add_special_tokens=False)
    windows = [tuple(ids[at : at + 64]) for at in range(0, len(ids), 64)]
    places = [[windows.index(tuple(pack.ids.tolist())) for pack in packs] for packs in (texts.calibration, texts.validation)]
    assert max(places[0]) + 1 < min(places[1])
    assert max(places[1]) + 1 < min(windows.index(tuple(pack.ids.tolist())) for pack in texts.evaluation)
    assert any("windows of data.txt hold text that is in a part of data.txt" in note for note in texts.notes)


def test_the_same_file_twice_is_divided_or_said_to_be_too_little(tmp_path: Path) -> None:
    data = written(tmp_path / "data.txt", sentences(9, 100))
    assert_apart(texts_of(data, data))
    with pytest.raises(DataError, match=r"--eval-data that is none of it"):
        texts_of(data, data, eval_windows=1000)


def test_of_a_long_plain_text_as_much_is_read_as_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 1000)
    lines = sentences(10, 2000)
    data = written(tmp_path / "data.txt", lines)
    read = read_file(str(data), TOKENIZER, window=64, enough=500, offline=True)
    whole = TOKENIZER.encode(data.read_text(), add_special_tokens=False)
    assert 500 <= len(read.texts[0]) < 3000
    assert read.texts[0][:400] == whole[:400]
    (note,) = read.notes
    assert re.fullmatch(r"Of data\.txt the first 9.. B of 9[0-9.]+ kB were read: as much as is needed\.", note)
    assert not read_file(str(data), TOKENIZER, window=64, enough=10**9, offline=True).notes


def test_no_more_is_turned_to_tokens_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(tmp_path / "data.txt", sentences(16, 8000))
    assert data.stat().st_size > 300_000
    asked: list[int] = []
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text, **more: (asked.append(len(text)), encode(text, **more))[1])
    for enough, most in ((500, reading.LEAST_PIECE_BYTES), (20_000, 8 * 20_000)):
        asked.clear()
        read_file(str(data), TOKENIZER, window=64, enough=enough, offline=True)
        assert most - 100 < sum(asked) <= most


def test_of_long_rows_as_many_are_read_as_are_needed(tmp_path: Path) -> None:
    data = as_rows(tmp_path / "data.jsonl", sentences(11, 1000))
    read = read_file(str(data), TOKENIZER, window=64, enough=500, offline=True)
    assert len(read.texts) < 1000
    assert read.notes == ["Of data.jsonl the first 256 rows were read: as many as are needed."]
    texts = texts_of(written(tmp_path / "own.txt", sentences(14, 100)), data)
    assert read.notes[0] in texts.notes  # of what is measured on it is said too


@pytest.mark.parametrize("piece", [5, 7, 64, 1000])
@pytest.mark.parametrize(
    "text", ["é" * 90, "日本語の文章。" * 20, "one two\nthree 😀 four " * 9, "\ufeffbegins with a mark", "x" * 200]
)
def test_pieces_put_together_are_the_text(tmp_path: Path, piece: int, text: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(reading._pieces(path, piece))
    assert "".join(part for _, part in pieces) == text.removeprefix("\ufeff")
    assert sum(size for size, _ in pieces) == path.stat().st_size


def test_a_bad_byte_is_named_by_file_line_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 64)
    path = tmp_path / "text.txt"
    path.write_bytes(b"good line\n" * 30 + b"caf\xe9 au lait\n")
    with pytest.raises(DataError, match=r"text\.txt:31: the file must be UTF-8; byte 0xe9 at offset 303 is not"):
        read_file(str(path), TOKENIZER, window=64, enough=10**6, offline=True)
    path.write_bytes("wide".encode("utf-16"))
    with pytest.raises(DataError, match="it looks like UTF-16"):
        read_file(str(path), TOKENIZER, window=64, enough=10**6, offline=True)


def test_what_is_no_text_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for name, what in (("pipe.txt", "no file"), ("folder.txt", "a folder"), ("none.txt", "not there")):
        with pytest.raises(DataError, match=f"must be a text file that can be read; .* is {what}"):
            read_file(str(tmp_path / name), TOKENIZER, window=64, enough=10, offline=True)


def answers(number: int) -> list[str]:
    return [
        json.dumps({"prompt": line, "completion": ("yes", "no", "maybe")[place % 3]})
        for place, line in enumerate(sentences(12, number))
    ]


def test_rows_with_answers_are_a_task_and_none_of_it_is_calibrated_on(tmp_path: Path) -> None:
    rows = answers(90)
    data, held = written(tmp_path / "all.jsonl", rows, "\n"), written(tmp_path / "held.jsonl", rows[::8], "\n")
    texts = texts_of(data, held, window=128)
    assert texts.task is not None
    assert texts.task.metric == "label"
    assert [example.completion for example in texts.task.examples] == [json.loads(row)["completion"] for row in rows[::8]]
    assert not any(all(example.supervised[1:]) for example in texts.task.examples)
    assert "12 of 90 rows of all.jsonl hold text that is in held.jsonl too and were left out of calibration." in texts.notes
    asked = {tuple(example.ids[4:-4]) for example in texts.task.examples}
    used = [pack.ids.tolist() for pack in (*texts.calibration, *texts.validation)]
    for ids in used:
        assert not asked & {tuple(ids[at : at + len(one)]) for one in asked for at in range(len(ids))}


def test_free_answers_are_written_and_compared(tmp_path: Path) -> None:
    lines = sentences(13, 80)
    rows = [json.dumps({"prompt": line, "completion": line[::-1]}) for line in lines]
    texts = texts_of(written(tmp_path / "data.jsonl", rows, "\n"), None, window=128)
    assert texts.task is not None
    assert texts.task.metric == "exact"
    assert any(note.startswith(f"Task figures are of {len(texts.task.examples)} rows") for note in texts.notes)


def choices(number: int) -> list[str]:
    return [
        json.dumps({"prompt": line, "choices": ["yes", "not at all", "maybe"], "answer": place % 3})
        for place, line in enumerate(sentences(15, number))
    ]


def test_rows_with_choices_are_read_with_the_right_one_and_are_a_task(tmp_path: Path) -> None:
    rows = choices(90)
    data, held = written(tmp_path / "all.jsonl", rows, "\n"), written(tmp_path / "held.jsonl", rows[::8], "\n")
    texts = texts_of(data, held, window=128)
    assert texts.task is not None
    assert texts.task.choices is not None
    assert texts.task.metric == "choice"
    right = [json.loads(row)["answer"] for row in rows[::8]]
    assert [choice.right for choice in texts.task.choices] == right
    assert [example.completion for example in texts.task.examples] == [("yes", "not at all", "maybe")[one] for one in right]
    assert "12 of 90 rows of all.jsonl hold text that is in held.jsonl too and were left out of calibration." in texts.notes
    seen = TOKENIZER.decode(texts.evaluation[0].ids.tolist())
    assert json.loads(rows[0])["prompt"] in seen
    assert "yes" in seen


def test_a_row_that_has_no_choices_among_rows_that_have_is_named(tmp_path: Path) -> None:
    data = written(tmp_path / "all.jsonl", [*choices(90), '{"text": "no choices"}'], "\n")
    with pytest.raises(DataError, match=r"all\.jsonl:91.*this has no choices, the first row has"):
        texts_of(data, None, window=128)
