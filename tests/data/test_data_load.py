"""Files of rows to data sets: lengths, counts, the manifest, and what overlaps."""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from luthier.data import Renderer, load_examples, overlap
from luthier.errors import DataError

SHORT = {"prompt": "q", "completion": "a"}
LONG = {"prompt": "q", "completion": "x " * 100}
LONG_PROMPT = {"prompt": "x " * 100, "completion": "a"}


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(), max_length=64)


def written(folder: Path, *rows: object, name: str = "d.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refuses(path: str, renderer: Renderer, message: str, **options: str) -> None:
    with pytest.raises(DataError, match="^" + re.escape(message) + "$") as caught:
        load_examples(path, renderer, **options)
    assert caught.value.exit_code == 4


def test_manifest(tmp_path: Path, renderer: Renderer) -> None:
    path = written(tmp_path, SHORT, SHORT | {"id": 1})
    dataset = load_examples(path, renderer)
    length = len(dataset.examples[0].ids)
    assert dataset.manifest == {
        "path": path,
        "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "form": "prompt",
        "rows": 2,
        "kept": 2,
        "dropped": 0,
        "truncated": 0,
        "tokens": 2 * length,
        "supervised_tokens": 4,
        "longest": length,
        "notes": [f"keys that are not used: 'id' (1 row, first {path}:2)"],
        "cache": "off",
    }
    assert [example.where for example in dataset.examples] == [f"{path}:1", f"{path}:2"]


def test_long_rows_are_an_error_with_counts(tmp_path: Path, renderer: Renderer) -> None:
    path = written(tmp_path, SHORT, LONG, LONG_PROMPT)
    longest = max(len(renderer.render(row, "row").ids) for row in (LONG, LONG_PROMPT))
    message = (
        f"{path}: rows must have at most 64 tokens (--max-length); 2 of 3 have more, the longest has {longest} tokens, "
        f"first {path}:2. Raise --max-length, or use --on-long drop or truncate."
    )
    refuses(path, renderer, message)
    refuses(path, renderer, message, on_long="error")


def test_long_rows_dropped(tmp_path: Path, renderer: Renderer) -> None:
    dataset = load_examples(written(tmp_path, SHORT, LONG, LONG_PROMPT, SHORT), renderer, on_long="drop")
    assert [example.where[-1] for example in dataset.examples] == ["1", "4"]
    counts = {key: dataset.manifest[key] for key in ("rows", "kept", "dropped", "truncated")}
    assert counts == {"rows": 4, "kept": 2, "dropped": 2, "truncated": 0}


def test_long_rows_truncated_and_never_left_with_nothing_to_learn(tmp_path: Path, renderer: Renderer) -> None:
    dataset = load_examples(written(tmp_path, SHORT, LONG, LONG_PROMPT), renderer, on_long="truncate")
    whole = renderer.render(LONG, "row")
    assert [len(example.ids) for example in dataset.examples] == [len(renderer.render(SHORT, "row").ids), 64]
    assert dataset.examples[1].ids == whole.ids[:64]
    assert dataset.examples[1].supervised == whole.supervised[:64]
    counts = {key: dataset.manifest[key] for key in ("rows", "kept", "dropped", "truncated")}
    assert counts == {"rows": 3, "kept": 2, "dropped": 1, "truncated": 1}
    assert all(any(example.supervised) for example in dataset.examples)


def test_all_rows_over_length(tmp_path: Path, renderer: Renderer) -> None:
    path = written(tmp_path, LONG, LONG)
    longest = len(renderer.render(LONG, "row").ids)
    start = f"{path}: rows must have at most 64 tokens (--max-length); all 2 have more, the longest has {longest} tokens; "
    refuses(path, renderer, start + "all were dropped. Raise --max-length.", on_long="drop")
    path = written(tmp_path, LONG_PROMPT)
    longest = len(renderer.render(LONG_PROMPT, "row").ids)
    start = f"{path}: rows must have at most 64 tokens (--max-length); all 1 have more, the longest has {longest} tokens; "
    refuses(path, renderer, start + "cut there, none has a supervised token left. Raise --max-length.", on_long="truncate")


def test_nothing_supervised(tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, SHORT, SHORT, LONG)
    render = Renderer.render_many

    def without_mask(self: Renderer, *args: object) -> list:
        examples = render(self, *args)
        for example in examples:
            example.supervised = [False] * len(example.ids)
        return examples

    monkeypatch.setattr(Renderer, "render_many", without_mask)
    message = (
        f"{path}: at least one token must be supervised; of 3 rows, 1 exceed 64 tokens and 3 have nothing to learn. "
        "Look at them with `luthier data check`."
    )
    refuses(path, renderer, message, on_long="truncate")


def test_mixed_forms_and_types(tmp_path: Path, renderer: Renderer) -> None:
    path = written(tmp_path, SHORT, {"text": "a"}, {"prompt": "q", "completion": 1}, {"messages": []}, "word")
    with pytest.raises(DataError) as caught:
        load_examples(path, renderer)
    assert str(caught.value) == "\n".join(
        [
            f"{path} has 4 problems:",
            f"  - {path}:2: all rows of a file must have one form; this is text, the first row is prompt.",
            f"  - {path}:3: completion must be text; got a number.",
            f"  - {path}:4: messages must hold at least a user and an assistant turn; the list is empty.",
            f"  - {path}:5: a row must be an object; got text.",
        ]
    )


def test_problems_of_reading_and_rows_and_lengths_come_together(tmp_path: Path, renderer: Renderer) -> None:
    path = written(tmp_path, SHORT, LONG, {"prompt": "q", "completion": None})
    with Path(path).open("a") as file:
        file.write('{"prompt": "q", "compl')
    with pytest.raises(DataError) as caught:
        load_examples(path, renderer)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} has 3 problems:"
    assert "completion must be text; got null." in lines[1] + lines[2]
    assert "the last line is cut short" in lines[1] + lines[2]
    assert "1 of 3 have more" in lines[3]


