"""The kernels against the machine's limit, torch and bitsandbytes, with the targets and what was reached.

    python benchmarks/kernels.py [--out kernels.json] [--plot kernels.png] [--pairs N] [--only WORDS] [--smoke]

Shares are of the multiply-add peak (LoRA rank 16 included, its flops counted), of the read bandwidth in stored bytes at one
token, and of the copy bandwidth for element-wise ops; probe and kernel alternate, and a figure is the median of such pairs.
bitsandbytes is compared where it is installed. The plot shows the share of the bound over T for each storage.

A case is called "linear q4_k 512x4096x4096", "head bf16 512x576x49152", "elementwise", "attention 8 of 64", "factors ...",
"bitsandbytes 64" or "quantize NF4"; --only head,f32 runs those whose name has one of the words. One group takes a minute or
two, all of them about half an hour. The file is written after every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# This file must not pass for the package called `kernels`, which transformers looks for when bitsandbytes is imported.
sys.path.remove(str(Path(__file__).resolve().parent))

import torch

from luthier.kernels import bench
from luthier.kernels.bench_cases import (
    LINEAR_TARGETS,
    TARGET_STORAGES,
    Case,
    attention_case,
    elementwise_cases,
    factor_cases,
    head_case,
    linear_cases,
    quantize_case,
)
from luthier.kernels.quantize import GGUF_FORMATS
from luthier.kernels.storage import KINDS
from luthier.training.environment import describe_environment

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BITSANDBYTES_TARGETS = {512: 1.9, 64: 5.0, 1: 30.0}
THREADS_TARGET = 1.85
HEAD_MEMORY_TARGET = 64e6
SUPERBLOCK = 256

Named = tuple[str, Callable[[], Case]]


def main() -> None:
    options = parse_options()
    pairs = 2 if options.smoke else options.pairs
    content: dict[str, Any] = {"benchmark": "kernels", "environment": describe_environment(), "complete": False, "rows": []}

    def keep(row: dict[str, Any]) -> None:
        content["rows"].append(row)
        save(options.out, content)

    cases = chosen(small_cases() if options.smoke else all_cases(), options.only)
    content |= bench.run_cases(cases, pairs=pairs, progress=say, keep=keep)
    print(bench.as_text(content))
    if not options.only:
        content["threads_ratio"] = threads_ratio(pairs, options.smoke)
        print(f"speed of {content['threads']} threads over 1: {content['threads_ratio']:.2f} (target {THREADS_TARGET})")
        if sys.platform == "linux":
            content["head_memory_bytes"] = memory = head_memory(options.smoke)
            print(
                f"extra memory of the head's loss at its peak: {memory / 1e6:.1f} MB (target {HEAD_MEMORY_TARGET / 1e6:.0f} MB)"
            )
    print_targets(content["rows"])
    save(options.out, content)
    if options.plot:
        content["over_tokens"] = over_tokens(pairs, options.smoke)
        plot(content["over_tokens"], options.plot)
    save(options.out, {**content, "complete": True})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--plot", type=Path, help="write the plot of shares over T")
    parser.add_argument("--pairs", type=int, default=9, help="alternations of probe and kernel for each figure")
    parser.add_argument("--only", default="", help="only cases whose name has one of these words, with commas between")
    parser.add_argument("--smoke", action="store_true", help="a few small cases, to see that the script runs")
    return parser.parse_args()


def save(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def say(stage: str, done: int, total: int) -> None:
    print(f"\r{stage} {done}/{total}", end="" if done < total else "\n", flush=True)


def chosen(cases: Sequence[Named], only: str) -> list[Callable[[], Case]]:
    words = [word.strip() for word in only.split(",")]
    found = [case for name, case in cases if any(word in name for word in words)]
    if not found:
        raise SystemExit(f"--only names one of {', '.join(sorted({name for name, _ in cases}))}; got {only!r}.")
    return found


def linears(tokens: int, inputs: int, outputs: int, kind: str) -> list[Named]:
    return [(f"linear {kind} {tokens}x{inputs}x{outputs}", case) for case in linear_cases(tokens, inputs, outputs, kind)]


def small_cases() -> list[Named]:
    cases = [named for tokens in (1, 32) for named in linears(tokens, 256, 512, "nf4")]
    cases += [("factors", case) for case in factor_cases(64, 256, 512)]
    cases += [("elementwise", case) for case in elementwise_cases(256, 512)]
    cases += [("attention", lambda: attention_case((30, 20))), ("head", lambda: head_case(16, 1000, 64, "bf16"))]
    return [*cases, ("quantize", lambda: quantize_case(64, 256, "NF4"))]


def all_cases() -> list[Named]:
    cases: list[Named] = []
    for tokens, inputs, outputs in LINEAR_TARGETS:
        kinds = KINDS if (tokens, inputs, outputs) == (512, 4096, 4096) else TARGET_STORAGES
        # Rows of 576 hold no whole superblocks, so the formats that have them cannot store such a matrix.
        kinds = [kind for kind in kinds if not kind.endswith("_k") or inputs % SUPERBLOCK == 0]
        cases += [named for kind in kinds for named in linears(tokens, inputs, outputs, kind)]
    cases += [named for kind in KINDS for named in linears(1, 4096, 4096, kind)]
    for inputs, outputs in ((4096, 4096), (576, 1536)):
        cases += [(f"factors 512x{inputs}x{outputs}", case) for case in factor_cases(512, inputs, outputs)]
    if importlib.util.find_spec("bitsandbytes") is not None:
        cases += [(f"bitsandbytes {tokens}", case) for tokens in BITSANDBYTES_TARGETS for case in bitsandbytes_cases(tokens)]
    cases += [("elementwise", case) for case in elementwise_cases(2048, 8192)]
    for lengths in ((512,), (1024,), (64,) * 8, (25,) * 20, (12,) * 40):
        cases.append((f"attention {len(lengths)} of {lengths[0]}", lambda lengths=lengths: attention_case(lengths)))
    for kind in ("f32", "bf16", "q8_0"):
        cases.append((f"head {kind} 512x576x49152", lambda kind=kind: head_case(512, 49152, 576, kind)))
    return cases + [(f"quantize {kind}", lambda kind=kind: quantize_case(4096, 4096, kind)) for kind in ("NF4", *GGUF_FORMATS)]


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


# A process of its own; its peak is made to begin anew before the loss, whose gradient to hidden (T, 576) is counted too.
HEAD_MEMORY_SCRIPT = """
import sys, torch
from luthier.kernels.head import linear_cross_entropy
from luthier.kernels.storage import Storage

