"""JSON files that come from strangers: of bounded length, without NaN, and meaning the same to every reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 32 << 20  # the index of a model with 100,000 tensors has about 10 MB


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8.

    Raises OSError where it cannot be read, ValueError where it is no regular file, is longer than MAX_JSON_BYTES, is not
    JSON, is nested too deeply, holds NaN, or gives one key two different values.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {MAX_JSON_BYTES} bytes")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unambiguous, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    for key, value in pairs:
        if value != content[key]:
            raise ValueError(f"the key {key[:80]!r} appears twice with different values")
    return content


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)
