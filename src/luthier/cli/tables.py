"""What commands print on stdout when --json is not given: short tables, plain where stdout is not a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.evaluation.measures import COUNTS, TITLES, amount_text, figure_text
from luthier.units import count_text, duration_text, number_text, percent_text, shortened, size_text, visible

if TYPE_CHECKING:
    from luthier.data.check import DataReport
    from luthier.training.result import RunResult

PLAIN_WIDTH = 1000  # nothing is cut or folded where a program may read it
SAMPLE_CHARACTERS = 400


def stdout_console() -> Console:
    """A console on stdout: colours and the terminal's width on a terminal, neither elsewhere."""
    plain = not sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        highlight=False,
        markup=False,
        emoji=False,
        no_color=plain or "NO_COLOR" in os.environ,
        width=PLAIN_WIDTH if plain else None,
        soft_wrap=plain,
    )


def print_run_summary(result: RunResult) -> None:
    """The end of `train` and `resume`: what changed, what it cost, where the files are, and answers before and after."""
    console = stdout_console()
    if result.nothing_to_do:
        console.print(Text("This run was finished before; nothing was done."))
    _print_samples(console, result.samples)
    if result.eval:
        before, after = result.eval.get("before", {}), result.eval.get("after", {})
        console.print(_comparison(("held-out rows", "before", "after"), before, after))
    table = _key_values()
    table.add_row("training loss", f"{number_text(result.loss_first)} first step, {number_text(result.loss_last)} last step")
    table.add_row("steps", _steps_text(result))
    table.add_row("time", f"{duration_text(result.seconds)} in steps, {duration_text(result.total_seconds)} in all")
    table.add_row("speed", f"{result.tokens_per_second:,.0f} tokens a second over {count_text(result.tokens)} tokens")
    table.add_row("peak memory", size_text(result.peak_rss_bytes))
    share = percent_text(result.trainable_parameters / max(1, result.total_parameters))
    table.add_row("trained", f"{count_text(result.trainable_parameters)} parameters, {share} of the model")
    table.add_row("adapter" if result.adapter_dir else "model", visible(result.adapter_dir or result.model_dir or "-"))
    table.add_row("report", visible(result.report))
    console.print(table)


def _steps_text(result: RunResult) -> str:
    skipped = f", {result.skipped_steps} skipped for gradients that were not finite" if result.skipped_steps else ""
    return f"{count_text(result.steps)}{skipped}"


def _print_samples(console: Console, samples: Sequence[Mapping[str, Any]]) -> None:
    for number, sample in enumerate(samples, 1):
        table = _key_values()
        table.add_row(f"sample {number}", shortened(str(sample.get("prompt", "")), SAMPLE_CHARACTERS))
        table.add_row("expected", shortened(str(sample.get("expected", "")), SAMPLE_CHARACTERS))
        for moment in ("before", "after"):
            if sample.get(moment) is not None:
                table.add_row(moment, shortened(str(sample[moment]), SAMPLE_CHARACTERS))
        console.print(table)
        console.print()


