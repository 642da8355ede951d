"""Rendered rows as one safetensors file, with a sha256 of its own, so that what is read is what was written.

Tensors, N rows with L tokens in all and P in their prompts: `ids` (L,) int32, `lengths` (N,) int64, `supervised`
(ceil(L / 8),) uint8, one bit a token, `prompt_ids` (P,) int32, `prompt_lengths` (N,) int64, and `text`, uint8: the UTF-8
of a JSON object with the strings of every row, the facts of the manifest and the notes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from luthier.data.example import Example
from luthier.data.problems import Noted

FORMAT = "luthier rows 1"
DTYPES = {
    "ids": np.int32, "lengths": np.int64, "supervised": np.uint8,
    "prompt_ids": np.int32, "prompt_lengths": np.int64, "text": np.uint8,
}  # fmt: skip
FACTS = {
    "form": str, "rows": int, "kept": int, "dropped": int, "truncated": int, "tokens": int, "supervised_tokens": int,
    "longest": int,
}  # fmt: skip


@dataclass(frozen=True)
class RowFile:
    """What a file of rows became, wherever the file stands: places of rows lack its name.

    facts: the counts of the manifest, by the keys of FACTS; notes: as Problems has them.
    """

    examples: list[Example]
    facts: dict[str, Any]
    notes: list[Noted]


def write_row_file(path: Path, rows: RowFile) -> None:
    """Write `rows` as `path`. Raises OSError or SafetensorError where the disk refuses."""
    examples = rows.examples
    text = {
        "facts": rows.facts,
        "notes": rows.notes,
        "prompt": [example.prompt for example in examples],
        "completion": [example.completion for example in examples],
        "where": [example.where for example in examples],
        "key": [example.key for example in examples],
    }
    supervised = _joined((example.supervised for example in examples), np.bool_)
    tensors = {
        "ids": _joined((example.ids for example in examples), np.int32),
        "lengths": np.array([len(example.ids) for example in examples], np.int64),
        "supervised": np.packbits(supervised),
        "prompt_ids": _joined((example.prompt_ids for example in examples), np.int32),
        "prompt_lengths": np.array([len(example.prompt_ids) for example in examples], np.int64),
        "text": np.frombuffer(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"), np.uint8),
    }
    save_file(tensors, path, metadata={"format": FORMAT, "sha256": _sha256_of(tensors)})


def read_row_file(path: Path) -> RowFile:
    """What `write_row_file` wrote. Nothing in the file is run, and no more memory is taken than it has bytes, a few times.

    Raises ValueError, saying what is wrong, for any other file: damaged, cut short, or made to look like one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if metadata.get("format") != FORMAT or names != DTYPES.keys():
                raise ValueError(f"it is not {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in DTYPES}
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(f"it is no whole safetensors file ({' '.join(str(error).split())[:200]})") from error
    if any(tensors[name].dtype != dtype or tensors[name].ndim != 1 for name, dtype in DTYPES.items()):
        raise ValueError("a tensor has another type or shape than it must have")
    if metadata.get("sha256") != _sha256_of(tensors):
        raise ValueError("its content does not match its own sha256")
    try:
        text = json.loads(tensors["text"].tobytes().decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise ValueError("its text is not JSON") from error
    rows = RowFile(_examples(tensors, text), _facts(text), _notes(text))
    if rows.facts["kept"] != len(rows.examples):
        raise ValueError("its facts are about other rows")
    return rows


def _joined(parts: Iterator[Sequence[int]], dtype: type) -> np.ndarray:
    arrays: list[np.ndarray] = [np.asarray(part, dtype) for part in parts]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype)


def _sha256_of(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in DTYPES:
        digest.update(f"{name} {tensors[name].shape} ".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _examples(tensors: dict[str, np.ndarray], text: Any) -> list[Example]:
    """Raises ValueError where the parts do not fit each other."""
    rows, total = len(tensors["lengths"]), len(tensors["ids"])
    ids = _cut(tensors["ids"], tensors["lengths"])
    prompts = _cut(tensors["prompt_ids"], tensors["prompt_lengths"])
    if len(tensors["supervised"]) != -(-total // 8):
        raise ValueError("it has not one mark a token")
    marks = _cut(np.unpackbits(tensors["supervised"], count=total).astype(np.bool_), tensors["lengths"])
    strings = [_strings(text, name, rows, optional=name == "completion") for name in ("prompt", "completion", "where", "key")]
    return [Example(*parts) for parts in zip(ids, marks, prompts, *strings, strict=True)]


def _cut(values: np.ndarray, lengths: np.ndarray) -> list[list[Any]]:
    """`values` in pieces of those lengths. Raises ValueError where they do not fit, or where a value is below 0."""
    if bool((lengths < 0).any()) or bool((lengths > len(values)).any()) or sum(lengths.tolist()) != len(values):
        raise ValueError("the lengths of its rows do not fit its tokens")
    if len(values) and values.min() < 0:
        raise ValueError("it holds a token below 0")
    flat, ends = values.tolist(), list(accumulate(lengths.tolist(), initial=0))
    return [flat[first:end] for first, end in pairwise(ends)]


def _strings(text: Any, name: str, rows: int, *, optional: bool) -> list[Any]:
    values = text.get(name) if isinstance(text, dict) else None
    if (
        not isinstance(values, list)
        or len(values) != rows
        or not all(isinstance(value, str) or (optional and value is None) for value in values)
    ):
        raise ValueError(f"it has not one {name} a row")
    return values


def _facts(text: dict[str, Any]) -> dict[str, Any]:
    facts = text.get("facts")
    if not isinstance(facts, dict) or {key: type(value) for key, value in facts.items()} != FACTS:
        raise ValueError("its facts are not those of a manifest")
    return {key: facts[key] for key in FACTS}


def _notes(text: dict[str, Any]) -> list[Noted]:
    notes = text.get("notes")
    if not isinstance(notes, list) or not all(
        isinstance(note, list) and [type(part) for part in note] == [str, int, str] for note in notes
    ):
        raise ValueError("its notes are not notes")
    return [(message, rows, first) for message, rows, first in notes]
