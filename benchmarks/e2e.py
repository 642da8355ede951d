"""BLEU of tuned runs on rows with several references, and how the methods compare over their seeds.

    python benchmarks/e2e.py RUN [RUN ...] --data valid.jsonl [--rows N] [--out e2e.json]

Each run is measured as `luthier eval RUN --data FILE --metrics loss,bleu` does: greedy answers, sacrebleu's corpus BLEU against
the `references` of each row, and the 95 % interval over rows (bootstrap). Runs of one method are its seeds, as their
configurations say: their mean has Student's 95 % interval, and so has the mean of the differences, seed by seed, of LoRA over
full tuning and of QLoRA over LoRA. The JSON file is written after each run; what it has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import describe_machine, mean_with_interval, write_json

# Libraries look for packages called as scripts in this folder are.
sys.path.remove(str(Path(__file__).resolve().parent))

PAIRS = (("lora", "full"), ("qlora", "lora"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="finished runs")
    parser.add_argument("--data", required=True, help="held-out rows with references")
    parser.add_argument("--rows", type=int, help="only the first rows")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--out", type=Path, help="write the result as JSON, and go on from it")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "e2e", "runs": {}}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text(encoding="utf-8"))
    result |= {"machine": describe_machine(), "data": Path(options.data).name}
    for run in options.runs:
        name = Path(run).name
        if name not in result["runs"]:
            result["runs"][name] = measure(run, options)
            print(f"{name}: BLEU {result['runs'][name]['bleu']:.2f}", file=sys.stderr, flush=True)
        if options.out:
            write_json(options.out, result)
    result["methods"] = by_method(list(result["runs"].values()))
    if options.out:
        write_json(options.out, result)
    print(table(result))


def measure(run: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run's figures, through what `luthier eval` does."""
    from luthier.cli.compare import Request, compare
    from luthier.config import make_config
    from luthier.training.rundir import read_config

    config = make_config(read_config(Path(run)))
    request = Request(
        run, None, None, vs_base=False, storage=None, data=[options.data], guards=[], metrics=("loss", "bleu"), labels=None,
        json_schema=None, max_length=1024, on_long="error", data_cache=False,
        max_new_tokens=options.max_new_tokens, rows=options.rows, offline=True,
    )  # fmt: skip
    found = compare(request, lambda stage, done, total: None)
    (report,) = found.reports
    return {
        "method": config.method, "seed": config.seed, "rows": report.tuned.rows, "bleu": report.tuned.metrics["bleu"],
        "bleu_interval": list(report.intervals["bleu"]), "loss": report.tuned.metrics["loss"], "notes": report.notes,
        "steps": config.steps, "learning_rate": config.learning_rate,
    }  # fmt: skip


def by_method(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and of the differences of the pairs over the seeds that both have."""
    scores: dict[str, dict[int, float]] = {}
    for run in runs:
        scores.setdefault(run["method"], {})[run["seed"]] = run["bleu"]
    found: dict[str, Any] = {method: spread(list(own.values())) for method, own in scores.items()}
    for one, other in PAIRS:
        seeds = sorted(scores.get(one, {}).keys() & scores.get(other, {}).keys())
        if seeds:
            found[f"{one} over {other}"] = spread([scores[one][seed] - scores[other][seed] for seed in seeds])
    return found


def spread(values: list[float]) -> dict[str, Any]:
    return {"values": values, **mean_with_interval(values)}


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a run, then a line a method and pair."""
    lines = ["| run | method | seed | rows | BLEU | 95 % over rows | loss |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for name, run in result["runs"].items():
        low, high = run["bleu_interval"]
        lines.append(
            f"| {name} | {run['method']} | {run['seed']} | {run['rows']} | {run['bleu']:.2f} | {low:.2f} to {high:.2f} | "
            f"{run['loss']:.4f} |"
        )
    lines += ["", "| over seeds | seeds | BLEU | 95 % over seeds |", "| --- | --- | --- | --- |"]
    for name, row in result["methods"].items():
        edges = "" if row["interval"] is None else f"{row['interval'][0]:.2f} to {row['interval'][1]:.2f}"
        lines.append(f"| {name} | {len(row['values'])} | {row['mean']:.2f} | {edges} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
