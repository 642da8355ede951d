"""Everything that is wrong with a file, gathered so that it can be said at once."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import MAX_LISTED_PROBLEMS, DataError

MAX_KEPT = 1000

# What a note says, how many rows it is about, and the file and line of the first of them, or "".
Noted = tuple[str, int, str]


@dataclass
class _Note:
    first: str
    rows: int = 0
    last: str = ""


class Problems:
    """Collects problems, the first MAX_KEPT of them in words and all of them as a count; and notes, each once."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.count = 0
        self._notes: dict[str, _Note] = {}

    def add(self, where: str, message: str) -> None:
        """`where` is file and line; `message` says the rule, what came, and what to try."""
        self.count += 1
        if len(self.kept) < MAX_KEPT:
            self.kept.append(f"{where}: {message}" if where else message)

    def note(self, message: str, where: str) -> None:
        """Something to know that stops nothing; the rows with the same message are counted."""
        note = self._notes.setdefault(message, _Note(where))
        if note.last != where or not note.rows:
            note.rows, note.last = note.rows + 1, where

    def noted(self) -> list[Noted]:
        """Each note with its number of rows and its first place."""
        return [(message, note.rows, note.first) for message, note in self._notes.items()]

    def notes(self) -> list[str]:
        """Each note as a sentence."""
        return [note_text(*noted) for noted in self.noted()]

    def listed(self) -> list[str]:
        """The kept problems, and a last line that counts the others."""
        more = self.count - len(self.kept)
        return self.kept + ([f"... and {more} more"] if more else [])

    def raise_any(self, name: str) -> None:
        """Raise one DataError with the first MAX_LISTED_PROBLEMS problems and the count of the rest, if there are any."""
        if not self.count:
            return
        if self.count == 1:
            raise DataError(self.kept[0])
        lines = [f"  - {problem}" for problem in self.kept[:MAX_LISTED_PROBLEMS]]
        if self.count > MAX_LISTED_PROBLEMS:
            lines.append(f"  ... and {self.count - MAX_LISTED_PROBLEMS} more")
        raise DataError(f"{name} has {self.count} problems:\n" + "\n".join(lines))


def note_text(message: str, rows: int, first: str) -> str:
    """A note as a sentence, with its rows counted where it is about rows."""
    return f"{message} ({rows} {'row' if rows == 1 else 'rows'}, first {first})" if first else message
