"""What the live display shows: the state of a run, and the panel that draws it for any width."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from luthier.training.events import NOT_METRICS
from luthier.units import clock_text, count_text, metric_text, number_text, percent_text, shortened, size_text, visible

SPARKS = "▁▂▃▄▅▆▇█"
WIDEST = 100
NARROW = 56
LABELS = {"loss": "loss", "perplexity": "perplexity", "exact_match": "exact match"}


@dataclass
class Stage:
    """Something that is being worked through: a download, loading, an evaluation."""

    name: str
    done: int
    total: int

    @property
    def share(self) -> float:
        return min(1.0, self.done / self.total) if self.total > 0 else 0.0

    @property
    def counts(self) -> str:
        """`40.1/93.2 MB` or `12/300`; bytes are recognised by their size, everything else a run counts is smaller."""
        if self.total <= 0:
            return ""
        if self.total >= 1_000_000:
            return f"{size_text(self.done)} of {size_text(self.total)}"
        return f"{count_text(self.done)} of {count_text(self.total)}"


@dataclass
class RunView:
    """The state of a run as its events tell it; drawn by `Dashboard`."""

    clock: Callable[[], float] = time.monotonic
    info: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=32))
    stage: Stage | None = None
    finished: bool = False
    _started: float | None = None
    _first: tuple[int, float] | None = None
    _last: float = 0.0

    @property
    def total_steps(self) -> int:
        return int(self.info.get("total_steps") or 0)

    @property
    def step(self) -> int:
        return int(self.record.get("step") or 0)

    def start(self, info: dict[str, Any]) -> None:
        self.info, self.stage, self._started = dict(info), None, self.clock()

    def add_step(self, record: dict[str, Any]) -> None:
        self.record, self.stage, self._last = record, None, self.clock()
        if self._first is None:
            # A resumed run starts in the middle: only steps made here tell how fast it is.
            self._first = (self.step - 1, self._started if self._started is not None else self._last)
        if record.get("loss") is not None:
            self.losses.append(float(record["loss"]))
        self.recent.append((int(record.get("supervised_tokens") or 0), int(record.get("tokens") or 0)))

    def supervised_share(self) -> float | None:
        """Share of the last steps' tokens that carry loss."""
        tokens = sum(item[1] for item in self.recent)
        return sum(item[0] for item in self.recent) / tokens if tokens else None

    def seconds_elapsed(self) -> float:
        return 0.0 if self._started is None else self.clock() - self._started

    def seconds_left(self) -> float | None:
        """Steps left times the mean time of those made, evaluations and checkpoints included; None before the first."""
        if self._first is None or not self.total_steps:
            return None
        done, since = self.step - self._first[0], self._last - self._first[1]
        return max(0.0, (self.total_steps - self.step) * since / max(1, done) - (self.clock() - self._last))


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` as block characters, at most `width`, each the mean of its share of the values; "" for none."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite or width < 1:
        return ""
    columns = min(width, len(finite))
    edges = [round(index * len(finite) / columns) for index in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def metrics_text(metrics: dict[str, Any]) -> str:
    """`loss 0.5121, perplexity 1.67, exact match 84 %`."""
    shown = {key: value for key, value in metrics.items() if key not in NOT_METRICS and isinstance(value, int | float)}
    return ", ".join(f"{LABELS.get(key, key)} {metric_text(key, value)}" for key, value in shown.items())


class Dashboard:
    """Draws a RunView at the width the console has now; rich calls it at every refresh."""

    def __init__(self, view: RunView):
        self.view = view

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, WIDEST)
        unicode = not options.ascii_only
        if not self.view.info:
            if self.view.stage is not None:
                yield stage_line(self.view.stage, width)
            return
        if width < NARROW:
            yield Group(*self._lines(width, unicode))
            return
        title = Text(f" {visible(str(self.view.info.get('model', 'training')))} ", style="bold")
        where = shortened(str(self.view.info.get("run_dir", "")), width - 8)
        yield Panel(
            Group(*self._lines(width - 6, unicode)), title=title, title_align="left", subtitle=Text(f" {where} ", style="dim"),
            subtitle_align="left", width=width, padding=(0, 2), border_style="dim",
        )  # fmt: skip

    def _lines(self, width: int, unicode: bool) -> list[RenderableType]:
        lines: list[RenderableType] = [self._progress(width)]
        if self.view.record:
            lines += [self._loss(width, unicode), self._figures(width)]
        if self.view.evaluation:
            step = self.view.evaluation.get("step", "?")
            lines.append(labelled("held out", f"{metrics_text(self.view.evaluation)} at step {step}", style="green"))
        if self.view.stage is not None:
            lines.append(stage_line(self.view.stage, width))
        return lines

    def _progress(self, width: int) -> RenderableType:
        view = self.view
        left = view.seconds_left()
        elapsed = clock_text(view.seconds_elapsed())
        times = f"{elapsed} so far"
        if view.finished:
            times = f"done in {elapsed}"
        elif left is not None:
            times = f"{clock_text(left)} left" if width < NARROW else f"{elapsed}, {clock_text(left)} left"
        head = Text.assemble((f"step {count_text(view.step)}", "bold"), f"/{count_text(view.total_steps)}")
        return bar_line(head, view.step, view.total_steps, Text(times), width)

    def _loss(self, width: int, unicode: bool) -> RenderableType:
        record = self.view.record
        text = labelled("loss", number_text(record.get("loss")), style="bold cyan")
        if record.get("loss_smooth") is not None:
            text.append(f"   smoothed {number_text(record['loss_smooth'])}")
        room = width - text.cell_len - 3
        if unicode and room >= 8:
            text.append("   " + sparkline(self.view.losses, min(room, 48)), style="cyan")
        return text

    def _figures(self, width: int) -> RenderableType:
        record, share = self.view.record, self.view.supervised_share()
        cells = [labelled("rate", number_text(record.get("learning_rate")))]
        if record.get("tokens_per_second") is not None:
            cells.append(labelled("speed", f"{count_text(record['tokens_per_second'])} tokens/s"))
        if share is not None:
            cells.append(labelled("supervised", percent_text(round(share, 2))))
        if record.get("rss_bytes"):
            cells.append(labelled("memory", size_text(record["rss_bytes"])))
        columns = 2 if width < NARROW + 14 else 4
        grid = Table.grid(padding=(0, 3, 0, 0))
        for index in range(0, len(cells), columns):
            grid.add_row(*cells[index : index + columns])
        return grid


def labelled(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label} ", "dim"), (visible(value), style), no_wrap=True, overflow="ellipsis")


def bar_line(head: Text, done: int, total: int, tail: Text, width: int) -> RenderableType:
    """`head`, a bar filled to done/total, the percentage, `tail`, on one line of `width` columns."""
    share = f"{100 * min(done, total) // total if total else 0:3d} %"
    room = width - head.cell_len - tail.cell_len - len(share) - 6
    grid = Table.grid(padding=(0, 2, 0, 0))
    cells: list[RenderableType] = [head]
    if room >= 6:
        cells.append(ProgressBar(total=max(1, total), completed=min(done, total), width=room))
    grid.add_row(*cells, share, tail)
    return grid


def stage_line(stage: Stage, width: int) -> RenderableType:
    """One line for a stage, with a bar where its end is known."""
    head = Text(shortened(stage.name, max(8, width // 2)))
    if stage.total <= 0:
        return Text.assemble(head, ("  working", "dim"))
    return bar_line(head, stage.done, stage.total, Text(stage.counts, style="dim"), width)
