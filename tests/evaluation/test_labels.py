"""Labels: where they come from, how they are chosen, and what is said when rows or files do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from luthier.data import Example, Renderer
from luthier.errors import ConfigError, DataError
from luthier.evaluation.labels import Labels, choose_labels, confusion, labels_of_file, labels_of_rows, read_labels
from luthier.evaluation.scores import answer_tokens

ROWS = [("how do I pay?", "pay"), ("my card is lost", "card lost"), ("the card", "card"), ("pay it", "pay")]


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(tiny_tokenizer(), max_length=300)


def examples_of(renderer: Renderer, rows: list[tuple[str, str]] = ROWS) -> list[Example]:
    return [renderer.render({"prompt": prompt, "completion": label}, f"row {n}") for n, (prompt, label) in enumerate(rows)]


def test_labels_of_rows_and_of_a_file_are_the_same_answers(renderer: Renderer, tmp_path: Path) -> None:
    from_rows = labels_of_rows(examples_of(renderer))
    assert from_rows.names == ["pay", "card lost", "card"]
    (tmp_path / "labels.txt").write_text("\ufeffpay\n\n  card lost \r\ncard\n", encoding="utf-8")
    (tmp_path / "labels.json").write_text(json.dumps(from_rows.names))
    for name in ("labels.txt", "labels.json"):
        from_file = labels_of_file(str(tmp_path / name), renderer)
        assert (from_file.names, from_file.endings) == (from_rows.names, from_rows.endings)
    end = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert all(ending[-1] == end for ending in from_rows.endings)


def test_the_likeliest_whole_answer_is_chosen(renderer: Renderer) -> None:
    model, examples = tiny_model("llama"), examples_of(renderer)
    labels = labels_of_rows(examples)
    scores = np.zeros((len(examples), len(labels.names)))
    for row, example in enumerate(examples):
        for column, ending in enumerate(labels.endings):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.prompt_ids + ending])).logits[0].log_softmax(-1)
            first = len(example.prompt_ids)
            scores[row, column] = sum(logits[first - 1 + t, token].item() for t, token in enumerate(ending))
    told: list[tuple] = []
    chosen, margins = choose_labels(model, examples, labels, progress=lambda *state: told.append(state))
    assert chosen == [labels.names[column] for column in scores.argmax(1)]
    expected = [0, 1, 2, 0]
    others = [np.delete(row, column).max() for row, column in zip(scores, expected, strict=True)]
    assert margins == pytest.approx(scores[range(4), expected] - others, rel=1e-3, abs=1e-3)
    assert told == [("scoring the labels", 4, 4)]


def test_truncated_rows_take_the_whole_label(renderer: Renderer) -> None:
    examples = examples_of(renderer)
    short = examples[0]
    cut = len(short.prompt_ids) + len(answer_tokens(short)) - 1
    examples[0] = Example(short.ids[:cut], short.supervised[:cut], short.prompt_ids, short.prompt, short.completion, "cut")
    labels = labels_of_rows(examples)
    assert labels.endings[0] == answer_tokens(short)
    assert len(choose_labels(tiny_model("llama"), examples, labels)[0]) == 4


def test_rows_that_expect_another_label_are_named(renderer: Renderer) -> None:
    examples = examples_of(renderer)
    labels = labels_of_rows(examples[:2])
    message = "one of the 2 labels of the different answers of the rows; 1 do not:\n  - row 2 expects 'card'\nAdd these labels"
    with pytest.raises(DataError, match=re.escape(message)):
        choose_labels(tiny_model("llama"), examples, labels)


def test_a_label_with_other_tokens_in_its_row_is_refused(renderer: Renderer) -> None:
    examples = examples_of(renderer)
    labels = labels_of_rows(examples)
    other = Labels(labels.names, [[9, *ending] for ending in labels.endings], "elsewhere")
    with pytest.raises(DataError, match=r"the same tokens after every prompt.*:\n  - row 0\n"):
        choose_labels(tiny_model("llama"), examples, other)


def test_free_text_is_not_labels(renderer: Renderer) -> None:
    rows = [(f"question {n}", f"answer {n}") for n in range(21)]
    with pytest.raises(DataError, match=r"2 to 1000 answers that repeat; 21 rows have 21 different ones\. Give the labels"):
        labels_of_rows(examples_of(renderer, rows))
    with pytest.raises(DataError, match="2 rows have 1 different ones"):
        labels_of_rows(examples_of(renderer, [("a", "x"), ("b", "x")]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\n", "--labels needs 2 to 1000 labels, one a line or a JSON list; {path} has 1."),
        ("", "{path} has 0."),
        ("one\ntwo\none\n", "labels must be different texts; in {path} 'one' stands there twice. Remove it."),
        ('["one", "two", " "]', "labels must be different texts; in {path} one is empty. Remove it."),
        ('["one", 2]', "--labels takes a JSON list of texts; {path} holds something else than text."),
        ('["one", ', "--labels takes one label a line or a JSON list of texts; {path} is neither: "),
        (b"\xe9\xff\n", "--labels needs a file in UTF-8; {path} has another encoding at byte 0."),
    ],
)
def test_files_of_labels_that_cannot_be_used(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=re.escape(message.format(path=path))):
        read_labels(str(path))
    with pytest.raises(ConfigError, match=r"--labels needs a file that can be read; .*: No such file or directory\."):
        read_labels(str(tmp_path / "missing"))


def test_confusion_counts_pairs_most_frequent_first() -> None:
    assert list(confusion(["a", "a", "b", "a"], ["b", "b", "b", "a"]).items()) == [
        (("a", "b"), 2), (("a", "a"), 1), (("b", "b"), 1),
    ]  # fmt: skip
