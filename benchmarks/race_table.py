"""Tables of training.py in Markdown, its verdicts and its section of the README. Pure: no torch, nothing measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from race_data import WORKS
from race_figures import CONTENDERS, LUTHIER, NAMES, Figures, State, exactness_of, probed_peak_of

# Speed over the best peer's, and share of the physical limit, that each work is to reach.
TARGETS = {"random": (2.6, 0.70), "snips": (5.0, 0.65), "banking77": (15.0, 0.60), "e2e": (4.0, 0.65)}
QLORA_TARGET, MEMORY_TARGET = 0.97, 1 / 3
LOSS_TARGET, HELD_OUT_TARGET = 1e-4, 0.005
OVERHEAD_TARGET = 0.03
BEGIN, END = "<!-- training benchmark: begin -->", "<!-- training benchmark: end -->"


def summary_table(state: State, figures: Figures) -> str:
    """One row a work: Luthier beside the best peer."""
    head = [
        "work",
        "best peer, tokens/s",
        "LoRA, tokens/s",
        "QLoRA, tokens/s",
        "share of the limit",
        "memory: leanest peer, LoRA, QLoRA",
    ]
    lines = [row_of(head), row_of(["---"] * len(head))]
    for name, found in figures.items():
        contenders, between = found["contenders"], found["compared"]
        if "best_peer" not in between:
            continue
        best, leanest = contenders[between["best_peer"]], contenders[between["leanest_peer"]]
        ours = [contenders.get(one) for one in LUTHIER]
        speeds = [faster(one, between["speed"].get(n)) for one, n in zip(ours, LUTHIER, strict=True)]
        shares = ", ".join(percent(one["share"]) for one in ours if one)
        memory = ", ".join(gigabytes(one["peak_rss_bytes"]) for one in (leanest, *ours) if one)
        peer = f"{best['tokens_per_second']:,.0f} ({NAMES[between['best_peer']]})"
        lines.append(row_of([WORKS[name].title, peer, *speeds, shares, memory]))
    return "\n".join(lines)


def full_table(state: State, figures: Figures) -> str:
    """One row a work and contender."""
    head = [
        "work",
        "contender",
        "tokens/s",
        "over best peer",
        "share of the limit",
        "peak memory",
        "over leanest peer",
        "collator",
    ]
    lines = [row_of(head), row_of(["---"] * len(head))]
    for name, found in figures.items():
        best, leanest = found["compared"].get("best_peer"), found["compared"].get("leanest_peer")
        for one in CONTENDERS:
            figure = found["contenders"].get(one)
            if figure is None:
                lines += [row_of([name, NAMES[one], failure, "", "", "", "", ""]) for failure in failures_of(state, name, one)]
                continue
            speed = figure["tokens_per_second"] / found["contenders"][best]["tokens_per_second"] if best else None
            memory = figure["peak_rss_bytes"] / found["contenders"][leanest]["peak_rss_bytes"] if leanest else None
            cells = [f"{figure['tokens_per_second']:,.0f}", times(speed), percent(figure["share"])]
            cells += [gigabytes(figure["peak_rss_bytes"]), times(memory), figure["collator"] or ""]
            lines.append(row_of([name, NAMES[one], *cells]))
    return "\n".join(lines)


def failures_of(state: State, task: str, contender: str) -> list[str]:
    """What ended the runs of a contender that has no figures, each text once."""
    runs = [run for run in state["runs"].values() if (run["task"], run["contender"]) == (task, contender)]
    return sorted({f"failed: {run['failed']}" for run in runs if "failed" in run})


def verdicts(state: State, figures: Figures) -> list[str]:
    """Each target with what was found, one line each."""
    lines = []
    for name, found in figures.items():
        between, contenders = found["compared"], found["contenders"]
        speed, share = TARGETS[name]
        for one, ratio in between.get("speed", {}).items():
            lines.append(verdict(f"{name}, {NAMES[one]}: speed over the best peer", ratio, speed, ".2f"))
            if contenders[one]["share"] is not None:
                lines.append(verdict(f"{name}, {NAMES[one]}: share of the limit", contenders[one]["share"], share, ".1%"))
            lines.append(verdict(f"{name}, {NAMES[one]}: memory", between["memory"][one], MEMORY_TARGET, ".3f", most=True))
            if (overhead := contenders[one]["overhead"]) is not None:
                what = f"{name}, {NAMES[one]}: packing, clipping and update"
                lines.append(verdict(what, overhead, OVERHEAD_TARGET, ".2%", most=True))
        if "qlora_over_lora" in between:
            lines.append(verdict(f"{name}: QLoRA over LoRA", between["qlora_over_lora"], QLORA_TARGET, ".3f"))
    exact = exactness_of(state)
    if exact:
        lines.append(verdict(f"loss by step, {exact['steps']} steps", exact["largest"], LOSS_TARGET, ".1e", most=True))
        lines.append(verdict("held-out loss after them", exact["held_out_apart"], HELD_OUT_TARGET, ".3%", most=True))
    return lines


def verdict(what: str, found: float, target: float, form: str, *, most: bool = False) -> str:
    reached = found <= target if most else found >= target
    return (
        f"{what}: {found:{form}}, target {'at most' if most else 'at least'} {target:{form}}: {'met' if reached else 'NOT met'}"
    )


def notes_of(state: State, figures: Figures) -> list[str]:
    """What the figures were taken on and how, in sentences. Names no machine but its processor."""
    machine, options = state["machine"], state["options"]
    versions = {**machine["packages"], **machine["peers"]}
    peak = probed_peak_of(state) or machine["fma_flops_per_second"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes"))
    notes = [
        f"{machine['processor']}, {options['threads']} threads, {machine['memory_bytes'] / 1e9:.0f} GB; multiply-add peak "
        f"{peak_text(peak)}, memory read at {read_text(machine['read_bytes_per_second'])}; "
        f"{state['started'][:10]}; {named}; {options['model']}.",
        f"{_rounds(options['rounds'])}, in which every contender ran in a process of its own. Tokens are "
        "those of the rows as the data comes. The limit is 4 flops for each weight and token that must meet, at the "
        "multiply-add peak probed around each step; attention and the low-rank terms are not counted.",
    ]
    for work, stacks in state.get("collators", {}).items():
        chosen = "; ".join(f"{stack} {one['collator']}" for stack, one in stacks.items())
        reasons = " ".join(dict.fromkeys(one["why"] for one in stacks.values()))
        notes.append(f"Collators on {work}: {chosen}. {reasons}")
    computed = {work: found["contenders"].get(LUTHIER[0], {}).get("computed_share") for work, found in figures.items()}
    listed = ", ".join(f"{work} {share:.1%}" for work, share in computed.items() if share is not None)
    if listed:
        notes.append(
            "Share of the rows' tokens that Luthier computed, beginnings that rows share once and nothing behind the last "
            f"target: {listed}."
        )
    spent = {work: found["contenders"].get(LUTHIER[0], {}).get("overhead") for work, found in figures.items()}
    listed = ", ".join(f"{work} {share:.1%}" for work, share in spent.items() if share is not None)
    if listed:
        notes.append(f"Share of Luthier's step spent on packing, clipping and the optimiser: {listed}.")
    apart = [value for found in figures.values() for value in found["compared"].get("first_loss_apart", {}).values()]
    if apart:
        notes.append(f"The first loss of every peer is within {max(apart):.1e} of Luthier's with the same method.")
    exact = exactness_of(state)
    if exact:
        notes.append(
            f"Fast path against Transformers' modules, one example at a time: losses of {exact['steps']} steps of snips at "
            f"most {exact['largest']:.1e} apart; held-out loss {exact['held_out'][0]:.4f} and {exact['held_out'][1]:.4f}."
        )
    return notes


def readme_section(state: State, figures: Figures, images: list[tuple[str, str]]) -> str:
    """What stands between the markers: the table, the pictures as (text, address), every contender folded away, the notes."""
    pictures = [f"![{text}]({address})" for text, address in images]
    details = f"<details><summary>Every contender</summary>\n\n{full_table(state, figures)}\n\n</details>"
    return "\n\n".join([summary_table(state, figures), *pictures, details, *notes_of(state, figures)])


def insert_section(readme: Path, section: str) -> None:
    """Replace what stands between the markers. SystemExit where they are not there, once each and in order."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{readme} must hold the lines {BEGIN} and {END}, once each. Put them where the table is to stand.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")


def row_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def faster(figure: dict[str, Any] | None, ratio: float | None) -> str:
    return "" if figure is None or ratio is None else f"{figure['tokens_per_second']:,.0f} (**{ratio:.1f}x**)"


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def peak_text(flops: float | None) -> str:
    return "not probed" if flops is None else f"{flops / 1e9:,.0f} GFLOP/s"


def read_text(speed: float | None) -> str:
    return "an unknown rate" if speed is None else f"{speed / 1e9:,.0f} GB/s"


def _rounds(rounds: int) -> str:
    return "One round" if rounds == 1 else f"Medians of {rounds} rounds"
