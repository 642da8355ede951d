"""A plan as a table on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from luthier.units import count_text, duration_text, percent_text, size_text, visible

if TYPE_CHECKING:
    from luthier.training.plan import Plan

Row = tuple[str, str, str]


def print_plan(plan: Plan) -> None:
    """The parts of the memory, then time, disk and how steps are cut; the verdict comes last."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for label, value, remark in (*_memory_rows(plan), ("", "", ""), *_other_rows(plan)):
        table.add_row(Text(label), Text(value), Text(visible(remark)))
    console.print(table)
    verdict = "It fits." if plan.fits else f"It does not fit. {plan.advice()}"
    console.print(Text(verdict, style="green" if plan.fits else "red"))


def _memory_rows(plan: Plan) -> list[Row]:
    parts = plan.footprint
    rows = [
        ("program", parts.runtime_bytes, "Python, libraries, tokenizer, data, kernel scratch"),
        ("base weights", parts.base_bytes, f"{count_text(plan.total_parameters)} parameters, stored in {plan.storage}"),
        ("adapter", parts.adapter_bytes, f"{count_text(plan.trainable_parameters)} trainable parameters"),
        ("gradients", parts.gradient_bytes, ""),
        ("optimiser", parts.optimizer_bytes, "two moments"),
        ("activations", parts.activation_bytes, f"packs of up to {plan.micro_batch_tokens} tokens, {_layers_text(plan)}"),
        ("head and loss", parts.head_bytes, "one chunk of logits"),
    ]
    shown = [(label, size_text(size_bytes), remark) for label, size_bytes, remark in rows]
    return [*shown, ("most at once", size_text(plan.peak_bytes), _peak_remark(plan))]


def _layers_text(plan: Plan) -> str:
    kept = plan.layers - plan.frozen_layers - plan.recompute_layers
    text = "all layers kept" if kept == plan.layers else f"{kept} of {plan.layers} layers kept"
    if plan.recompute_layers:
        text += f", {plan.recompute_layers} computed again"
    return text + (f", {plan.frozen_layers} frozen" if plan.frozen_layers else "")


def _peak_remark(plan: Plan) -> str:
    where = "in a step"
    if plan.peak_bytes > plan.footprint.step_bytes:
        where = "while loading" if plan.peak_bytes == plan.footprint.load_bytes else "while the report is written"
        where = "while the terms' start is made" if plan.peak_bytes == plan.footprint.initial_bytes else where
    return f"{where}; {size_text(plan.allowed_bytes)} allowed"


def _other_rows(plan: Plan) -> list[Row]:
    speed = ""
    if plan.peak_flops and plan.efficiency is not None:
        speed = f"{percent_text(round(plan.efficiency, 2))} of this machine's {plan.peak_flops / 1e9:,.0f} GFLOP/s"
    kept = []
    if plan.frozen_cache_bytes:
        remark = f"of that; saves {percent_text(plan.frozen_share)} of a step, made in {duration_text(plan.frozen_seconds)}"
        kept.append(("frozen cache", size_text(plan.frozen_cache_bytes), remark))
    if plan.init != "default":
        kept.append((f"init {plan.init}", duration_text(plan.initial_seconds), "once, before the first step"))
    return [
        ("a step", duration_text(plan.seconds_per_step), f"{count_text(plan.tokens_per_step)} tokens; {speed}".rstrip("; ")),
        ("the run", duration_text(plan.seconds), f"{count_text(plan.total_steps)} steps, without evaluation"),
        ("disk", size_text(plan.disk_bytes), f"{size_text(plan.disk_free_bytes)} free"),
        *kept,
    ]
