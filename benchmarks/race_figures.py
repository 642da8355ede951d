"""Figures of training.py from what its processes recorded. Pure: no torch, nothing measured."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add
from statistics import median
from typing import Any

from race_data import WORKS, Needed, Weights, attention_flops, useful_flops

LUTHIER = ("luthier-lora", "luthier-qlora")
PEERS = ("trainer-lora", "trainer-qlora", "trl-lora", "trl-qlora")
CONTENDERS = (*LUTHIER, *PEERS)
NAMES = {
    "luthier-lora": "Luthier LoRA",
    "luthier-qlora": "Luthier QLoRA",
    "trainer-lora": "PEFT + Trainer, LoRA",
    "trainer-qlora": "PEFT + Trainer, bitsandbytes QLoRA",
    "trl-lora": "PEFT + TRL, LoRA",
    "trl-qlora": "PEFT + TRL, bitsandbytes QLoRA",
}

State = dict[str, Any]
Figures = dict[str, dict[str, Any]]


def measured_needs(task: dict[str, Any], warmup: int) -> Needed:
    """What the measured batches of a task need, summed; warm-up batches are left out."""
    return reduce(add, (Needed(**batch) for batch in task["batches"][warmup:]))


def runs_of(state: State, task: str, contender: str) -> list[dict[str, Any]]:
    """The finished runs of a contender on a task, one a round."""
    found = [run for run in state["runs"].values() if run["task"] == task and run["contender"] == contender]
    return [run for run in found if "failed" not in run]


def passes_of(runs: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The steps of each pass over the measured batches, of all runs."""
    every: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for number, run in enumerate(runs):
        for step in run["steps"]:
            every.setdefault((number, step["pass"]), []).append(step)
    return list(every.values())


def contender_figures(state: State, task: str, contender: str) -> dict[str, Any] | None:
    """Medians over the passes of all rounds, or None where no run finished.

    tokens_per_second: of the rows as the data comes. share: useful flops over seconds times the multiply-add peak probed
    around each step; None without probes. peak_rss_bytes: the largest of the rounds. first_loss: before any update.
    computed_share: tokens that went through the model over those of the rows; overhead: share of the seconds outside the
    forward and backward passes (packing, clipping, the update). Both None where the contender does not say it.
    """
    runs = runs_of(state, task, contender)
    if not runs:
        return None
    count = measured_needs(state["facts"]["tasks"][task], state["options"]["warmup"])
    flops = useful_flops(Weights(**state["facts"]["weights"]), count)
    passes = passes_of(runs)
    seconds = [sum(step["seconds"] for step in steps) for steps in passes]
    probed = all(step["fma_peak"] for steps in passes for step in steps)
    limits = [sum(step["seconds"] * step["fma_peak"] for step in steps) for steps in passes] if probed else []
    return {
        "seconds": median(seconds),
        "spread": [min(seconds), max(seconds)],
        "passes": len(passes),
        "tokens_per_second": count.tokens / median(seconds),
        "share": median(flops / limit for limit in limits) if probed else None,
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "first_loss": [*runs[0]["warmup"], *runs[0]["steps"]][0]["loss"],
        "computed_share": computed_share(passes[0], count),
        "overhead": overhead(passes),
        "collator": runs[0].get("collator"),
    }


def computed_share(steps: list[dict[str, Any]], count: Needed) -> float | None:
    if not all("computed_tokens" in step for step in steps):
        return None
    return sum(step["computed_tokens"] for step in steps) / count.tokens


def overhead(passes: list[list[dict[str, Any]]]) -> float | None:
    steps = [step for each in passes for step in each]
    if not all("overhead_seconds" in step for step in steps):
        return None
    return sum(step["overhead_seconds"] for step in steps) / sum(step["seconds"] for step in steps)


