"""Rows from a file or a hub data set, whatever its format, which is recognised by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data.problems import Problems
from luthier.data.read_json import first_character, read_json_list, read_jsonl
from luthier.data.read_table import read_csv, read_hub, read_parquet
from luthier.errors import DataError

KNOWN_COLUMNS = frozenset({"messages", "conversations", "instruction", "output", "prompt", "completion", "text"})
_SUPPORTED = "JSONL, JSON, CSV or Parquet"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.\[\]%:+-]+)?")
_TEXT_SUFFIXES = (".csv", ".tsv")
_REFUSED_STARTS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz"}


@dataclass
class Source:
    """Where rows come from: `kind` is jsonl, json, csv, parquet or hub; `path` is the file, None for a hub data set."""

    name: str
    kind: str
    path: Path | None
    _hub_sha256: str | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def place(self) -> str:
        """What the place of every row begins with."""
        return self.name if self.path is None else str(self.path)

    def sha256(self) -> str:
        """Of the file's bytes; of the rows as sorted JSON for a hub data set, walked only if nobody has read them all."""
        if self.path is None:
            if self._hub_sha256 is None:
                deque(self.hub_rows(), maxlen=0)
            assert self._hub_sha256 is not None
            return self._hub_sha256
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def hub_rows(self) -> Iterator[tuple[str, Any]]:
        """(where, row) of every row of a hub data set, which stays as it was loaded: the first to read all makes its digest."""
        if self._hub_sha256 is not None:
            yield from read_hub(self.name)
            return
        digest = hashlib.sha256()
        for where, row in read_hub(self.name):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            yield where, row
        self._hub_sha256 = digest.hexdigest()


def open_source(name: str, *, offline: bool = False) -> Source:
    """Recognise what `name` is, by the content of the file before its suffix.

    Raises DataError if it is missing, empty, a folder, unreadable, or of a kind that is not supported,
    and for a hub name if offline.
    """
    path = Path(name)
    try:
        if path.is_dir():
            raise DataError(f"data must be one file; {name} is a folder. Give the file inside it.")
        if path.is_file():
            return Source(name, _kind_of(path), path)
    except OSError as error:
        raise DataError(
            f"the data file must be readable; {name}: {error.strerror or error}. Check the path and its permissions."
        ) from error
    if (
        "/" not in name
        or not _HUB_NAME.fullmatch(name)
        or path.suffix.lower() in (".jsonl", ".json", ".parquet", *_TEXT_SUFFIXES)
    ):
        raise DataError(f"the data must be a file or a data set of the hub; there is no file {name}. Check the path.")
    if offline:
        raise DataError(
            f"--offline opens no connection, and {name} is no file here. Check the path, or download the data set as a file."
        )
    return Source(name, "hub", None)


def _kind_of(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        raise DataError(f"{path}: the file is empty. Give a file with at least one row.")
    if start.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return "parquet"
    if packed := next((kind for magic, kind in _REFUSED_STARTS.items() if start.startswith(magic)), None):
        raise DataError(f"data must be {_SUPPORTED}; {path} is packed with {packed}. Unpack it first.")
    if path.suffix.lower() in _TEXT_SUFFIXES:
        return "csv"
    character = first_character(path)
    if character == "":
        raise DataError(f"{path}: the file holds only white space. Give a file with at least one row.")
    if character == "[":
        return "json"
    if character == "{" or path.suffix.lower() in (".jsonl", ".json"):
        return "jsonl"
    raise DataError(f'data must be {_SUPPORTED}; {path} is none of these. Plain text goes into rows such as {{"text": "..."}}.')


def read_rows(source: Source, problems: Problems) -> Iterator[tuple[str, Any]]:
    """(where, value) of every row of `source`, one in memory at a time except in a JSON list.

    What is wrong with a single row is added to `problems`; DataError is raised for what ends the reading.
    """
    if source.path is None:
        return source.hub_rows()
    if source.kind == "csv":
        return read_csv(source.path, problems, KNOWN_COLUMNS)
    if source.kind == "parquet":
        return read_parquet(source.path)
    return read_json_list(source.path, problems) if source.kind == "json" else read_jsonl(source.path, problems)
