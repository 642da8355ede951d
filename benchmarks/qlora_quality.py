"""What 4 bits cost: perplexity of a model in each 4-bit format, and held-out loss after tuning on a full or a 4-bit base.

    python benchmarks/qlora_quality.py --text FILE [--model M] [--out quality.json]
    python benchmarks/qlora_quality.py --train A.jsonl B.jsonl --valid A.jsonl B.jsonl [--seeds 3] [--steps N] [--runs DIR]

Perplexity: linear layers but the head are rounded to the format, all else stays; windows of the text do not overlap and every
token but a window's first counts. Against bf16 the mean difference of the loss is given with its 95 % interval over windows
(bootstrap, paired). Int4 and FP4 are round trips through their tables with scales in float32; NF4 is the stored matrix.
Tuning: full, LoRA and QLoRA with one data set, length and seed after the other, each run in a process of its own; a full
run has a tenth of the learning rate. Means are over seeds, intervals are Student's at 95 %. --runs keeps the run folders, as
DATA-METHOD-SEED, and takes the loss of one that is there already and was made with the same settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import STUDENT_95, describe_machine, mean_with_interval, run_part, write_json

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

FORMATS = ("bf16", "int4", "fp4", "nf4", "nf4 double")
METHODS = ("full", "lora", "qlora")
RESAMPLES = 10_000
WITHIN = 1.01


def main() -> None:
    options = parse()
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
        return
    result: dict[str, Any] = {"benchmark": "qlora_quality", "machine": describe_machine(), "model": options.model}
    if options.text:
        shared = ["--text", str(options.text), "--model", options.model, "--windows", str(options.windows)]
        shared += ["--window", str(options.window)]
        losses = {name: run_part(__file__, "perplexity", [*shared, "--format", name])["losses"] for name in FORMATS}
        result["perplexity"] = compare_formats(losses, options.bootstrap_seed)
        print_formats(result["perplexity"])
    if options.train:
        result["tuning"] = [tune(train, valid, options) for train, valid in zip(options.train, options.valid, strict=True)]
        print_tuning(result["tuning"])
    if options.out:
        write_json(options.out, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="plain text for the perplexities")
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=128, help="at most so many windows")
    parser.add_argument("--train", type=Path, nargs="*", default=[], help="data sets to tune on")
    parser.add_argument("--valid", type=Path, nargs="*", default=[], help="held-out rows of each, in the same order")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, 2 to 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--runs", type=Path, help="keep the run folders here")
    parser.add_argument("--bootstrap-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.part and not options.text and not options.train:
        parser.error("give --text, --train and --valid, or all three")
    if len(options.train) != len(options.valid):
        parser.error("--train and --valid go in pairs")
    if options.seeds not in STUDENT_95:
        parser.error("--seeds is between 2 and 8")
    return options


def perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """The mean loss of each window, in nats a token, of the model in one format."""
    import torch

    from luthier.evaluation.loss import supervised_loss
    from luthier.models.load import load

    model, tokenizer = load(options.model, base="f32")
    round_linear(model, options.format)
    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    losses = []
    with torch.no_grad():
        for pack in itertools.islice(windows(ids, options.window), options.windows):
            losses.append(float(supervised_loss(model, pack)) / pack.supervised_tokens)
    return {"losses": losses}


def windows(ids: Any, length: int) -> Iterator[Any]:
    """Whole windows of the text, each a document of its own."""
    import torch

    from luthier.data.packing import Pack

    for start in range(0, len(ids) - length + 1, length):
        own = ids[start : start + length]
        yield Pack.of_texts(own, torch.tensor([0, length]), torch.arange(length - 1))


def round_linear(model: Any, name: str) -> None:
    """Put every linear layer but the head into the format, one at a time."""
    import torch

    from luthier.adapters.targets import all_linear
    from luthier.matrices import DenseMatrix, NF4Matrix
    from luthier.matrices.references import round_trip

    for path in all_linear(model):
        layer = model.get_submodule(path)
        weight = layer.matrix.dequantize()
        if name == "bf16":
            layer.matrix = DenseMatrix(weight.to(torch.bfloat16))
        elif name.startswith("nf4"):
            layer.matrix = NF4Matrix.quantize(weight, double=name == "nf4 double")
        else:
            layer.matrix = DenseMatrix(round_trip(weight, name))


def compare_formats(losses: dict[str, list[float]], seed: int) -> dict[str, Any]:
    """Perplexity of each format, and how much its loss is above bf16's, with an interval."""
    rows = {}
    for name in FORMATS:
        above = [one - base for one, base in zip(losses[name], losses["bf16"], strict=True)]
        low, high = bootstrap(above, seed)
        mean = statistics.fmean(losses[name])
        rows[name] = {
            "perplexity": math.exp(mean),
            "loss": mean,
            "above_bf16": statistics.fmean(above),
            "interval": [low, high],
        }
    gap = [two - one for one, two in zip(losses["nf4"], losses["nf4 double"], strict=True)]
    order = rows["int4"]["perplexity"] > rows["fp4"]["perplexity"] > rows["nf4"]["perplexity"]
    return {"windows": len(losses["bf16"]), "formats": rows, "order_holds": order, "double_over_nf4": bootstrap(gap, seed)}


