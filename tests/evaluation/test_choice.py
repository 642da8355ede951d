"""Multiple choice: forms of rows, whole and per-token likelihood, and rows of a wrong form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from luthier.data import Renderer
from luthier.data.forms import RowError
from luthier.evaluation.choice import choose, is_choice_row, parse_choice, render_choice

ROW = {"prompt": "which colour?", "choices": ["red", "blue and green", "none of them at all"], "answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {**ROW, "answer": "B"},
        {**ROW, "answer": "blue and green"},
        {"question": "which colour?", "choices": {"text": ROW["choices"], "label": ["1", "2", "3"]}, "answerKey": "2"},
    ],
)
def test_forms(row: dict[str, Any]) -> None:
    assert is_choice_row(row)
    assert parse_choice(row) == ("which colour?", ROW["choices"], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "a row with choices needs a prompt or a question that is text."),
        ({"choices": "red"}, "choices must be a list of texts that are not empty."),
        ({"choices": ["red", 3]}, "choices must be a list of texts that are not empty."),
        ({"choices": ["red"]}, "choices must be 2 to 26 different texts; got 1."),
        ({"choices": ["red", "red"]}, "choices must be 2 to 26 different texts; got 2."),
        ({"choices": {"label": ["A"]}}, "choices must be a list of texts that are not empty."),
        ({"answer": 3}, "the answer must be an index from 0 to 2, or the text of a choice; got 3."),
        ({"answer": -1}, "the answer must be an index from 0 to 2, or the text of a choice; got -1."),
        ({"answer": "D"}, "the answer must be an index from 0, the text of a choice, or its letter; got 'D'."),
        ({"answer": None}, "a row with choices needs an answer: the index of the right one from 0, its text, or its letter."),
        ({"answer": True}, "a row with choices needs an answer: the index of the right one from 0, its text, or its letter."),
    ],
)
def test_rows_of_a_wrong_form(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_choice({**ROW, **change})
    assert str(caught.value) == message
    assert not is_choice_row({"prompt": "x", "completion": "y"})
    assert not is_choice_row({"prompt": "x", "completion": "y", "choices": ["y", "z"]})


def test_options_are_scored_whole_and_per_token() -> None:
    model, renderer = tiny_model("qwen2"), Renderer(tiny_tokenizer(), max_length=300)
    rows = [ROW, {**ROW, "prompt": "another one?", "answer": 0}, {**ROW, "choices": ["x", "y z"], "answer": "B"}]
    rendered = [render_choice(row, f"row {n}", renderer) for n, row in enumerate(rows)]
    examples, choices = [example for example, _ in rendered], [choice for _, choice in rendered]
    assert [example.completion for example in examples] == ["blue and green", "red", "y z"]
    found = choose(model, examples, choices)
    for row, (example, choice) in enumerate(zip(examples, choices, strict=True)):
        sums = []
        for ending in choice.endings:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.prompt_ids + ending])).logits[0].double().log_softmax(-1)
            first = len(example.prompt_ids)
            sums.append(sum(logits[first - 1 + t, token].item() for t, token in enumerate(ending)))
        means = np.asarray(sums) / [len(ending) for ending in choice.endings]
        assert (found.whole[row], found.per_token[row]) == (int(np.argmax(sums)), int(np.argmax(means)))
        margin = means[choice.right] - np.delete(means, choice.right).max()
        assert found.margins[row] == pytest.approx(margin, rel=1e-3, abs=1e-4)


def test_a_system_message_stands_before_the_question() -> None:
    renderer = Renderer(tiny_tokenizer(), max_length=300)
    plain, _ = render_choice(ROW, "a", renderer)
    led, _ = render_choice({**ROW, "system": "Answer."}, "a", renderer)
    assert len(led.prompt_ids) > len(plain.prompt_ids)
