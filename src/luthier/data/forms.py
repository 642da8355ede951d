"""The five forms in which people keep rows, recognised by content and brought to one: a list of turns, or plain text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.errors import nearest

Form = Literal["messages", "conversations", "instruction", "prompt", "text"]
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
}
# Parts of a turn that change its meaning; a row that has them is refused rather than trained without them.
_REFUSED_PARTS = ("tool_calls", "function_call", "tool_call_id", "weight", "reasoning_content", "thinking")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Noncharacters, which the renderer keeps for its own marks.
_RESERVED = re.compile("[\ufdd0-\ufdef]")
_REFUSED = re.compile("[\x00\ud800-\udfff\ufdd0-\ufdef]")
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")


class RowError(ValueError):
    """A row that cannot be used; the message says why, the caller knows where."""


@dataclass
class Turn:
    """One turn: role is system, user or assistant."""

    role: str
    content: str


@dataclass
class Row:
    """A row of any form. turns: the dialogue, empty for plain text, which is in `text`.

    notes: what was left out or is odd, said once a file.
    """

    form: Form
    turns: list[Turn] = field(default_factory=list)
    text: str | None = None
    notes: list[str] = field(default_factory=list)


def form_of(value: Any) -> Form:
    """The form of a row. The more structured one wins where keys of several are there, as in Alpaca's own files.

    Raises RowError if the value is no object or has the keys of no form.
    """
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object; got {_type_name(value)}.")
    keys = {key for key, item in value.items() if item is not None}
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "conversations"
    if value.keys() >= {"prompt", "completion"}:
        return "prompt"
    if value.keys() >= {"instruction", "output"}:
        return "instruction"
    if "text" in value:
        return "text"
    for present, missing in (
        ("prompt", "completion"),
        ("completion", "prompt"),
        ("instruction", "output"),
        ("output", "instruction"),
    ):
        if present in value:
            raise RowError(f"a row with {present} must have {missing} too; it is missing.")
    raise RowError(
        "a row must have messages, conversations, instruction and output, prompt and completion, or text; "
        f"got {', '.join(map(repr, value))[:200] or 'no keys'}."
    )


def parse_row(value: Any) -> Row:
    """Recognise and check one row. Raises RowError that says which rule was broken."""
    form = form_of(value)
    row = _PARSERS[form](value)
    unused = sorted(key for key, item in value.items() if item is not None and key not in _USED[form])
    if unused:
        row.notes.append(f"keys that are not used: {_names(unused)}")
    for text in (turn.content for turn in row.turns):
        _check_characters(text, row)
    if row.text is not None:
        _check_characters(row.text, row)
    return row


def _parse_messages(value: dict[str, Any]) -> Row:
    return _parse_turns(value, value["messages"], "messages", {role: role for role in ROLES})


def _parse_conversations(value: dict[str, Any]) -> Row:
    return _parse_turns(value, value["conversations"], "conversations", SHAREGPT_ROLES)


def _parse_turns(value: dict[str, Any], items: Any, form: Form, roles: dict[str, str]) -> Row:
    if not isinstance(items, list):
        raise RowError(f"{form} must be a list of turns; got {_type_name(items)}.")
    if not items:
        raise RowError(f"{form} must hold at least a user and an assistant turn; the list is empty.")
    row = Row(form, _system_turns(value) if form == "conversations" else [])
    for number, item in enumerate(items, start=1):
        row.turns.append(_parse_turn(item, number, roles, row))
    _check_order(row)
    return row


def _parse_turn(item: Any, number: int, roles: dict[str, str], row: Row) -> Turn:
    if not isinstance(item, dict):
        raise RowError(f"turn {number} must be an object with role and content; got {_type_name(item)}.")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    if role_key not in item:
        raise RowError(f"turn {number} has no role; got {', '.join(map(repr, item))[:100] or 'no keys'}.")
    said = item[role_key]
    # ShareGPT's names are understood in either form.
    role = roles.get(said) if isinstance(said, str) else None
    if role is None and role_key == "from" and isinstance(said, str):
        role = SHAREGPT_ROLES.get(said)
    if role is None:
        raise RowError(_unknown_role(number, said, tuple(roles)))
    for part in _REFUSED_PARTS:
        if item.get(part) is not None:
            raise RowError(f"turn {number} has {part!r}, which training does not support. Leave such rows out.")
    extra = sorted(key for key, part in item.items() if part is not None and key not in (role_key, content_key))
    if extra:
        row.notes.append(f"keys of turns that are not used: {_names(extra)}")
    content = _content(item.get(content_key), f"turn {number} ({said})")
    if role == "assistant" and not content.strip():
        raise RowError(f"turn {number} ({said}) must have content to learn; it is empty.")
    return Turn(role, content)


def _unknown_role(number: int, role: Any, allowed: tuple[str, ...]) -> str:
    if role in ("tool", "function", "function_call", "observation", "ipython"):
        return (
            f"turn {number} has role {role!r}: tool turns are not supported; "
            f"allowed roles: {', '.join(allowed)}. Leave such rows out."
        )
    hint = nearest(role, allowed) if isinstance(role, str) else ""
    return f"turn {number} has the unknown role {role!r}; allowed roles: {', '.join(allowed)}.{hint}"


def _content(value: Any, what: str) -> str:
    """Text, or OpenAI's list of parts where all are text. Raises RowError for anything else, null included."""
    if isinstance(value, list):
        texts = []
        for part in value:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else _type_name(part)
                raise RowError(f"{what}: content must be text; got a part of type {kind!r}. Only text is supported.")
            texts.append(part["text"])
        return "".join(texts)
    if not isinstance(value, str):
        raise RowError(f"{what}: content must be text; got {_type_name(value)}.")
    return value