def bootstrap(differences: list[float], seed: int) -> list[float]:
    """The 95 % interval of the mean by resampling."""
    import numpy as np

    generator = np.random.default_rng(seed)
    values = np.array(differences)
    means = values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    return [float(edge) for edge in np.quantile(means, (0.025, 0.975))]


def tune(train: Path, valid: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of each method after the same steps on the same rows, over the seeds."""
    methods = {method: [tuned_loss(train, valid, method, seed, options) for seed in range(options.seeds)] for method in METHODS}
    summary = {method: {"losses": losses, **mean_with_interval(losses)} for method, losses in methods.items()}
    means = {method: summary[method]["mean"] for method in METHODS}
    return {
        "train": f"{train.parent.name}/{train.name}",
        "steps": options.steps,
        "methods": summary,
        "qlora_over_lora": ratio(methods["qlora"], methods["lora"]),
        "lora_over_full": ratio(methods["lora"], methods["full"]),
        "holds": means["qlora"] <= WITHIN * means["lora"] and means["lora"] <= WITHIN * means["full"],
    }


def tuned_loss(train: Path, valid: Path, method: str, seed: int, options: argparse.Namespace) -> float:
    with tempfile.TemporaryDirectory() as work:
        kept = options.runs and options.runs.resolve() / f"{train.parent.name}-{method}-{seed}"
        config = {
            "data": str(train.resolve()), "eval_data": str(valid.resolve()), "model": options.model, "method": method,
            "seed": seed, "steps": options.steps, "batch_size": options.batch, "eval_rows": options.eval_rows,
            "eval_every": options.steps, "save_every": options.steps, "keep_checkpoints": 1, "samples": 0,
            "out": str(kept or Path(work) / "run"),
        }  # fmt: skip
        path = Path(work) / "config.json"
        write_json(path, config)
        loss = (kept and kept_loss(kept, config)) or float(run_part(__file__, "tuning", ["--config", str(path)])["loss"])
        if kept:
            write_json(kept.with_suffix(".json"), {"config": config, "loss": loss})
    print(f"{train.parent.name}/{train.name}: {method}, seed {seed}: held-out loss {loss:.4f}", flush=True)
    return loss


def kept_loss(run: Path, config: dict[str, Any]) -> float | None:
    """The loss written beside a run folder; an error where the folder was made with other settings."""
    record = run.with_suffix(".json")
    if not record.is_file():
        return None
    before = json.loads(record.read_text(encoding="utf-8"))
    if before["config"] != config:
        raise SystemExit(f"{run} was made with other settings; name another folder with --runs.")
    return float(before["loss"])


def tuning(options: argparse.Namespace) -> dict[str, Any]:
    from luthier.config import make_config
    from luthier.training.run import train

    result = train(make_config(json.loads(options.config.read_text(encoding="utf-8"))))
    assert result.eval is not None
    return {"loss": result.eval["after"]["loss"]}


def ratio(one: list[float], other: list[float]) -> dict[str, Any]:
    """Of the losses of one method to the other's, seed by seed."""
    return mean_with_interval([a / b for a, b in zip(one, other, strict=True)])


def print_formats(result: dict[str, Any]) -> None:
    print(f"{'format':12}{'perplexity':>12}{'loss above bf16':>18}   95 % interval")
    for name, row in result["formats"].items():
        print(f"{name:12}{row['perplexity']:12.3f}{row['above_bf16']:18.4f}   {spread(row['interval'], 4)}")
    print(
        f"int4 > fp4 > nf4: {'yes' if result['order_holds'] else 'no'}; double over nf4: {spread(result['double_over_nf4'], 5)}"
    )


def print_tuning(results: Iterable[dict[str, Any]]) -> None:
    for result in results:
        for method, row in result["methods"].items():
            print(f"{result['train']:24}{method:8}{row['mean']:10.4f}   {spread(row['interval'], 4)}")
        for key in ("qlora_over_lora", "lora_over_full"):
            print(f"{'':24}{key}: {result[key]['mean']:.4f}   {spread(result[key]['interval'], 4)} (target at most {WITHIN})")


def spread(edges: list[float], digits: int) -> str:
    return f"[{edges[0]:.{digits}f}, {edges[1]:.{digits}f}]"


PARTS = {"perplexity": perplexity, "tuning": tuning}

if __name__ == "__main__":
    main()
