"""Rows of JSON: one object a line, or one list of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.data.lines import UTF8_BOM, decode, read_lines, refuse_wide_encodings
from luthier.data.problems import Problems


class _Refused(ValueError):
    """JSON that Python's parser would take and we do not."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"a key may stand once in an object; {repeated!r} stands {keys.count(repeated)} times.")
    return row


def _no_constant(name: str) -> Any:
    raise _Refused(f"JSON has no {name}. Write null, or leave the key out.")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_SPACE = " \t\r\n"
_BLOCK_BYTES = 1024


def read_jsonl(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line that is not blank. A line that is not JSON is added to `problems`.

    Raises DataError if the file is not UTF-8.
    """
    for number, line in read_lines(path):
        text = line.strip(_SPACE)
        if not text:
            continue
        where = f"{path}:{number}"
        try:
            yield where, _DECODER.decode(text)
        except json.JSONDecodeError as error:
            column = error.pos + 1 + len(line) - len(line.lstrip(_SPACE))
            cut = not line.endswith("\n") and _ends_early(error, text)
            reason = "the last line is cut short" if cut else f"not valid JSON: {error.msg}"
            hint = " A JSON file that is not one object a line must be one list of objects." if text in ("{", "[") else ""
            problems.add(f"{where}:{column}", f"{reason}. {_shown(text, error.pos)}{hint}")
        except (_Refused, RecursionError, ValueError) as error:
            problems.add(where, _plain(error))


def read_json_list(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    """(file:line where it begins, value) of every element of the list in `path`, which is read whole.

    Reading stops at the first element that is not JSON, which is added to `problems`. Raises DataError if it is not UTF-8.
    """
    raw = path.read_bytes().removeprefix(UTF8_BOM)
    text = decode(raw, path, path.stat().st_size - len(raw), 1)
    position = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    if text[position : position + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        element = _element(path, text, position, line, problems)
        if element is None:
            return
        value, end = element
        yield f"{path}:{line}", value
        following = _following(path, text, _skip(text, end), problems)
        if following is None:
            return
        position = following


def _element(path: Path, text: str, position: int, line: int, problems: Problems) -> tuple[Any, int] | None:
    """(the value that begins at `position`, where it ends); None where there is none, which is added to `problems`."""
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        reason = "the file is cut short" if _ends_early(error, text) else f"not valid JSON: {error.msg}"
        problems.add(f"{path}:{error.lineno}:{error.colno}", f"{reason}. {_shown(text, error.pos)}")
    except (_Refused, RecursionError, ValueError) as error:
        problems.add(f"{path}:{line}", _plain(error))
    return None


def _following(path: Path, text: str, position: int, problems: Problems) -> int | None:
    """Where the next element begins, from what stands behind one; None at the list's end, and where anything else stands,
    which is added to `problems`."""
    mark = text[position : position + 1]
    if mark == ",":
        return _skip(text, position + 1)
    if mark != "]":
        reason = "expected ',' or ']' after an element" if mark else "the file is cut short"
        problems.add(_place(path, text, position), f"{reason}. {_shown(text, position)}")
        return None
    rest = _skip(text, position + 1)
    if rest < len(text):
        problems.add(_place(path, text, rest), f"a JSON file holds one list; more follows it. {_shown(text, rest)}")
    return None


def _place(path: Path, text: str, position: int) -> str:
    """file:line:column"""
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    return f"{path}:{line}:{column}"


def first_character(path: Path) -> str:
    """The first ASCII character that is not white space, '' where there is none. Raises DataError for UTF-16 and UTF-32.

    Only as much is read as it takes: a JSON list may stand on one line however long the file.
    """
    with path.open("rb") as file:
        block = file.read(_BLOCK_BYTES)
        refuse_wide_encodings(path, block)
        block = block.removeprefix(UTF8_BOM)
        while block:
            if text := block.lstrip(_SPACE.encode()):
                return chr(text[0])
            block = file.read(_BLOCK_BYTES)
    return ""


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _ends_early(error: json.JSONDecodeError, text: str) -> bool:
    return error.pos >= len(text) or error.msg.startswith("Unterminated string")


def _shown(text: str, position: int) -> str:
    near = text[max(0, position - 20) : position + 20]
    return f"Near: {near!r}." if near else "Nothing follows."


def _plain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the row is nested too deeply to read."
    return str(error)
