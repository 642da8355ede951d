"""Files that a compression reads: as many tokens as it needs of plain text, or of rows as for training, and no more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from luthier.data import Example, Renderer
from luthier.data.lines import UTF8_BOM, decode, refuse_wide_encodings
from luthier.data.load import Lengths, fit, length_problems, render_source
from luthier.data.problems import Problems
from luthier.data.read import Source, open_source
from luthier.errors import DataError
from luthier.evaluation.choice import Choice
from luthier.evaluation.sets import choice_rows, has_choices
from luthier.units import count_text, size_text, visible

PLAIN_SUFFIXES = (".txt", ".raw", ".md")
# Plain text is read and turned to tokens in pieces of so many bytes. The first is enough unless tokens have more than
# BYTES_A_TOKEN on average.
PIECE_BYTES, LEAST_PIECE_BYTES, BYTES_A_TOKEN = 1 << 20, 1 << 16, 8
# A row, and what it lets choose from where it does.
RowRead = tuple[Example, Choice | None]
_LAST_BREAK = re.compile(rb".*[\n ]", re.DOTALL)


@dataclass(frozen=True)
class Read:
    """What was read of one file. texts: token ids; of plain text one, of rows one a row, each different. examples: the rows, in
    the order of texts. notes: what was not read, or was left out."""

    name: str
    texts: list[list[int]]
    is_plain: bool
    examples: list[Example] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_file(path: str, tokenizer: PreTrainedTokenizerBase, *, window: int, enough: int, rows: int = 0, offline: bool) -> Read:
    """The first texts of a file that have at least `enough` tokens together, and at least so many rows.

    Plain text (.txt, .raw, .md) is one text; of anything else each row is one, rendered as for training (with choices, as if
    the right one were its answer) and cut at `window` tokens; rows that say the same are one.
    Raises DataError for a file that is missing or no file, is not UTF-8 (with the place of the byte), or has bad rows.
    """
    if is_plain(path):
        return _read_plain(path, tokenizer, enough)
    return _read_rows(path, tokenizer, window, enough, rows, offline)


def is_plain(path: str) -> bool:
    """Whether a name is that of plain text."""
    return Path(path).suffix.lower() in PLAIN_SUFFIXES


def check_readable(path: str, flag: str, *, offline: bool) -> None:
    """Raise DataError for what `read_file` could not begin to read."""
    if not is_plain(path):
        open_source(path, offline=offline)
    elif not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no file" if Path(path).exists() else "not there"
        raise DataError(f"{flag} must be a text file that can be read; {path} is {what}. Check the path.")


def rows_for_task(
    path: str, tokenizer: PreTrainedTokenizerBase, *, window: int, wanted: set[str], offline: bool
) -> tuple[Renderer, list[RowRead]]:
    """The rows at the places `wanted` with the answer alone supervised, and their renderer; those that fit `window`."""
    renderer = Renderer(tokenizer, max_length=window)
    found: list[RowRead] = []
    for batch in _rendered(open_source(path, offline=offline), renderer, Problems(), Lengths()):
        found += [(one, choice) for one, choice in batch if one.where in wanted and _fits(one, choice, window)]
        if len(found) == len(wanted):
            break
    return renderer, found


def _fits(example: Example, choice: Choice | None, window: int) -> bool:
    length = len(example.ids) if choice is None else max(len(example.ids), choice.longest_answer(example))
    return length <= window and any(example.supervised)


def _rendered(source: Source, renderer: Renderer, problems: Problems, lengths: Lengths) -> Iterator[Sequence[RowRead]]:
    """Batches of rows; of a file with choices each row with the right one as its answer, and its choices."""
    if has_choices(source):
        yield from ([row] for row in choice_rows(source, renderer, problems, lengths))
    else:
        for _, batch in render_source(source, renderer, problems, lengths):
            yield [(example, None) for example in batch]


def _read_plain(path: str, tokenizer: PreTrainedTokenizerBase, enough: int) -> Read:
    check_readable(path, "the text", offline=True)
    ids: list[int] = []
    read = 0
    try:
        total = Path(path).stat().st_size
        for size, text in _pieces(Path(path), min(PIECE_BYTES, max(LEAST_PIECE_BYTES, BYTES_A_TOKEN * enough))):
            ids += tokenizer.encode(text, add_special_tokens=False)
            read += size
            if len(ids) >= enough:
                break
    except OSError as error:
        raise DataError(f"a text file must be readable; {path}: {error.strerror or error}.") from error
    name = visible(Path(path).name)
    notes = (
        [f"Of {name} the first {size_text(read)} of {size_text(total)} were read: as much as is needed."]
        if read < total
        else []
    )
    return Read(name, [ids], True, notes=notes)


def _pieces(path: Path, size: int) -> Iterator[tuple[int, str]]:
    """(bytes, text) piece by piece of about `size` bytes, cut behind a line break or a space where there is one."""
    offset, line, rest = 0, 1, b""
    with path.open("rb") as file:
        while chunk := file.read(size):
            raw = rest + chunk
            if not offset:
                refuse_wide_encodings(path, raw)
            cut = _cut(raw) if len(chunk) == size else len(raw)
            text = decode(raw[:cut], path, offset, line)
            yield cut, text.removeprefix(UTF8_BOM.decode()) if not offset else text
            offset, line, rest = offset + cut, line + raw.count(b"\n", 0, cut), raw[cut:]
    if rest:
        yield len(rest), decode(rest, path, offset, line)


def _cut(raw: bytes) -> int:
    """Where a piece ends: behind its last break in the second half, else before a character that may not be whole."""
    match = _LAST_BREAK.match(raw)
    if match is not None and match.end() > len(raw) // 2:
        return match.end()
    cut = len(raw)
    while cut > len(raw) - 4 and raw[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if raw[cut - 1] >= 0xC0 else len(raw)


def _read_rows(path: str, tokenizer: PreTrainedTokenizerBase, window: int, enough: int, rows: int, offline: bool) -> Read:
    source = open_source(path, offline=offline)
    renderer = Renderer(tokenizer, max_length=window, loss_on="all")
    problems, lengths = Problems(), Lengths()
    examples: dict[tuple[int, ...], Example] = {}
    tokens = kept = 0
    on_long: Literal["truncate"] = "truncate"
    stopped = False
    for batch in _rendered(source, renderer, problems, lengths):
        for example in filter(None, (fit(one, window, on_long, lengths) for one, _ in batch)):
            kept += 1
            tokens += len(example.ids) if examples.setdefault(tuple(example.ids), example) is example else 0
        if stopped := tokens >= enough and len(examples) >= rows:
            break
    damaged = problems.count > 0
    for problem in length_problems(source.name, lengths, window, on_long, kept=kept, damaged=damaged):
        problems.add("", problem)
    problems.raise_any(source.name)
    name = visible(Path(path).name)
    notes = [f"Of {name} the first {count_text(lengths.rows)} rows were read: as many as are needed."] if stopped else []
    if kept > len(examples):
        notes.append(f"{count_text(kept - len(examples))} rows of {name} that say the same as another were left out.")
    return Read(name, [one.ids for one in examples.values()], False, list(examples.values()), notes)
