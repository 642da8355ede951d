"""The plan of a run against the run itself: peak memory within 10 %, seconds a step within 20 %, on 8 configurations.

    python benchmarks/plan.py [--out plan.json] [--steps N] [--batch-size N] [--smoke]

Two models (SmolLM2-135M, and a random one of Qwen3's shape with 0.33 billion parameters, written into a temporary folder),
three storages, with everything kept and with all layers recomputed. Each configuration runs in a process of its own, so
that the most memory it ever held, VmHWM, is the run's. Measured seconds are the median of the steps after the first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import WORDS

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

MEMORY_TOLERANCE, TIME_TOLERANCE = 0.10, 0.20
CASES = (
    {"base": "f32"},
    {"base": "bf16"},
    {"method": "qlora"},
    {"method": "qlora", "recompute_layers": "all"},
)
SMOKE_CASES = ({"method": "qlora"}, {"base": "bf16", "recompute_layers": "all"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--words", type=int, default=420, help="words in a row, about a token each")
    parser.add_argument("--smoke", action="store_true", help="two configurations of the small model, short rows")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one)))
        return
    if options.smoke:
        options.words, options.steps = 60, 3
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(Path(folder), options)
    from luthier.training.environment import describe_environment

    print_table(rows)
    if options.out:
        content = {"benchmark": "plan", "environment": describe_environment(), "rows": rows}
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def measure_all(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    data = write_rows(folder / "rows.jsonl", options.words)
    models = {"SmolLM2-135M": ("smollm2-135m", 30)}
    if not options.smoke:
        models["random Qwen3, 0.33B"] = (str(write_model(folder / "qwen3")), QWEN3["num_hidden_layers"])
    rows = []
    for name, (model, layers) in models.items():
        for case in SMOKE_CASES if options.smoke else CASES:
            keys: dict[str, Any] = {"data": str(data), "model": model, "offline": True, **case}
            keys |= {
                "batch_size": options.batch_size,
                "steps": options.steps,
                "out": str(folder / f"run-{len(rows)}"),
                "micro_batch_tokens": 2048,
            }
            keys["recompute_layers"] = layers if case.get("recompute_layers") else 0
            command = [sys.executable, __file__, "--one", json.dumps(keys)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"model": name, **case, **json.loads(output.splitlines()[-1])})
            print(f"{len(rows)} done: {name} {case}", file=sys.stderr, flush=True)
    return rows


def run_one(keys: dict[str, Any]) -> dict[str, Any]:
    """One run: what its plan said and what it took."""
    from luthier.config import make_config
    from luthier.training.memory import peak_rss_bytes
    from luthier.training.run import train

    train(make_config(keys))
    peak = peak_rss_bytes()
    plan = json.loads((Path(keys["out"]) / "plan.json").read_text(encoding="utf-8"))
    lines = (Path(keys["out"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines][1:]
    return {
        "planned_bytes": plan["peak_bytes"],
        "measured_bytes": peak,
        "planned_seconds": plan["seconds_per_step"],
        "measured_seconds": statistics.median(seconds),
        "tokens_per_step": plan["tokens_per_step"],
        "efficiency": plan["efficiency"],
        "footprint": plan["footprint"],
    }


QWEN3 = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True, "vocab_size": 49152,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def write_model(folder: Path) -> Path:
    """A random model in bfloat16 with SmolLM2's tokenizer, as a Transformers folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from luthier.models.load import load_tokenizer

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **QWEN3)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer("smollm2-135m").save_pretrained(folder)
    return folder


def write_rows(path: Path, words: int) -> Path:
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(64):
            question, answer = (" ".join(generator.choices(WORDS.split(), k=words // 2)) for _ in range(2))
            row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            file.write(json.dumps(row) + "\n")
    return path


def print_table(rows: list[dict[str, Any]]) -> None:
    memory, step = (f"{name + ': planned':>16}{'measured':>10}{'off':>9}" for name in ("memory", "step"))
    print(f"{'model':22}{'storage':10}{'layers':12}{memory}{step}")
    for row in rows:
        memory, time = row["planned_bytes"] / row["measured_bytes"] - 1, row["planned_seconds"] / row["measured_seconds"] - 1
        marks = ("" if abs(memory) <= MEMORY_TOLERANCE else " !", "" if abs(time) <= TIME_TOLERANCE else " !")
        print(
            f"{row['model']:22}{row.get('base') or 'nf4':10}{'recomputed' if row.get('recompute_layers') else 'kept':14}"
            f"{row['planned_bytes'] / 1e6:13.0f} MB{row['measured_bytes'] / 1e6:7.0f} MB{memory:+8.1%}{marks[0]}"
            f"{row['planned_seconds']:13.2f} s{row['measured_seconds']:8.2f} s{time:+8.1%}{marks[1]}"
        )


if __name__ == "__main__":
    main()
