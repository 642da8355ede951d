"""Rows of tables: CSV, Parquet, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luthier.data.lines import MAX_ROW_BYTES, read_lines
from luthier.data.problems import Problems
from luthier.errors import DataError, one_line

_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
_PARQUET_ROWS = 64


def read_csv(path: Path, problems: Problems, known_columns: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """(file: row n (line m), {column: text}) of every row below the header; quoted fields may hold line breaks.

    Blank lines are left out, before the header too. A tab separates the fields of a `.tsv` file, a comma those of any
    other. Rows with too few or too many fields are added to `problems`. Raises DataError for a header without any of
    `known_columns`, which a wrong delimiter gives.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        yield from _csv_rows(path, delimiter, problems, known_columns)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, delimiter: str, problems: Problems, known_columns: frozenset[str]) -> Iterator[tuple[str, Any]]:
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number, started = 0, 1
    while True:
        where = f"{path}: row {number} (line {started})" if header else f"{path}:{started}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(
                where, f"not valid CSV: {error}. Check for a quote that is not closed; a quote inside a field is doubled."
            )
            return
        if not fields or (header is None and not "".join(fields).strip()):
            number -= 1
        elif header is None:
            header = _check_header(f"{path}: row 0 (line {started})", fields, delimiter, known_columns)
        elif len(fields) != len(header):
            problems.add(
                where, f"a row must have the {len(header)} fields of the header; got {len(fields)}.{_quoting(fields, header)}"
            )
        else:
            yield where, dict(zip(header, fields, strict=True))
        number += 1
        started = reader.line_num + 1


def _quoting(fields: list[str], header: list[str]) -> str:
    return " A field that holds the delimiter or a line break must be in double quotes." if len(fields) > len(header) else ""


def _check_header(where: str, header: list[str], delimiter: str, known_columns: frozenset[str]) -> list[str]:
    """The column names. Raises DataError for a wrong delimiter, unknown columns, or a name that stands twice."""
    names = [name.strip() for name in header]
    if not known_columns & set(names):
        for other, spoken in _OTHER_DELIMITERS.items():
            parts = {part.strip().strip('"') for name in header for part in name.split(other)}
            if other != delimiter and known_columns & parts:
                raise DataError(
                    f"{where}: fields must be separated by {_OTHER_DELIMITERS[delimiter]}; "
                    f"the header has {spoken}. Save the file with {_OTHER_DELIMITERS[delimiter]}, or as JSONL."
                )
        raise DataError(
            f"{where}: the first row must name the columns, among them prompt and completion, "
            f"instruction and output, or text; got {', '.join(names)[:200]!r}."
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: a column name may stand once; {repeated[0]!r} stands {names.count(repeated[0])} times.")
    return names


def read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """(file: row n, {column: value}) of every row, `_PARQUET_ROWS` in memory at a time.

    Raises DataError if the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The last two for values that Python has no type for, such as dates far off.
        reason = one_line(error, 200)
        raise DataError(
            f"{path}: after row {number}: the file must be a whole Parquet file; {reason}. Write or download it again."
        ) from error


def read_hub(name: str) -> Iterator[tuple[str, Any]]:
    """(name: row n, value) of every row of a data set of the hub; `owner/name:split` picks a split, else `train`.

    Raises DataError if the `hub` extra is not installed or the data set cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name!r} is no file here, and data sets of the hub need the `hub` extra. "
            "Check the path, or pip install 'luthier[hub]'."
        ) from error
    owner_and_name, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(owner_and_name, split=split or "train")
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        # Errors of the hub, of the network and of the data set's files all derive from these.
        reason = one_line(error, 200)
        raise DataError(
            f"{name!r} is no file here and could not be loaded from the hub: {reason}. Check the name or the path."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", dict(row)
