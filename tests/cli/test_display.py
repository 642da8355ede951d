"""Progress as it is shown: plain lines where there is no terminal, a panel of the terminal's width where there is one."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from luthier.cli.display import (
    LINES_PER_RUN,
    STAGE_SECONDS,
    PanelListener,
    PlainListener,
    PlainProgress,
    live_display,
    progress_display,
    terminal_console,
)
from luthier.cli.panel import Dashboard, RunView, Stage, metrics_text, sparkline, stage_line
from luthier.training.events import Listener

INFO = {"run_dir": "runs/one", "model": "smollm2-135m", "method": "lora", "total_steps": 200, "trainable_parameters": 4_884_480}
METRICS = {"loss": 0.5121, "perplexity": 1.669, "exact_match": 0.845}
EVALUATION = {"kind": "eval", "step": 100, "rows": 200, "seconds": 3.1, **METRICS}


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "kind": "step", "step": step, "epoch": step / 100, "loss": 2.0 / step, "loss_smooth": 2.1 / step,
        "learning_rate": 0.00132, "grad_norm": 1.0, "tokens": 400, "supervised_tokens": 160, "seconds": 0.5,
        "tokens_per_second": 800.0, "rss_bytes": 1_270_000_000, "skipped": 0, **changed,
    }  # fmt: skip


def play(listener: Listener, clock: Clock, steps: int = 200) -> None:
    """A run of `steps` steps of half a second, evaluated in the middle."""
    listener.stage("loading", 0, 300)
    listener.note("the head is tied to the embedding.\nIt stays so.")
    listener.start({**INFO, "total_steps": steps})
    for step in range(1, steps + 1):
        clock.now += 0.5
        listener.step(record(step))
        if step == steps // 2:
            listener.evaluated({**EVALUATION, "step": step})
    listener.saved("runs/one/checkpoints/step-200")  # type: ignore[arg-type]
    listener.finish(None)  # type: ignore[arg-type]


def rendered(view: RunView, width: int, *, color: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=color, record=True, color_system="truecolor" if color else None,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
    console.print(Dashboard(view))
    return console.export_text(styles=color)


def running_view(clock: Clock, step: int = 50) -> RunView:
    view = RunView(clock)
    view.start(INFO)
    for number in range(1, step + 1):
        clock.now += 0.5
        view.add_step(record(number))
    view.evaluation = EVALUATION
    return view


def test_plain_lines_of_a_whole_run() -> None:
    stream, clock = io.StringIO(), Clock()
    play(PlainListener(stream, clock), clock)
    lines = stream.getvalue().splitlines()
    assert lines[:4] == [
        "loading ...",
        "note: the head is tied to the embedding.",
        "note: It stays so.",
        "training smollm2-135m, lora, 4,884,480 trainable parameters, 200 steps, in runs/one",
    ]
    first = (
        "step 1/200 (0 %)  loss 2.0000  smoothed 2.1000  rate 0.0013  800 tokens/s  supervised 40 %  memory 1.27 GB  1:40 left"
    )
    assert lines[4] == first
    steps = [line for line in lines if line.startswith("step ")]
    assert LINES_PER_RUN <= len(steps) <= LINES_PER_RUN + 1
    assert steps[-1].startswith("step 200/200 (100 %)")
    assert "left" not in steps[-1]
    assert "held out at step 100: loss 0.5121, perplexity 1.6690, exact match 84.5 %" in lines
    assert lines[-2:] == ["saved runs/one/checkpoints/step-200", "done in 1 min 40 s"]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_plain_lines_of_a_slow_run_come_at_least_every_five_minutes() -> None:
    stream, clock = io.StringIO(), Clock()
    listener = PlainListener(stream, clock)
    listener.start({**INFO, "total_steps": 10_000})
    for step in range(1, 11):
        clock.now += 301
        listener.step(record(step))
    assert stream.getvalue().count("step ") == 10


def test_plain_stage_speaks_at_its_start_then_every_few_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, clock)
    for done in range(0, 101):
        clock.now += STAGE_SECONDS / 20
        progress("evaluating", done, 100)
    assert stream.getvalue().splitlines() == [
        "evaluating ...",
        *(f"evaluating: {done} %, {done} of 100" for done in (20, 40, 60, 80, 100)),
    ]


def test_text_of_strangers_cannot_steer_the_terminal() -> None:
    stream = io.StringIO()
    listener = PlainListener(stream)
    listener.note("bad\x1b[2Jname\u202e")
    listener.start({**INFO, "model": "m\x1b]0;title\x07"})
    assert "\x1b" not in stream.getvalue()
    assert "\\x1b[2Jname\\u202e" in stream.getvalue()
    view = running_view(Clock())
    view.info = {**INFO, "model": "m\x1b[31m\rred", "run_dir": "r\x07"}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", rendered(view, 80))


@pytest.mark.parametrize("width", [20, 40, 55, 56, 69, 70, 80, 100, 200])
def test_panel_fits_every_width(width: int) -> None:
    view = running_view(Clock())
    view.stage = Stage("evaluating the held-out rows", 12, 300)
    lines = rendered(view, width).splitlines()
    assert lines
    assert max(map(len, lines)) <= min(width, 100)
    text = "\n".join(lines)
    assert "0.0400" in text if width >= 40 else "loss" in text
    if width >= 80:
        for piece in (
            "step 50/200",
            "25 %",
            "1:15 left",
            "smoothed 0.0420",
            "rate 0.0013",
            "800 tokens/s",
            "supervised 40 %",
            "memory 1.27 GB",
        ):
            assert piece in text
        assert "loss 0.5121, perplexity 1.6690, exact match 84.5 % at step 100" in text
        assert "smollm2-135m" in text
        assert "runs/one" in text
        assert "12 of 300" in text


def test_panel_before_the_run_shows_the_stage_only() -> None:
    view = RunView(Clock())
    assert rendered(view, 80).strip() == ""
    view.stage = Stage("downloading", 40_100_000, 93_200_000)
    assert "downloading" in rendered(view, 80)
    assert "40.1 MB of 93.2 MB" in rendered(view, 80)


def test_panel_of_a_finished_run_says_how_long_it_took() -> None:
    clock = Clock()
    view = running_view(clock, 200)
    view.finished = True
    assert "done in 1:40" in rendered(view, 80)
    assert "100 %" in rendered(view, 80)


def test_time_left_of_a_resumed_run_counts_its_own_steps() -> None:
    clock = Clock()
    view = RunView(clock)
    view.start(INFO)
    for step in (101, 102):
        clock.now += 2.0
        view.add_step(record(step))
    assert view.seconds_left() == pytest.approx(98 * 2.0)


def test_no_color_takes_the_colours_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        stream = Terminal()
        terminal_console(stream).print(Dashboard(running_view(Clock())))
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", shown())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*[349][0-9]m", shown())


@pytest.mark.parametrize(
    ("stream", "term", "plain"), [(io.StringIO, "xterm", True), (Terminal, "dumb", True), (Terminal, "xterm", False)]
)
def test_a_panel_only_on_a_terminal_that_can_redraw(
    monkeypatch: pytest.MonkeyPatch, stream: Callable[[], io.StringIO], term: str, plain: bool
) -> None:
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", term)
    with live_display() as listener:
        assert isinstance(listener, PlainListener if plain else PanelListener)
        play(listener, Clock(), 4)
    assert ("\x1b" in err.getvalue()) is not plain
    assert "smollm2-135m" in err.getvalue()
    # The cursor is never left hidden, whatever ends the process.
    assert err.getvalue().rfind("\x1b[?25l") <= err.getvalue().rfind("\x1b[?25h")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_of_a_stage_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: Callable[[], io.StringIO]
) -> None:
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with progress_display() as progress:
        progress("downloading", 0, 2_000_000)
        progress("downloading", 2_000_000, 2_000_000)
    assert "downloading" in err.getvalue()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("values", "width", "text"),
    [
        ([], 8, ""),
        ([1.0], 0, ""),
        ([2.0], 8, "▁"),
        ([0.0, 7.0], 8, "▁█"),
        ([0.0, float("nan"), 1.0, 2.0], 3, "▁▅█"),
        ([1, 1, 3, 3], 2, "▁█"),
    ],
)
def test_sparkline(values: list[float], width: int, text: str) -> None:
    assert sparkline(values, width) == text


def test_metrics_text_leaves_out_what_is_no_metric() -> None:
    assert metrics_text({**EVALUATION, "tokens": 900}) == "loss 0.5121, perplexity 1.6690, exact match 84.5 %"


def test_stage_of_unknown_length_has_no_bar() -> None:
    console = Console(file=io.StringIO(), width=60, record=True)
    console.print(stage_line(Stage("writing the results", 0, 0), 60))
    assert console.export_text().strip() == "writing the results  working"