def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines["VmHWM"].split()[0])

tokens, vocabulary = map(int, sys.argv[1:])
head = Storage.dense(torch.randn(vocabulary, 576).bfloat16())
hidden, targets = torch.randn(tokens, 576, requires_grad=True), torch.randint(0, vocabulary, (tokens,))
linear_cross_entropy(hidden[:8], head, targets[:8])[0].backward()
hidden.grad = None
open("/proc/self/clear_refs", "w").write("5")
before = peak()
linear_cross_entropy(hidden, head, targets)[0].backward()
print(peak() - before)
"""


def head_memory(smoke: bool) -> int:
    """Bytes that the loss of 4096 tokens over 49152 words, backward included, takes beyond what stood before. Linux."""
    sizes = ("64", "1000") if smoke else ("4096", "49152")
    command = [sys.executable, "-c", HEAD_MEMORY_SCRIPT, *sizes]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


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
    for number, kind in enumerate(kind for kind in over if kind != "tokens"):
        shares, style = [100 * share for share in over[kind]], "-" if number < 10 else "--"  # there are ten colours
        axes.plot(over["tokens"], shares, marker="o", markersize=3, linestyle=style, label=kind)
    axes.set_xscale("log", base=2)
    axes.set_xticks(over["tokens"], [str(t) for t in over["tokens"]])
    axes.set_xlabel("tokens T (at T = 1 the share is of read bandwidth, beyond of the multiply-add peak)")
    axes.set_ylabel("share of the bound, %")
    axes.set_ylim(0, 120)
    axes.grid(alpha=0.3)
    axes.legend(ncols=3, fontsize=8)
    axes.set_title("y = x W^T + LoRA, 4096 x 4096, forward")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
