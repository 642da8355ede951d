"""Fifty steps by the fast path lose and learn what the plain path does: Transformers' modules, one example at a time."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny
from tiny_runs import metrics, tiny_config, write_rows

from luthier.models.blocks import without_blocks
from luthier.training.run import train

STEPS = 50
# Shorter than any row: each example is a pack of its own.
ALONE = {"micro_batch_tokens": 8}


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(("family", "method"), [("llama", "lora"), ("gemma3", "lora"), ("qwen3", "qlora")])
def test_loss_by_step_and_held_out_loss(tmp_path: Path, family: str, method: str) -> None:
    """Losses within 1e-4 of each other at each step, the held-out loss within 0.5 %, and both have learnt."""
    model = write_tiny(tmp_path / "model", family)
    held_out = write_rows(tmp_path / "held-out.jsonl", 8, first=30)
    changes = {"steps": STEPS, "save_every": STEPS, "method": method, "eval_data": str(held_out), "max_new_tokens": 1}
    losses, evaluated, shared = {}, {}, {}
    for way in ("fast", "plain"):
        out = tmp_path / way
        with without_blocks() if way == "plain" else nullcontext():
            train(tiny_config(model, tmp_path, **changes, **(ALONE if way == "plain" else {}), out=str(out)))
        steps = of_kind(out, "step")
        losses[way] = [step["loss"] for step in steps]
        shared[way] = sum(step["computed_tokens"] for step in steps) < sum(step["tokens"] for step in steps)
        evaluated[way] = of_kind(out, "eval")[-1]["loss"]
    assert shared == {"fast": True, "plain": False}
    assert len(losses["fast"]) == STEPS
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-4)
    assert evaluated["fast"] == pytest.approx(evaluated["plain"], rel=5e-3)
    assert losses["fast"][-1] < 0.8 * losses["fast"][0]


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if line["kind"] == kind]