def figures_of(state: State) -> Figures:
    """For each work the contenders' figures and, with Luthier's LoRA and a peer there, what stands between them."""
    works = [name for name in state["facts"]["tasks"] if name in WORKS]
    result: Figures = {}
    for name in works:
        found = {one: figures for one in CONTENDERS if (figures := contender_figures(state, name, one))}
        result[name] = {"contenders": found, "compared": compared(found)}
    return result


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """best_peer: the fastest of the four, whatever its method; leanest_peer: the one with the least memory.

    speed, memory: of each of ours, over those. qlora_over_lora: speed. first_loss_apart: the largest relative difference
    of a peer's first loss from that of ours with the same method.
    """
    peers = {name: figures for name, figures in found.items() if name in PEERS}
    ours = {name: figures for name, figures in found.items() if name in LUTHIER}
    result: dict[str, Any] = {}
    if peers and ours:
        best = max(peers, key=lambda name: peers[name]["tokens_per_second"])
        leanest = min(peers, key=lambda name: peers[name]["peak_rss_bytes"])
        result = {
            "best_peer": best,
            "leanest_peer": leanest,
            "speed": {n: one["tokens_per_second"] / peers[best]["tokens_per_second"] for n, one in ours.items()},
            "memory": {n: one["peak_rss_bytes"] / peers[leanest]["peak_rss_bytes"] for n, one in ours.items()},
            "first_loss_apart": {n: loss_apart(one, n, ours) for n, one in peers.items() if twin(n) in ours},
        }
    if len(ours) == 2:
        result["qlora_over_lora"] = ours[LUTHIER[1]]["tokens_per_second"] / ours[LUTHIER[0]]["tokens_per_second"]
    return result


def twin(peer: str) -> str:
    """Luthier's contender with the method of a peer."""
    return f"luthier-{peer.rpartition('-')[2]}"


def loss_apart(figures: dict[str, Any], name: str, ours: dict[str, dict[str, Any]]) -> float:
    return abs(figures["first_loss"] / ours[twin(name)]["first_loss"] - 1)


def probed_peak_of(state: State) -> float | None:
    """Median of the multiply-add peaks probed around the race's steps, flops a second; None where none was."""
    runs = [run for run in state["runs"].values() if "failed" not in run]
    peaks = [step["fma_peak"] for run in runs for step in run["steps"] if step["fma_peak"]]
    return median(peaks) if peaks else None


def exactness_of(state: State) -> dict[str, Any] | None:
    """Largest relative difference of the losses by step, and that of the held-out loss; None unless both ways ran."""
    runs = state.get("exactness", {})
    if any(name not in runs or "failed" in runs[name] for name in ("fast", "plain")):
        return None
    fast, plain = ([step["loss"] for step in runs[name]["steps"]] for name in ("fast", "plain"))
    held = [runs[name]["held_out_loss"] for name in ("fast", "plain")]
    return {
        "steps": len(fast),
        "apart": [abs(a / b - 1) for a, b in zip(fast, plain, strict=True)],
        "largest": max(abs(a / b - 1) for a, b in zip(fast, plain, strict=True)),
        "held_out": held,
        "held_out_apart": abs(held[0] / held[1] - 1),
        "speed": sum(s["seconds"] for s in runs["plain"]["steps"]) / sum(s["seconds"] for s in runs["fast"]["steps"]),
    }


def length_points(state: State) -> dict[str, list[dict[str, float]]]:
    """Seconds a token by row length, of each contender that ran, shortest rows first.

    Luthier's points also have attention, the seconds a token of attention alone as measured in the same process, and
    attention_limit, those its flops take at the multiply-add peak.
    """
    shape, warmup = state["facts"]["shape"], state["options"]["warmup"]
    points: dict[str, list[dict[str, float]]] = {}
    for run in state.get("lengths", {}).values():
        if "failed" in run:
            continue
        task = state["facts"]["tasks"][run["task"]]
        tokens = measured_needs(task, warmup).tokens
        each = [sum(step["seconds"] for step in steps) for steps in passes_of([run])]
        length = task["longest"]
        point = {"length": length, "seconds": median(each) / tokens}
        if run.get("attention_seconds") is not None:
            point["attention"] = run["attention_seconds"] / (length * task["batch_size"])
            peaks = [step["fma_peak"] for step in run["steps"] if step["fma_peak"]]
            flops = attention_flops(length, shape["heads"], shape["head_size"], shape["layers"])
            if peaks:
                point["attention_limit"] = flops / length / median(peaks)
        points.setdefault(run["contender"], []).append(point)
    return {name: sorted(each, key=lambda point: point["length"]) for name, each in points.items()}


def without_attention(points: list[dict[str, float]]) -> list[float]:
    """Seconds a token with attention's own taken off: flat where cost grows linearly in tokens."""
    return [point["seconds"] - point["attention"] for point in points]
