"""Ctrl-C and SIGTERM: the first asks the run to save and stop, a second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopRequested(Exception):
    """Raised inside an evaluation when a signal has asked the run to stop."""


class Interrupts:
    """While entered, notes SIGINT and SIGTERM in `requested`; the loop looks there between steps.

    A second SIGINT raises KeyboardInterrupt where the program stands. Only the main thread receives signals; in any
    other thread nothing is changed and `requested` stays None. The handlers from before are put back on leaving.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number)

    def check(self) -> None:
        """Raise StopRequested if a signal has come; called from the progress of an evaluation."""
        if self.requested is not None:
            raise StopRequested
