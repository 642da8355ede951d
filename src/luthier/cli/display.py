"""Progress on stderr while something runs: a live panel on a terminal, plain lines everywhere else.

Nothing here hides the cursor or leaves the terminal's modes changed, so that a run that is killed leaves it as it was.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from luthier.cli.panel import Dashboard, RunView, Stage, metrics_text, stage_line
from luthier.progress import Progress
from luthier.training.events import Listener
from luthier.units import clock_text, count_text, duration_text, number_text, percent_text, size_text, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

    from luthier.training.result import RunResult

REFRESHES_PER_SECOND = 3
LINES_PER_RUN = 25
QUIET_SECONDS = 300.0
STAGE_SECONDS = 5.0


def is_terminal(stream: TextIO) -> bool:
    """True if `stream` is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def terminal_console(stream: TextIO) -> Console:
    """A rich console that writes to the terminal behind `stream`. NO_COLOR in the environment takes the colours away."""
    from rich.console import Console

    return Console(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Give a `progress(stage, done, total)` that shows on stderr what is being downloaded, loaded or evaluated."""
    if not is_terminal(sys.stderr):
        yield PlainProgress(sys.stderr)
        return
    console = terminal_console(sys.stderr)
    with _live(console, transient=True) as live:

        def progress(name: str, done: int, total: int) -> None:
            live.update(stage_line(Stage(name, done, total), min(console.width, 100)))

        yield progress


@contextmanager
def live_display() -> Iterator[Listener]:
    """Give a Listener that shows a training run on stderr for as long as the block runs."""
    if not is_terminal(sys.stderr):
        yield PlainListener(sys.stderr)
        return
    console = terminal_console(sys.stderr)
    view = RunView()
    with _live(console, Dashboard(view)) as live:
        yield PanelListener(view, live)


@contextmanager
def _live(console: Console, content: Any = "", transient: bool = False) -> Iterator[Live]:
    from rich.live import Live

    live = Live(
        content, console=console, transient=transient, refresh_per_second=REFRESHES_PER_SECOND, redirect_stdout=False
    )  # fmt: skip
    with live:
        # rich hides the cursor and shows it again at the end, an end that a killed process never comes to.
        console.show_cursor(True)
        yield live


class PanelListener(Listener):
    """Turns a run's events into the state the panel draws. Nothing is drawn here: the panel refreshes by itself."""

    def __init__(self, view: RunView, live: Live):
        self.view = view
        self.live = live

    def stage(self, name: str, done: int, total: int) -> None:
        self.view.stage = Stage(name, done, total)

    def note(self, text: str) -> None:
        from rich.text import Text

        self.live.console.print(Text(visible(text, lines=True), style="yellow"))

    def start(self, info: dict[str, Any]) -> None:
        self.view.start(info)

    def step(self, record: dict[str, Any]) -> None:
        self.view.add_step(record)

    def evaluated(self, record: dict[str, Any]) -> None:
        self.view.evaluation, self.view.stage = record, None

    def finish(self, result: RunResult) -> None:
        self.view.finished, self.view.stage = True, None


class PlainProgress:
    """One line when a stage begins, then one every few seconds while it lasts, and one at its end if it was long."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._clock = clock
        self._name: str | None = None
        self._written = 0.0
        self._lines = 0

    def __call__(self, name: str, done: int, total: int) -> None:
        if name != self._name:
            self._name, self._written, self._lines = name, self._clock(), 0
            write_line(self._stream, f"{visible(name)} ...")
            return
        at_end = total > 0 and done >= total
        if self._clock() - self._written < STAGE_SECONDS and not (at_end and self._lines):
            return
        stage = Stage(name, done, total)
        self._written, self._lines = self._clock(), 0 if at_end else self._lines + 1
        how_far = f": {percent_text(round(stage.share, 2))}, {stage.counts}" if total > 0 else " ..."
        write_line(self._stream, visible(name) + how_far)


class PlainListener(Listener):
    """A run's events as lines without control characters, each flushed: the first step, about 25 in between, the last."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._clock = clock
        self._view = RunView(clock)
        self._progress = PlainProgress(stream, clock)
        self._shown: int | None = None
        self._written = 0.0

    def stage(self, name: str, done: int, total: int) -> None:
        self._progress(name, done, total)

    def note(self, text: str) -> None:
        for line in text.splitlines():
            self._line(f"note: {visible(line)}")

    def start(self, info: dict[str, Any]) -> None:
        self._view.start(info)
        facts = [str(info[key]) for key in ("model", "method") if info.get(key)]
        if info.get("trainable_parameters") is not None:
            facts.append(f"{count_text(info['trainable_parameters'])} trainable parameters")
        facts.append(f"{count_text(self._view.total_steps)} steps")
        self._line(f"training {visible(', '.join(facts))}, in {visible(str(info.get('run_dir', '-')))}")

    def step(self, record: dict[str, Any]) -> None:
        self._view.add_step(record)
        step, total = self._view.step, self._view.total_steps
        part = step * LINES_PER_RUN // max(1, total)
        if part == self._shown and step != total and self._clock() - self._written < QUIET_SECONDS:
            return
        self._shown = part
        self._line(self._step_text(record, step, total))

    def _step_text(self, record: dict[str, Any], step: int, total: int) -> str:
        share, left = self._view.supervised_share(), self._view.seconds_left()
        parts = [f"step {step}/{total} ({100 * step // max(1, total)} %)", f"loss {number_text(record.get('loss'))}"]
        if record.get("loss_smooth") is not None:
            parts.append(f"smoothed {number_text(record['loss_smooth'])}")
        parts.append(f"rate {number_text(record.get('learning_rate'))}")
        if record.get("tokens_per_second") is not None:
            parts.append(f"{count_text(record['tokens_per_second'])} tokens/s")
        if share is not None:
            parts.append(f"supervised {percent_text(round(share, 2))}")
        if record.get("rss_bytes"):
            parts.append(f"memory {size_text(record['rss_bytes'])}")
        if left is not None and step < total:
            parts.append(f"{clock_text(left)} left")
        return "  ".join(parts)

    def evaluated(self, record: dict[str, Any]) -> None:
        self._line(f"held out at step {record.get('step', '?')}: {metrics_text(record)}")

    def saved(self, path: object) -> None:
        self._line(f"saved {visible(str(path))}")

    def finish(self, result: RunResult) -> None:
        self._line(f"done in {duration_text(self._view.seconds_elapsed())}")

    def _line(self, text: str) -> None:
        self._written = self._clock()
        write_line(self._stream, text)


def write_line(stream: TextIO, text: str) -> None:
    """One whole line, flushed, so that a log that is being read is never behind."""
    stream.write(text + "\n")
    stream.flush()
