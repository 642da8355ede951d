"""The lines of a UTF-8 text file, one in memory at a time, with errors that name encoding and byte offset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from luthier.errors import DataError

MAX_ROW_BYTES = 64 * 2**20

_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
UTF8_BOM = b"\xef\xbb\xbf"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end) for each line of `path`; a leading byte order mark is left out.

    Raises DataError for another encoding, with its name and byte offset, and for a line above MAX_ROW_BYTES.
    """
    offset = 0
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                raise DataError(
                    f"{path}:{number}: a row holds at most {MAX_ROW_BYTES // 2**20} MB; this one is longer. "
                    "Split it, or check that rows end with a line break."
                )
            if number == 1:
                refuse_wide_encodings(path, line)
                if line.startswith(UTF8_BOM):
                    line, offset = line[3:], 3
            yield number, decode(line, path, offset, number)
            offset += len(line)


def decode(raw: bytes, path: Path, offset: int, line: int) -> str:
    """`raw` as UTF-8. `offset` and `line` say where it stands in the file.

    Raises DataError naming the offset of the first bad byte.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: the file must be UTF-8; byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not, "
            f"and looks like Latin-1 (Windows-1252). Convert it: iconv -f WINDOWS-1252 -t UTF-8."
        ) from error


def refuse_wide_encodings(path: Path, start: bytes) -> None:
    """Raise DataError if the file begins as UTF-16 or UTF-32 do: with their byte order mark, or with every other byte zero."""
    name = next((name for bom, name in _BOMS if start.startswith(bom)), None)
    offset = 0
    if name is None and b"\x00" in start[:64]:
        head = start[:64]
        if head[1::2].count(0) > len(head) // 4 or head[0::2].count(0) > len(head) // 4:
            name, offset = "UTF-16", head.index(0)
    if name:
        raise DataError(
            f"{path}:1: the file must be UTF-8; at byte offset {offset} it looks like {name}. "
            f"Convert it: iconv -f {name} -t UTF-8."
        )
