"""Numbers and texts as people read them, for the terminal and for the report. Needs nothing but the standard library."""

from __future__ import annotations

import math
import re
import unicodedata

SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
# Characters that turn the direction of the text after them; a hostile row may hide what it says with them.
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def size_text(size_bytes: float) -> str:
    """Bytes in decimal units: `93.4 MB`, `1.27 GB`."""
    for unit, factor in SIZES:
        if size_bytes >= factor:
            return f"{_three_digits(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} B"


def parse_size(text: str) -> int:
    """Bytes of `6GB`, `750 MB`, `1.5GiB` or a plain number of bytes. Raises ValueError, saying what is accepted."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if found is not None and not (found[3] and not found[2]):
        size_bytes = float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
        if 1 <= size_bytes < math.inf:
            return int(size_bytes)
    raise ValueError(f"a size is a number above 0 with MB, GB, MiB or GiB, such as 6GB; got {shortened(text, 40)!r}")


def duration_text(seconds: float) -> str:
    """A time span with two units at most: `8.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clock_text(seconds: float) -> str:
    """A running clock: `0:08`, `3:05`, `2:10:44`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def count_text(count: float) -> str:
    """A count with separators: `4,884,480`."""
    return f"{count:,.0f}"


def number_text(value: float | None) -> str:
    """A measured number with about four digits: `0.2112`, `12.35`, `1.5e-05`; `-` for none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if size < 10 else f"{value:,.2f}" if size < 1e4 else f"{value:,.0f}"


def percent_text(share: float) -> str:
    """A share of one as a percentage: `34 %`, `99.6 %`; one decimal unless it is whole."""
    percent = round(100 * share, 1)
    return f"{percent:.0f} %" if percent == round(percent) else f"{percent:.1f} %"


def metric_text(name: str, value: float | None) -> str:
    """A metric of an evaluation: exact match as a percentage, everything else as a number."""
    return percent_text(value) if name == "exact_match" and value is not None else number_text(value)


def visible(text: str, *, lines: bool = False) -> str:
    """`text` with every control, surrogate and direction character written as an escape, so that a terminal only shows it.

    lines: keep line feeds and tabs; otherwise they are escaped too.
    """
    kept = "\n\t" if lines else ""
    return "".join(char if char in kept or not _is_hidden(char) else _escape(char) for char in text)


def shortened(text: str, limit: int) -> str:
    """`visible(text)`, cut to `limit` characters with an ellipsis in the place of what was cut."""
    shown = visible(text)
    return shown if len(shown) <= limit else shown[: max(0, limit - 1)] + "…"


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in DIRECTIONS


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii") if ord(char) < 0x80 else f"\\u{ord(char):04x}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
