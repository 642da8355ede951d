"""`python -m luthier.models.fetch`: put the default model into the cache, saying on stderr how far it is."""

from __future__ import annotations

import sys

from luthier.errors import LuthierError
from luthier.models.smollm2 import ALIAS
from luthier.models.source import resolve


class StderrProgress:
    """One line that is rewritten on a terminal; elsewhere a line every tenth of the way."""

    def __init__(self) -> None:
        self._last = -1

    def __call__(self, stage: str, done: int, total: int) -> None:
        percent = 100 * done // max(1, total)
        step = percent if sys.stderr.isatty() else percent // 10
        if step == self._last:
            return
        self._last = step
        bar = "#" * (percent // 4)
        line = f"{stage} {ALIAS} [{bar:<25}] {percent:3d} % of {total / 1e6:.0f} MB"
        end = "\n" if not sys.stderr.isatty() or done >= total else ""
        sys.stderr.write(f"\r{line}{end}" if sys.stderr.isatty() else f"{line}\n")
        sys.stderr.flush()


def main() -> int:
    """Fetch the default model. Returns the exit code: 0, or that of the error it has told."""
    try:
        source = resolve(ALIAS, progress=StderrProgress())
    except LuthierError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stderr.write(f"{source.note}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