def _comparison(titles: tuple[str, str, str], before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """One row a metric: its value on either side, and the difference."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(titles[0])
    for title in (*titles[1:], "change"):
        table.add_column(title, justify="right")
    for name in dict.fromkeys((*before, *after)):
        first, second = before.get(name), after.get(name)
        compared = name not in COUNTS and first is not None and second is not None
        change = amount_text(name, second - first, signed=True) if compared else ""  # type: ignore[operator]
        table.add_row(TITLES.get(name, name), figure_text(name, first), figure_text(name, second), change)
    return table


def print_data_check(report: DataReport) -> None:
    """What is in the file, what is wrong with it, and samples whose supervised tokens are marked.

    On a terminal supervised text is green; elsewhere it stands between [[ and ]].
    """
    console = stdout_console()
    table = _key_values()
    table.add_row("file", visible(report.path))
    table.add_row("form", report.form or "not recognised")
    table.add_row(
        "rows", count_text(report.rows) + (f", {count_text(report.duplicates)} repeated" if report.duplicates else "")
    )
    share = percent_text(report.supervised_tokens / report.tokens) if report.tokens else "0 %"
    table.add_row("tokens", f"{count_text(report.tokens)}, {share} of them supervised")
    table.add_row("longest row", f"{count_text(report.longest)} tokens; at most {count_text(report.max_length)} are trained on")
    bins = ", ".join(f"{count_text(one['rows'])} up to {one['up_to']}" for one in report.lengths)
    table.add_row("lengths", bins or "-")
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {visible(note)}"))
    for sample in report.samples:
        console.print()
        console.print(Text(visible(sample["where"]), style="bold"))
        console.print(_masked(sample["text_parts"], plain=not console.is_terminal))
    if report.problems:
        console.print()
        noun = "problem" if report.problem_count == 1 else "problems"
        console.print(Text(f"{count_text(report.problem_count)} {noun}:", style="bold"))
        for problem in report.problems:
            console.print(Text(f"  - {visible(problem)}"))


def _masked(parts: Sequence[Mapping[str, Any]], *, plain: bool) -> Text:
    text = Text()
    for part in parts:
        shown = visible(str(part["text"]), lines=True)
        if part["supervised"]:
            text.append(f"[[{shown}]]" if plain else shown, style="bold green")
        else:
            text.append(shown, style="dim")
    return text


def print_runs(summaries: Sequence[Mapping[str, Any]], root: Path) -> None:
    """One line a run."""
    console = stdout_console()
    if not summaries:
        console.print(Text(f"no runs in {visible(str(root))}"))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("run", "status", "model", "data", "steps", "loss", "time"):
        table.add_column(title, justify="right" if title in ("steps", "loss", "time") else "left")
    for summary in summaries:
        table.add_row(
            visible(str(summary["run_dir"])),
            str(summary["status"]),
            visible(str(summary.get("model") or "-")),
            visible(Path(str(summary.get("data") or "-")).name),
            count_text(summary.get("steps") or 0),
            number_text(summary.get("loss_last")),
            duration_text(summary.get("seconds") or 0.0),
        )
    console.print(table)


def print_run(summary: Mapping[str, Any]) -> None:
    """One run: how it went, and every setting."""
    console = stdout_console()
    table = _key_values()
    for key in ("run_dir", "status", "started", "model", "data", "method", "steps"):
        table.add_row(key.replace("_", " "), visible(str(summary.get(key) if summary.get(key) is not None else "-")))
    table.add_row("loss last", number_text(summary.get("loss_last")))
    table.add_row("time", duration_text(summary.get("seconds") or 0.0))
    for path in summary.get("checkpoints") or []:
        table.add_row("checkpoint", visible(str(path)))
    console.print(table)
    evaluated = summary.get("eval") or {}
    if evaluated:
        console.print()
        console.print(
            _comparison(("held-out rows", "before", "after"), evaluated.get("before", {}), evaluated.get("after", {}))
        )
    console.print()
    console.print(_settings(summary.get("config") or {}))


def _settings(config: Mapping[str, Any]) -> Table:
    table = _key_values()
    for key, value in config.items():
        table.add_row(key, visible(str("-" if value is None else value)))
    return table


def print_facts(facts: Mapping[str, Any]) -> None:
    """What `doctor` found: one line a fact, nested ones joined, sizes readable."""
    console = stdout_console()
    table = _key_values()
    for key, value in facts.items():
        if key != "problems":
            table.add_row(key.removesuffix("_bytes").replace("_", " "), _fact(key, value))
    console.print(table)
    if not facts.get("problems"):
        console.print(Text("This machine is ready."))


def _fact(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {'-' if inner is None else visible(str(inner))}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(visible(str(inner)) for inner in value) or "-"
    if key.endswith("_bytes"):
        return size_text(value)
    return visible(str(value))


def _key_values() -> Table:
    """Two columns without lines: a name and its value, which wraps."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table
