"""The kernels against the machine's limit, torch and bitsandbytes, with the targets and what was reached.

    python benchmarks/kernels.py [--out kernels.json] [--plot kernels.png] [--pairs N] [--only WORD] [--smoke]

Shares are of the multiply-add peak (LoRA rank 16 included, its flops counted), of the read bandwidth in stored bytes at one
token, and of the copy bandwidth for element-wise ops; probe and kernel alternate, and a figure is the median of such pairs.
bitsandbytes is compared where it is installed. The plot shows the share of the bound over T for each storage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from luthier.kernels import bench
from luthier.kernels.bench_cases import (
    LINEAR_TARGETS,
    TARGET_STORAGES,
    Case,
    attention_case,
    elementwise_cases,
    head_case,
    linear_cases,
    quantize_case,
)
from luthier.kernels.quantize import GGUF_FORMATS
from luthier.kernels.storage import KINDS

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BITSANDBYTES_TARGETS = {512: 1.9, 64: 5.0, 1: 30.0}
THREADS_TARGET = 1.85
SUPERBLOCK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="write the plot of shares over T")
    parser.add_argument("--pairs", type=int, default=9, help="alternations of probe and kernel for each figure")
    parser.add_argument("--only", default="", help="only ops whose name has this word")
    parser.add_argument("--smoke", action="store_true", help="a few small cases, to see that the script runs")
    options = parser.parse_args()
    from luthier.training.environment import describe_environment

    pairs = 2 if options.smoke else options.pairs
    result = bench.run_cases(chosen(options.smoke, options.only), pairs=pairs, progress=say)
    result["threads_ratio"] = threads_ratio(pairs, options.smoke)
    print(bench.as_text(result))
    print(f"speed of {result['threads']} threads over 1: {result['threads_ratio']:.2f} (target {THREADS_TARGET})")
    print_targets(result["rows"])
    if options.plot:
        result["over_tokens"] = over_tokens(pairs, options.smoke)
        plot(result["over_tokens"], options.plot)
    if options.out:
        content = {"benchmark": "kernels", "environment": describe_environment(), **result}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def say(stage: str, done: int, total: int) -> None:
    print(f"\r{stage} {done}/{total}", end="" if done < total else "\n", flush=True)


def chosen(smoke: bool, only: str) -> list[Callable[[], Case]]:
    named = [(name, case) for name, case in (small_cases() if smoke else all_cases()) if only in name]
    return [case for _, case in named]


def small_cases() -> list[tuple[str, Callable[[], Case]]]:
    cases = [("linear", case) for tokens in (1, 32) for case in linear_cases(tokens, 256, 512, "nf4")]
    cases += [("elementwise", case) for case in elementwise_cases(256, 512)]
    cases += [("attention", lambda: attention_case((30, 20))), ("head", lambda: head_case(16, 1000, 64, "bf16"))]
    return [*cases, ("quantize", lambda: quantize_case(64, 256, "NF4"))]


def all_cases() -> list[tuple[str, Callable[[], Case]]]:
    cases = []
    for tokens, inputs, outputs in LINEAR_TARGETS:
        kinds = KINDS if (tokens, inputs, outputs) == (512, 4096, 4096) else TARGET_STORAGES
        # Rows of 576 hold no whole superblocks, so the formats that have them cannot store such a matrix.
        kinds = [kind for kind in kinds if not kind.endswith("_k") or inputs % SUPERBLOCK == 0]
        cases += [("linear", case) for kind in kinds for case in linear_cases(tokens, inputs, outputs, kind)]
    cases += [("linear", case) for kind in KINDS for case in linear_cases(1, 4096, 4096, kind)]
    if importlib.util.find_spec("bitsandbytes") is not None:
        cases += [("bitsandbytes", case) for tokens in BITSANDBYTES_TARGETS for case in bitsandbytes_cases(tokens)]
    cases += [("elementwise", case) for case in elementwise_cases(2048, 8192)]
    for lengths in ((512,), (1024,), (64,) * 8, (25,) * 20, (12,) * 40):
        cases.append(("attention", lambda lengths=lengths: attention_case(lengths)))
    cases += [("head", lambda kind=kind: head_case(512, 49152, 576, kind)) for kind in ("f32", "bf16", "q8_0")]
    return cases + [("quantize", lambda kind=kind: quantize_case(4096, 4096, kind)) for kind in ("NF4", *GGUF_FORMATS)]


def bitsandbytes_cases(tokens: int) -> list[Callable[[], Case]]:
    """NF4 4096x4096, ours with the LoRA term of rank 16 and theirs without, forward and the gradient to x."""

    def build(make: Callable[[], Case], turned: bool) -> Case:
        import bitsandbytes as bnb

        case = make()
        weight = torch.randn(4096, 4096) / 64
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        x = torch.randn(tokens, 4096, requires_grad=turned)
        if turned:
            y = bnb.matmul_4bit(x, packed.t(), quant_state=state)
            dy = torch.randn_like(y)
            case.peers = {"bitsandbytes": lambda: torch.autograd.grad(y, x, dy, retain_graph=True)}
        else:
            case.peers = {"bitsandbytes": lambda: bnb.matmul_4bit(x, packed.t(), quant_state=state)}
        case.peer_targets = {"bitsandbytes": BITSANDBYTES_TARGETS[tokens]}
        return case

    makers = linear_cases(tokens, 4096, 4096, "nf4")
    return [lambda make=make, turned=turned: build(make, turned) for make, turned in zip(makers, (False, True), strict=False)]


def threads_ratio(pairs: int, smoke: bool) -> float:
    """The rate with all threads over the rate with one, NF4 forward, medians of alternations."""
    all_threads = torch.get_num_threads()
    case = linear_cases(*((32, 256, 256) if smoke else (512, 4096, 4096)), "nf4")[0]()
    case.peers = {}

    def alone() -> None:
        torch.set_num_threads(1)
        case.run()
        torch.set_num_threads(all_threads)

    single = Case("one thread", case.shape, case.storage, case.work, None, case.run, {"one": alone})
    return bench.measure(single, bench.Bounds(), pairs)["ratios"]["one"]


def print_targets(rows: list[dict[str, Any]]) -> None:
    """For each target: how many of its figures reach it, and the lowest."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["target"] is not None:
            groups.setdefault(f"{row['op']} {row['shape']}", []).append(row)
    print(f"\n{'target':<44}{'asked':>8}{'lowest':>8}{'reached':>9}")
    for name, members in groups.items():
        figures = [row["share"] if row["bound"] else row["rate"] / 1e9 for row in members]
        asked = max(row["target"] if row["bound"] else row["target"] / 1e9 for row in members)
        reached = sum(not bench.missed_target(row) for row in members)
        print(f"{name:<44}{asked:>8.2f}{min(figures):>8.2f}{reached:>5}/{len(members)}")


def over_tokens(pairs: int, smoke: bool) -> dict[str, list[float]]:
    """The share of the bound, the smaller of arithmetic and reading, at each of TOKENS for each storage."""
    tokens, size = ((1, 4, 32), 256) if smoke else (TOKENS, 4096)
    shares: dict[str, list[float]] = {}
    for kind in KINDS:
        cases = [linear_cases(t, size, size, kind, backward=False)[0] for t in tokens]
        rows = bench.run_cases(cases, pairs=min(3, pairs))["rows"]
        shares[kind] = [row["share"] for row in rows]
        say(f"over T, {kind}", 1, 1)
    return {"tokens": list(tokens), **shares}


def plot(over: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    for kind, shares in over.items():
        if kind != "tokens":
            axes.plot(over["tokens"], [100 * share for share in shares], marker="o", markersize=3, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks(over["tokens"], [str(t) for t in over["tokens"]])
    axes.set_xlabel("tokens T (at T = 1 the share is of read bandwidth, beyond of the multiply-add peak)")
    axes.set_ylabel("share of the bound, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8)
    axes.set_title("y = x W^T + LoRA, 4096 x 4096, forward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
