"""What `luthier data check` finds out: everything wrong with a file, its lengths, and samples with the mask."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.data.example import Example
from luthier.data.load import Lengths, fit, length_problems, render_source
from luthier.data.problems import Problems
from luthier.data.read import open_source
from luthier.data.render import Renderer
from luthier.errors import DataError


@dataclass
class DataReport:
    """All that is known about a file of rows; every field is plain JSON.

    problems: what training would refuse, with file and line, the first 1000 of problem_count.
    notes: what it would not, but a person should know.
    samples: {"where", "prompt", "completion", "text_parts": [{"text", "supervised"}],
    "tokens": [{"id", "text", "supervised"}]}.
    lengths: rows by tokens, {"up_to": n, "rows": count} for doubling n. duplicates: rows that ask what an earlier one asks.
    """

    path: str
    form: str = ""
    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    duplicates: int = 0
    max_length: int = 0
    lengths: list[dict[str, int]] = field(default_factory=list)
    problem_count: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def check_data(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    samples: int,
    loss_on: str = "assistant",
    offline: bool = False,
) -> DataReport:
    """Read and render the whole file and report; problems are listed in the report, never raised.

    Rows longer than max_length count as a problem, as they do in training by default. samples: how many rows to show.
    """
    report = DataReport(data, max_length=max_length)
    problems, lengths = Problems(), Lengths()
    sizes: Counter[int] = Counter()
    keys: set[str] = set()
    try:
        renderer = Renderer(tokenizer, max_length=max_length, loss_on="all" if loss_on == "all" else "assistant")
        for form, batch in render_source(open_source(data, offline=offline), renderer, problems, lengths):
            report.form = form
            for example in batch:
                _count(example, report, sizes, keys)
                if len(report.samples) < samples:
                    report.samples.append(show_example(example, tokenizer))
                fit(example, max_length, "error", lengths)
    except DataError as error:
        problems.add("", str(error))
    kept = sum(sizes.values()) - lengths.dropped
    for problem in length_problems(data, lengths, max_length, "error", kept=kept, damaged=problems.count > 0):
        problems.add("", problem)
    if lengths.unsupervised:
        problems.note(f"{len(lengths.unsupervised)} rows have nothing to learn, first {lengths.unsupervised[0]}", "")
    report.rows, report.longest = lengths.rows, lengths.longest
    report.lengths = _histogram(sizes)
    report.problem_count, report.problems, report.notes = problems.count, problems.listed(), problems.notes()
    return report


def _count(example: Example, report: DataReport, sizes: Counter[int], keys: set[str]) -> None:
    sizes[len(example.ids)] += 1
    report.tokens += len(example.ids)
    report.supervised_tokens += sum(example.supervised)
    report.duplicates += example.key in keys
    keys.add(example.key)


def _histogram(sizes: Counter[int]) -> list[dict[str, int]]:
    """Rows by length, in bins that end at 16, 32, 64, ... tokens; empty bins at either end are left out."""
    bins: list[dict[str, int]] = []
    lower, upper, longest = 0, 16, max(sizes, default=0)
    while lower < longest:
        count = sum(number for size, number in sizes.items() if lower < size <= upper)
        if count or bins:
            bins.append({"up_to": upper, "rows": count})
        lower, upper = upper, upper * 2
    return bins


def show_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """An example for people: its text in parts, supervised or not, and every token with its mask."""
    parts: list[dict[str, Any]] = []
    start = 0
    for place in range(1, len(example.ids) + 1):
        if place == len(example.ids) or example.supervised[place] != example.supervised[start]:
            parts.append({"text": tokenizer.decode(example.ids[start:place]), "supervised": example.supervised[start]})
            start = place
    tokens = [
        {"id": token, "text": tokenizer.decode([token]), "supervised": supervised}
        for token, supervised in zip(example.ids, example.supervised, strict=True)
    ]
    return {
        "where": example.where,
        "prompt": example.prompt,
        "completion": example.completion,
        "text_parts": parts,
        "tokens": tokens,
    }
