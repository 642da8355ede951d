"""Evaluation on held-out rows before, during and after a run, and the sample answers for the report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from luthier.config import RunConfig
from luthier.data import Dataset, Renderer
from luthier.evaluation.answers import Answer
from luthier.evaluation.evaluate import evaluate
from luthier.training.events import Listener, Record
from luthier.training.interrupts import Interrupts
from luthier.training.rundir import SAMPLES, RunDir
from luthier.training.schedule import is_due

OF_THE_RECORD = ("kind", "step", "rows", "seconds")  # what was added to what `evaluate` gave


@dataclass
class Evaluations:
    """The evaluations of one run. `records` holds those made so far, by step; with no held-out rows none are ever due.

    The first and the last also compare answers with what the rows expect; those in between measure the loss alone.
    All of them use the same rows: the first `eval_rows` of the held-out data, or all.
    """

    run: RunDir
    config: RunConfig
    model: Any
    tokenizer: Any
    renderer: Renderer
    held_out: Dataset | None
    listener: Listener
    interrupts: Interrupts
    records: dict[int, Record] = field(default_factory=dict)

    def evaluate_if_due(self, step: int, total_steps: int) -> None:
        """Evaluate now if that is due at `step` and not done yet. Raises StopRequested when a signal comes meanwhile."""
        if self.held_out is None or step in self.records:
            return
        if step == 0 or is_due(step, total_steps, self.config.eval_every or total_steps):
            self._evaluate(step, with_answers=step in (0, total_steps))

    def result(self, total_steps: int) -> dict[str, dict[str, float]] | None:
        """{"before": metrics, "after": metrics}, or None where there is no evaluation data. "before" is empty where a resumed
        run has lost its record."""
        if self.held_out is None:
            return None
        return {"before": _metrics(self.records.get(0, {})), "after": _metrics(self.records[total_steps])}

    def samples(self) -> list[dict[str, Any]]:
        """What samples.json holds."""
        path = self.run.path / SAMPLES
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return content if isinstance(content, list) else []

    def _evaluate(self, step: int, with_answers: bool) -> None:
        assert self.held_out is not None
        started = time.perf_counter()
        label = "evaluating before training" if step == 0 else "evaluating"

        def progress(_stage: str, done: int, total: int) -> None:
            self.interrupts.check()
            self.listener.stage(label, done, total)

        rows = min(self.config.eval_rows or len(self.held_out.examples), len(self.held_out.examples))
        answerable = any(example.completion is not None for example in self.held_out.examples[:rows])
        metrics = ("loss", "exact") if with_answers and answerable else ("loss",)
        result = evaluate(
            self.model, self.tokenizer, self.held_out, self.renderer,
            metrics=metrics, max_new_tokens=self.config.max_new_tokens, rows=rows, progress=progress,
        )  # fmt: skip
        if step == 0:
            for note in result.notes:
                self.listener.note(f"{note}.")
        if with_answers:
            self._keep_samples(result.answers, "before" if step == 0 else "after")
        seconds = time.perf_counter() - started
        record: Record = {"kind": "eval", "step": step, **result.metrics, "rows": result.rows, "seconds": seconds}
        self.run.append_metrics(record)
        self.records[step] = record
        self.listener.evaluated(record)

    def _keep_samples(self, answers: list[Answer], when: str) -> None:
        """Add the first answers to samples.json under "before" or "after". Written before the evaluation's record is,
        so that a recorded evaluation always has its samples."""
        kept = self.samples()
        samples = []
        for number, answer in enumerate(answers[: self.config.samples]):
            known = kept[number] if number < len(kept) else {"before": None, "after": None}
            samples.append({**known, "prompt": answer.prompt, "expected": answer.expected, when: answer.got})
        self.run.write_json(SAMPLES, samples)


def _metrics(record: Record) -> dict[str, float]:
    return {key: value for key, value in record.items() if key not in OF_THE_RECORD}
