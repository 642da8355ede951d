"""The five forms and the rules of each; the wording of every refusal is pinned."""

from __future__ import annotations

import re
from typing import Any

import pytest

from luthier.data.forms import RowError, form_of, parse_row


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in parse_row(row).turns]


QA = [("user", "q"), ("assistant", "a")]
USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "form", "turns"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages", QA),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}, "messages", QA),
        ({"messages": [{"role": "user", "content": "q", "tool_calls": None}, ASSISTANT]}, "messages", QA),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "messages", QA),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "conversations", QA),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "bard", "value": "a"}]}, "conversations", QA),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "conversations", QA),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            "conversations",
            [("system", "s"), *QA],
        ),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "conversations",
            [("system", "s"), *QA],
        ),
        ({"instruction": "q", "output": "a"}, "instruction", QA),
        ({"instruction": "q", "input": None, "output": "a", "text": "all of it"}, "instruction", QA),
        ({"instruction": "do", "input": "this", "output": "a"}, "instruction", [("user", "do\n\nthis"), ("assistant", "a")]),
        ({"instruction": "q", "output": "a", "system": "s"}, "instruction", [("system", "s"), *QA]),
        ({"prompt": "q", "completion": "a"}, "prompt", QA),
        ({"prompt": "", "completion": "a"}, "prompt", [("user", ""), ("assistant", "a")]),
    ],
)
def test_forms(row: dict, form: str, turns: list) -> None:
    assert form_of(row) == form
    assert turns_of(row) == turns


def test_text() -> None:
    row = parse_row({"text": "a\tb\n"})
    assert (row.form, row.text, row.turns, row.notes) == ("text", "a\tb\n", [], [])


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ORDER = "turns must alternate user, assistant, user, ... after at most one system turn; "


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("text", "a row must be an object; got text."),
        ([1], "a row must be an object; got a list."),
        (None, "a row must be an object; got null."),
        (
            {"question": "q", "answer": "a"},
            "a row must have messages, conversations, instruction and output, prompt and completion, or text; "
            "got 'question', 'answer'.",
        ),
        ({}, "a row must have messages, conversations, instruction and output, prompt and completion, or text; got no keys."),
        ({"prompt": "q"}, "a row with prompt must have completion too; it is missing."),
        ({"output": "q"}, "a row with output must have instruction too; it is missing."),
        ({"prompt": "q", "completion": None}, "completion must be text; got null."),
        ({"prompt": "q", "completion": 42}, "completion must be text; got a number."),
        ({"prompt": ["q"], "completion": "a"}, "prompt must be text; got a list."),
        ({"prompt": "q", "completion": " \n"}, "completion must not be empty."),
        ({"instruction": "", "output": "a"}, "instruction must not be empty."),
        ({"instruction": "q", "input": {}, "output": "a"}, "input must be text; got an object."),
        ({"text": None}, "text must be text; got null."),
        ({"text": ""}, "text must not be empty."),
        ({"messages": "hi"}, "messages must be a list of turns; got text."),
        ({"messages": []}, "messages must hold at least a user and an assistant turn; the list is empty."),
        ({"messages": ["hi"]}, "turn 1 must be an object with role and content; got text."),
        ({"messages": [{"content": "hi"}]}, "turn 1 has no role; got 'content'."),
        (
            said(("user", "q"), ("asistant", "a")),
            "turn 2 has the unknown role 'asistant'; allowed roles: system, user, assistant. Did you mean 'assistant'?",
        ),
        (said(("user", "q"), (7, "a")), "turn 2 has the unknown role 7; allowed roles: system, user, assistant."),
        (
            said(("user", "q"), ("tool", "a")),
            "turn 2 has role 'tool': tool turns are not supported; allowed roles: system, user, assistant. "
            "Leave such rows out.",
        ),
        (
            {"messages": [USER, ASSISTANT | {"tool_calls": [{}]}]},
            "turn 2 has 'tool_calls', which training does not support. Leave such rows out.",
        ),
        (
            {"messages": [USER, ASSISTANT | {"weight": 0}]},
            "turn 2 has 'weight', which training does not support. Leave such rows out.",
        ),
        (said(("user", "q")), "a conversation needs at least one assistant turn to learn from; there is none."),
        (said(("user", "q"), ("user", "q"), ("assistant", "a")), ORDER + "turn 2 is user, assistant was expected."),
        (said(("system", "s"), ("assistant", "a")), ORDER + "turn 2 is assistant, user was expected."),
        (said(("user", "q"), ("assistant", "a"), ("system", "s")), "turn 3 is a system turn; only the first may be."),
        (said(("user", "q"), ("assistant", None)), "turn 2 (assistant): content must be text; got null."),
        (said(("user", "q"), ("assistant", "  ")), "turn 2 (assistant) must have content to learn; it is empty."),
        (
            said(("user", [{"type": "image_url"}]), ("assistant", "a")),
            "turn 1 (user): content must be text; got a part of type 'image_url'. Only text is supported.",
        ),
        (
            {"text": "ab\ud800c"},
            "text must be valid Unicode; a lone surrogate \\ud800 stands at character 2. Repair or remove the row.",
        ),
        (said(("user", "q"), ("assistant", "a\x00")), "text must not hold NUL; there is one at character 1. Remove it."),
        ({"text": "a\ufdd1"}, "text must not hold noncharacters; U+FDD1 stands at character 1. Remove it."),
    ],
)
def test_refused(row: Any, message: str) -> None:
    with pytest.raises(RowError, match="^" + re.escape(message) + "$"):
        parse_row(row)


def test_sharegpt_roles_are_named() -> None:
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "robot", "value": "a"}]}
    allowed = "human, user, gpt, assistant, chatgpt, bard, bing, model, system"
    with pytest.raises(RowError, match=f"^turn 2 has the unknown role 'robot'; allowed roles: {allowed}\\.$"):
        parse_row(row)


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"prompt": "q", "completion": "a", "id": 7, "references": []}, "keys that are not used: 'id', 'references'"),
        ({"messages": [USER | {"name": "Ada"}, ASSISTANT]}, "keys of turns that are not used: 'name'"),
        ({"text": "a\x1b[0m"}, "control characters such as U+001B are kept in the text"),
        (
            said(("user", "q"), ("assistant", "a"), ("user", "more?")),
            "conversations that end with a user turn: that turn has no answer and is left out",
        ),
    ],
)
def test_notes(row: dict, note: str) -> None:
    assert parse_row(row).notes == [note]


def test_a_last_user_turn_is_left_out() -> None:
    assert turns_of(said(("user", "q"), ("assistant", "a"), ("user", "more?"))) == QA
