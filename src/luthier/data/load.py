"""A file of rows becomes a data set of examples, or one error that lists everything wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.data.example import Dataset, Example
from luthier.data.forms import RowError, form_of
from luthier.data.problems import Problems, note_text
from luthier.data.read import Source, open_source, read_rows
from luthier.data.render import BATCH_ROWS, Renderer
from luthier.data.row_cache import RowCache, row_key
from luthier.data.row_file import RowFile

OnLong = Literal["error", "drop", "truncate"]
_BATCH_CHARACTERS = 4 * 2**20


@dataclass
class Lengths:
    """What became of the rows: how many were read, were longer than allowed, were cut, were left out, and the longest."""

    rows: int = 0
    long: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0
    first_long: str = ""
    unsupervised: list[str] = field(default_factory=list)


def load_examples(
    data: str, renderer: Renderer, *, on_long: OnLong = "error", offline: bool = False, cache: RowCache | None = None
) -> Dataset:
    """Read, render and tokenize all rows of a JSONL, JSON, CSV or Parquet file, or of a hub data set.

    Rows longer than renderer.max_length are an error, are dropped, or are truncated, as `on_long` says; a truncated row
    that has nothing left to learn is dropped. The manifest counts both.
    cache: where rows are kept that were rendered before; what it gives is what rendering would give. The manifest's `cache`
    says "off", "used", "made" (rendered now and kept), or "not kept".
    Raises DataError listing all problems, with file and line; and if no row is left or nothing is supervised.
    """
    source = open_source(data, offline=offline)
    if cache is None:
        rows = _render_file(source, renderer, on_long)
        return _dataset(source, rows, source.sha256(), "off")
    sha256 = source.sha256()
    key = row_key(sha256, source, renderer, on_long)
    kept = cache.read(key)
    if kept is not None:
        return _dataset(source, kept, sha256, "used")
    rows = _render_file(source, renderer, on_long)
    # A file that was written to meanwhile is not what the key says.
    now = source.sha256()
    return _dataset(source, rows, now, "made" if now == sha256 and cache.write(key, rows) else "not kept")


def kept_examples(data: str, renderer: Renderer, *, on_long: OnLong, cache: RowCache, offline: bool = False) -> Dataset | None:
    """The rows of `data` as they were rendered before, None where the cache does not hold them. Nothing is rendered.

    Raises DataError for a file that is not there or cannot be read.
    """
    source = open_source(data, offline=offline)
    sha256 = source.sha256()
    kept = cache.read(row_key(sha256, source, renderer, on_long))
    return None if kept is None else _dataset(source, kept, sha256, "used")


def _render_file(source: Source, renderer: Renderer, on_long: OnLong) -> RowFile:
    problems, lengths = Problems(), Lengths()
    form = ""
    examples: list[Example] = []
    for found, batch in render_source(source, renderer, problems, lengths):
        form = found
        fitted = [fit(example, renderer.max_length, on_long, lengths) for example in batch]
        # A file with problems is read to its end for the sake of the list; its examples are of no more use.
        if problems.count:
            examples.clear()
        else:
            examples.extend(example for example in fitted if example is not None)
    damaged = problems.count > 0
    for problem in length_problems(source.name, lengths, renderer.max_length, on_long, kept=len(examples), damaged=damaged):
        problems.add("", problem)
    problems.raise_any(source.name)
    for example in examples:
        example.where = example.where.removeprefix(source.place)
    facts = {
        "form": form,
        "rows": lengths.rows,
        "kept": len(examples),
        "dropped": lengths.dropped,
        "truncated": lengths.truncated,
        "tokens": sum(len(example.ids) for example in examples),
        "supervised_tokens": sum(sum(example.supervised) for example in examples),
        "longest": lengths.longest,
    }
    notes = [(message, rows, first.removeprefix(source.place)) for message, rows, first in problems.noted()]
    return RowFile(examples, facts, notes)


def _dataset(source: Source, rows: RowFile, sha256: str, cache: str) -> Dataset:
    """The rows with the name of their file put back."""
    for example in rows.examples:
        example.where = source.place + example.where
    notes = [note_text(message, count, first and source.place + first) for message, count, first in rows.notes]
    return Dataset(rows.examples, {"path": source.name, "sha256": sha256, **rows.facts, "notes": notes, "cache": cache})


def render_source(source: Any, renderer: Renderer, problems: Problems, lengths: Lengths) -> Iterator[tuple[str, list[Example]]]:
    """(form of the file, examples) batch by batch. The first row that can be recognised decides the form."""
    form: str | None = None
    for batch in _batches(read_rows(source, problems)):
        lengths.rows += len(batch)
        form = form or _first_form(batch)
        yield form or "", renderer.render_many(batch, problems, form)
    if not lengths.rows and not problems.count:
        problems.add(source.name, "the file holds no rows. Give a file with at least one.")


def _first_form(batch: list[tuple[str, Any]]) -> str | None:
    for _, value in batch:
        try:
            return form_of(value)
        except RowError:  # said when the row is rendered
            continue
    return None


def _batches(rows: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Rows in lists of at most BATCH_ROWS, fewer where they are long."""
    batch: list[tuple[str, Any]] = []
    characters = 0
    for where, value in rows:
        batch.append((where, value))
        characters += _size(value)
        if len(batch) >= BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _size(value: Any) -> int:
    """Roughly the characters of text in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


def fit(example: Example, max_length: int, on_long: OnLong, lengths: Lengths) -> Example | None:
    """The example, cut or left out if it is too long or has nothing to learn; `lengths` counts what was done."""
    length = len(example.ids)
    lengths.longest = max(lengths.longest, length)
    if length > max_length:
        lengths.long += 1
        lengths.first_long = lengths.first_long or example.where
        if on_long != "truncate":
            lengths.dropped += 1
            return None
        example.ids, example.supervised = example.ids[:max_length], example.supervised[:max_length]
    if not any(example.supervised):
        lengths.dropped += 1
        lengths.unsupervised.append(example.where)
        return None
    lengths.truncated += length > max_length
    return example


def length_problems(data: str, lengths: Lengths, max_length: int, on_long: OnLong, *, kept: int, damaged: bool) -> list[str]:
    """What the lengths forbid: rows above the limit where that is an error, and a file of which nothing is left to learn."""
    limit = f"{data}: rows must have at most {max_length} tokens (--max-length)"
    longest = f"the longest has {lengths.longest} tokens"
    if lengths.long and on_long == "error":
        return [
            f"{limit}; {lengths.long} of {lengths.rows} have more, {longest}, first {lengths.first_long}. "
            "Raise --max-length, or use --on-long drop or truncate."
        ]
    if kept or damaged or not lengths.rows:
        return []
    if lengths.long == lengths.rows:
        left = "all were dropped" if on_long == "drop" else "cut there, none has a supervised token left"
        return [f"{limit}; all {lengths.rows} have more, {longest}; {left}. Raise --max-length."]
    return [
        f"{data}: at least one token must be supervised; of {lengths.rows} rows, {lengths.long} exceed {max_length} tokens "
        f"and {len(lengths.unsupervised)} have nothing to learn. Look at them with `luthier data check`."
    ]
