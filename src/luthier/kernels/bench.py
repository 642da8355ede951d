"""Each kernel as a share of what the machine can do, measured in the same minute: `luthier doctor --bench`.

The clock of a processor drifts by a fifth within minutes, so a probe of the bound (multiply-adds in registers, bytes read
or copied) runs just before each timing, and a share is the median over such pairs. Ratios to other code alternate likewise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from luthier.kernels import native, probe
from luthier.kernels.bench_cases import (
    Case,
    attention_case,
    elementwise_cases,
    head_case,
    linear_cases,
    quantize_case,
)
from luthier.kernels.memory import keep_freed_memory
from luthier.progress import Progress

COPY_FLOATS = 1 << 24
READ_FLOATS = 1 << 26


class Bounds:
    """The probes, with their buffers."""

    def __init__(self) -> None:
        self._read = torch.ones(READ_FLOATS)
        self._from, self._to = torch.ones(COPY_FLOATS), torch.empty(COPY_FLOATS)

    def now(self, bound: str) -> float:
        """Flops or bytes a second at this moment."""
        if bound == "fma":
            return probe.fma_peak()
        if bound == "read":
            return probe.read_bandwidth(buffer=self._read)
        seconds = _seconds(lambda: self._to.copy_(self._from))
        return 2 * 4 * COPY_FLOATS / seconds


def measure(case: Case, bounds: Bounds, pairs: int) -> dict[str, Any]:
    """One JSON-able row: rate, share of the bound and ratios of rates to the peers, medians of `pairs` alternations."""
    calls = [case.run, *case.peers.values()]
    repeats = [_repeats(call) for call in calls]
    shares, seconds = [], []
    ratios: dict[str, list[float]] = {name: [] for name in case.peers}
    for _ in range(pairs):
        limit = bounds.now(case.bound) if case.bound else None
        own, *others = (_seconds(call, count) for call, count in zip(calls, repeats, strict=True))
        seconds.append(own)
        if limit:
            shares.append(case.work / own / limit)
        for name, other in zip(case.peers, others, strict=True):
            ratios[name].append((case.work / own) / ((case.peer_work or case.work) / other))
    middle = statistics.median(seconds)
    return {
        "op": case.name,
        "shape": case.shape,
        "storage": case.storage,
        "bound": case.bound,
        "seconds": middle,
        "rate": case.work / middle,
        "share": statistics.median(shares) if shares else None,
        "ratios": {name: statistics.median(values) for name, values in ratios.items()},
        "target": case.target,
        "peer_targets": dict(case.peer_targets),
    }


def _seconds(call: Callable[[], object], count: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _repeats(call: Callable[[], object], wanted_seconds: float = 0.01) -> int:
    """Calls that fill about 10 ms; this also warms up."""
    call()
    return max(1, min(1000, int(wanted_seconds / max(1e-7, _seconds(call)))))


def run_cases(
    cases: Sequence[Callable[[], Case]],
    *,
    pairs: int,
    progress: Progress | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """{"bounds": {...}, "rows": [...]} of cases that are built one at a time, so that only one's tensors live.

    `keep` gets each row as soon as it is measured, so that what was found outlives a crash.
    """
    keep_freed_memory()
    bounds = Bounds()
    rows = []
    for index, build in enumerate(cases):
        rows.append(measure(build(), bounds, pairs))
        if keep is not None:
            keep(rows[-1])
        if progress is not None:
            progress("kernels", index + 1, len(cases))
    measured = {name: statistics.median(bounds.now(name) for _ in range(9)) for name in ("fma", "read", "copy")}
    return {"threads": native.threads(), "instruction_set": native.active().instruction_set, "bounds": measured, "rows": rows}


def quick_bench(progress: Progress | None = None) -> dict[str, Any]:
    """The kernels that a training step and an answer spend their time in, in about 20 seconds.

    Returns the JSON-able result of `run_cases`. Raises ConfigError where the native kernels are not in use.
    """
    cases: list[Callable[[], Case]] = []
    for kind in ("f32", "bf16", "nf4", "q4_1", "q8_0", "q4_k"):
        cases += linear_cases(512, 2048, 2048, kind)
    cases += linear_cases(64, 4096, 4096, "nf4", backward=False)
    for kind in ("bf16", "nf4", "q4_k"):
        cases += linear_cases(1, 4096, 4096, kind, backward=False)
    cases += elementwise_cases(2048, 8192)
    cases += [lambda: attention_case((512,)), lambda: attention_case((25,) * 20)]
    cases += [lambda: head_case(256, 49152, 576, "bf16"), lambda: quantize_case(2048, 4096, "NF4")]
    return run_cases(cases, pairs=3, progress=progress)


def as_text(result: dict[str, Any]) -> str:
    """The bounds and a table: a line a row with rate, share, target and ratios."""
    bounds = result["bounds"]
    lines = [
        f"{result['threads']} threads, {result['instruction_set']}: multiply-adds {bounds['fma'] / 1e9:.0f} GFLOP/s, "
        f"read {bounds['read'] / 1e9:.1f} GB/s, copy {bounds['copy'] / 1e9:.1f} GB/s",
        f"{'op':<22}{'shape':<18}{'storage':<9}{'rate':>14}{'share':>8}{'target':>8}  ratio to",
    ]
    return "\n".join(lines + [_line(row) for row in result["rows"]])


def _line(row: dict[str, Any]) -> str:
    unit = "GFLOP/s" if row["bound"] == "fma" else "GB/s"
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    target = row["target"]
    wanted = "" if target is None else f"{target:.0%}" if row["bound"] else f"{target / 1e9:.1f}"
    ratios = ", ".join(
        f"{name} {value:.2f}" + (f" (target {row['peer_targets'][name]:g})" if name in row["peer_targets"] else "")
        for name, value in row["ratios"].items()
    )
    missed = " MISSED" if missed_target(row) else ""
    return (
        f"{row['op']:<22}{row['shape']:<18}{row['storage']:<9}{row['rate'] / 1e9:>7.1f} {unit:<6}{share:>8}{wanted:>8}"
        f"  {ratios}{missed}"
    )


def missed_target(row: dict[str, Any]) -> bool:
    """Whether a share, rate or ratio is below what is asked for."""
    reached = row["share"] if row["bound"] else row["rate"]
    below = row["target"] is not None and reached < row["target"]
    return below or any(row["ratios"].get(name, wanted) < wanted for name, wanted in row["peer_targets"].items())