def _check_order(row: Row) -> None:
    """System first and at most once, then user and assistant in turn; a last user turn without an answer is left out."""
    turns = row.turns
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and number > 1:
            raise RowError(f"turn {number} is a system turn; only the first may be.")
    spoken = [turn for turn in turns if turn.role != "system"]
    if not any(turn.role == "assistant" for turn in spoken):
        raise RowError("a conversation needs at least one assistant turn to learn from; there is none.")
    offset = 1 + len(turns) - len(spoken)
    for index, turn in enumerate(spoken):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise RowError(
                f"turns must alternate user, assistant, user, ... after at most one system turn; "
                f"turn {index + offset} is {turn.role}, {expected} was expected."
            )
    if turns[-1].role == "user":
        turns.pop()
        row.notes.append("conversations that end with a user turn: that turn has no answer and is left out")


def _parse_instruction(value: dict[str, Any]) -> Row:
    instruction = _field(value, "instruction", may_be_empty=False)
    given = _field(value, "input") if value.get("input") is not None else ""
    question = f"{instruction}\n\n{given}" if given.strip() else instruction
    return Row(
        "instruction",
        [*_system_turns(value), Turn("user", question), Turn("assistant", _field(value, "output", may_be_empty=False))],
    )


def _parse_prompt(value: dict[str, Any]) -> Row:
    answer = _field(value, "completion", may_be_empty=False)
    return Row("prompt", [*_system_turns(value), Turn("user", _field(value, "prompt")), Turn("assistant", answer)])


def _parse_text(value: dict[str, Any]) -> Row:
    return Row("text", text=_field(value, "text", may_be_empty=False))


def _system_turns(value: dict[str, Any]) -> list[Turn]:
    system = value.get("system")
    return [Turn("system", _field(value, "system"))] if system not in (None, "") else []


def _field(value: dict[str, Any], key: str, *, may_be_empty: bool = True) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise RowError(f"{key} must be text; got {_type_name(text)}.")
    if not may_be_empty and not text.strip():
        raise RowError(f"{key} must not be empty.")
    return text


def without_refused(text: str) -> str:
    """`text` without the characters that a row may not hold."""
    return _REFUSED.sub("", text)


def _check_characters(text: str, row: Row) -> None:
    if text.isascii() and text.isprintable():
        return
    if found := _SURROGATE.search(text):
        raise RowError(
            f"text must be valid Unicode; a lone surrogate \\u{ord(found[0]):04x} stands at character {found.start()}. "
            "Repair or remove the row."
        )
    if "\x00" in text:
        raise RowError(f"text must not hold NUL; there is one at character {text.index(chr(0))}. Remove it.")
    if found := _RESERVED.search(text):
        raise RowError(
            f"text must not hold noncharacters; U+{ord(found[0]):04X} stands at character {found.start()}. Remove it."
        )
    if found := _CONTROL.search(text):
        row.notes.append(f"control characters such as U+{ord(found[0]):04X} are kept in the text")


def _names(keys: list[str]) -> str:
    return ", ".join(map(ascii, keys))[:200]


def _type_name(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


_PARSERS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "messages": _parse_messages,
    "conversations": _parse_conversations,
    "instruction": _parse_instruction,
    "prompt": _parse_prompt,
    "text": _parse_text,
}
_USED: dict[str, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "conversations": frozenset({"conversations", "system"}),
    "instruction": frozenset({"instruction", "input", "output", "system"}),
    "prompt": frozenset({"prompt", "completion", "system"}),
    "text": frozenset({"text"}),
}
