"""QLoRA beside LoRA on float32 weights, and in the memory it is allowed: seconds a step and peak memory of whole runs.

    python benchmarks/qlora.py [--steps N] [--rounds N] [--out qlora.json]

SmolLM2-135M, rank 16 on all linear layers, two rows of 512 random words' tokens a step, every token supervised. Each run is
`luthier train`'s own, in a process of its own, so that VmHWM is the run's. LoRA and QLoRA take turns, `rounds` times, both in
packs of 512 tokens; the ratio is of median steps, the first of each run left out. Then QLoRA runs twice more, once allowed
1.2 GB, which must need no recomputation, and once 750 MB.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import WORDS, describe_machine, peak_rss_bytes, run_part, write_json

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

TOKENS, ROWS = 512, 64
LEAST_RATIO = 0.97
ALLOWED = {"1.2GB": 1.2e9, "750MB": 750e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_one(json.loads(options.part))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure_all(Path(folder), options)
    show(result)
    if options.out:
        write_json(options.out, {"benchmark": "qlora", "machine": describe_machine(), **result})


def measure_all(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    rows = write_rows(folder / "rows.jsonl")
    number = iter(range(1000))

    def run(**settings: Any) -> dict[str, Any]:
        keys = {
            "data": str(rows), "model": "smollm2-135m", "max_length": TOKENS, "on_long": "truncate", "batch_size": 2,
            "steps": options.steps, "rank": 16, "data_cache": False, "out": str(folder / f"run-{next(number)}"),
        }  # fmt: skip
        return run_part(__file__, json.dumps(keys | settings), [])

    sides: dict[str, list[dict[str, Any]]] = {"lora": [], "qlora": []}
    for _ in range(options.rounds):
        sides["lora"].append(run(method="lora", base="f32", micro_batch_tokens=TOKENS))
        sides["qlora"].append(run(method="qlora", micro_batch_tokens=TOKENS))
    seconds = {name: statistics.median(one for part in parts for one in part["seconds"]) for name, parts in sides.items()}
    return {
        "seconds_per_step": seconds,
        "speed_ratio": seconds["lora"] / seconds["qlora"],
        "sides": sides,
        "allowed": {size: run(method="qlora", memory=size) for size in ALLOWED},
    }


def run_one(keys: dict[str, Any]) -> dict[str, Any]:
    """One run: seconds of its steps after the first, the most memory it held, and how it was cut."""
    from luthier.config import make_config
    from luthier.training.run import train

    train(make_config(keys))
    peak = peak_rss_bytes()
    out = Path(keys["out"])
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds": [line["seconds"] for line in lines][1:],
        "losses": [line["loss"] for line in lines],
        **{key: plan[key] for key in ("micro_batch_tokens", "recompute_layers", "layers", "tokens_per_step")},
        "measured_bytes": peak,
    }


def write_rows(path: Path) -> Path:
    """Rows of plain text, a little longer than they are cut to, so that every one has exactly as many tokens."""
    generator = random.Random(0)
    lines = (json.dumps({"text": " ".join(generator.choices(WORDS.split(), k=TOKENS))}) for _ in range(ROWS))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def show(result: dict[str, Any]) -> None:
    for name, parts in result["sides"].items():
        peak = max(part["measured_bytes"] for part in parts)
        print(f"{name:6}{result['seconds_per_step'][name]:8.2f} s a step, {peak / 1e6:.0f} MB at the peak")
    print(f"qlora is {result['speed_ratio']:.3f} times as fast as lora (target at least {LEAST_RATIO})")
    for size, row in result["allowed"].items():
        mark = "" if row["measured_bytes"] <= ALLOWED[size] else " !"
        print(
            f"allowed {size}: {row['measured_bytes'] / 1e6:.0f} MB{mark}, {statistics.median(row['seconds']):.2f} s a step, "
            f"packs of {row['micro_batch_tokens']} tokens, {row['recompute_layers']} of {row['layers']} layers recomputed"
        )


if __name__ == "__main__":
    main()