def test_lone_surrogate_and_nul_are_named_with_their_line(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a\\ud83d"}\n{"text": "b\\u0000"}\n')
    with pytest.raises(DataError) as caught:
        load_examples(str(path), renderer)
    assert str(caught.value).splitlines()[1:] == [
        f"  - {path}:2: text must be valid Unicode; a lone surrogate \\ud83d stands at character 1. Repair or remove the row.",
        f"  - {path}:3: text must not hold NUL; there is one at character 1. Remove it.",
    ]


def test_a_row_of_ten_megabytes_takes_bounded_memory(tmp_path: Path, renderer: Renderer) -> None:
    path = written(tmp_path, SHORT, {"prompt": ("word" * 30 + " ") * 83_000, "completion": "a"}, SHORT)
    tracemalloc.start()
    dataset = load_examples(path, renderer, on_long="drop")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(dataset.examples), dataset.manifest["dropped"]) == (2, 1)
    assert peak < 80 * 2**20
    assert dataset.manifest["notes"] == [
        f"rows far above the length limit: only their beginning was measured (1 row, first {path}:2)"
    ]


def test_batches_keep_the_order(tmp_path: Path, renderer: Renderer) -> None:
    rows = [{"prompt": f"q {number}", "completion": str(number)} for number in range(600)]
    dataset = load_examples(written(tmp_path, *rows), renderer)
    assert [example.completion for example in dataset.examples] == [str(number) for number in range(600)]
    assert dataset.examples[599] == renderer.render(rows[599], dataset.examples[599].where)


def test_overlap(tmp_path: Path, renderer: Renderer) -> None:
    train = load_examples(written(tmp_path, {"prompt": "Play  some\njazz", "completion": "a"}, SHORT), renderer)
    rows = [
        {"prompt": "play some jazz", "completion": "b"},
        {"prompt": "play", "completion": "a"},
        {"prompt": "Q", "completion": "z"},
    ]
    assert overlap(train, load_examples(written(tmp_path, *rows), renderer)) == 2
    texts = load_examples(written(tmp_path, {"text": "The fox"}, {"text": "a dog"}), renderer)
    assert overlap(texts, load_examples(written(tmp_path, {"text": "the  FOX"}, {"text": "a cat"}), renderer)) == 1


def test_overlap_sees_the_whole_dialogue(tmp_path: Path, renderer: Renderer) -> None:
    def dialogue(first: str) -> dict:
        turns = [("user", first), ("assistant", "ok"), ("user", "yes"), ("assistant", "done")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    train = load_examples(written(tmp_path, dialogue("lights on")), renderer)
    held_out = load_examples(written(tmp_path, dialogue("lights off"), dialogue("Lights on")), renderer)
    assert overlap(train, held_out) == 1
