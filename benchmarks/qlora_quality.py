"""What 4 bits cost: perplexity of a model in each 4-bit format, and held-out loss after tuning on a full or a 4-bit base.

    python benchmarks/qlora_quality.py --text FILE [--blur] [--model M] [--out quality.json]
    python benchmarks/qlora_quality.py --errors [--model M]
    python benchmarks/qlora_quality.py --train A.jsonl B.jsonl --valid A.jsonl B.jsonl [--seeds 3] [--steps N] [--runs DIR]

Perplexity: linear layers but the head are rounded to the format, all else stays; windows of the text do not overlap and every
token but a window's first counts. Against bf16 the mean difference of the loss is given with its 95 % interval over windows
(bootstrap, paired). Int4, FP4 (bitsandbytes' table) and E2M1 (the float of QLoRA's table 2) are round trips through their
tables with scales in float32; NF4 is the stored matrix.
--blur takes a model off the grid it came on: every weight of a linear layer moves by up to a thirtieth of the span of its 32.
Errors: mean (w - q)^2 over mean w^2 of each table, for normal and Laplace numbers and for the model's linear layers, as they
are and blurred.
Tuning: full, LoRA and QLoRA with one data set, length and seed after the other, each run in a process of its own; a full
run has a tenth of the learning rate. Means are over seeds, intervals are Student's at 95 %. --runs keeps the run folders, as
DATA-METHOD-SEED, and takes the loss of one that is there already and was made with the same settings. --methods may name an
initialisation behind a plus sign, as in `full,lora,qlora,qlora+qera`; full, lora and qlora are always among them.
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

FORMATS = ("bf16", "int4", "fp4", "e2m1", "nf4", "nf4 double")
METHODS = ("full", "lora", "qlora")
TABLES = ("int4", "fp4", "e2m1", "nf4")
GROUP = 32  # weights whose span is cut into steps, as Q4_1 does
DRAWN = 1 << 22
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
        shared += ["--window", str(options.window), *(["--blur"] if options.blur else [])]
        losses = {name: run_part(__file__, "perplexity", [*shared, "--format", name])["losses"] for name in FORMATS}
        result["perplexity"] = compare_formats(losses, options.bootstrap_seed)
        print_formats(result["perplexity"])
    if options.errors:
        result["errors"] = run_part(__file__, "errors", ["--model", options.model])["errors"]
        print_errors(result["errors"])
    if options.train:
        result["tuning"] = [tune(train, valid, options) for train, valid in zip(options.train, options.valid, strict=True)]
        print_tuning(result["tuning"])
    if options.out:
        write_json(options.out, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="plain text for the perplexities")
    parser.add_argument("--blur", action="store_true", help="perplexities of weights off their grid")
    parser.add_argument("--errors", action="store_true", help="what each table is off by")
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=128, help="at most so many windows")
    parser.add_argument("--train", type=Path, nargs="*", default=[], help="data sets to tune on")
    parser.add_argument("--valid", type=Path, nargs="*", default=[], help="held-out rows of each, in the same order")
    parser.add_argument("--methods", type=methods_of, default=METHODS, help="of tuning, with commas between")
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
    if not (options.part or options.text or options.errors or options.train):
        parser.error("give --text, --errors, --train and --valid, or several of them")
    if len(options.train) != len(options.valid):
        parser.error("--train and --valid go in pairs")
    if options.seeds not in STUDENT_95:
        parser.error("--seeds is between 2 and 8")
    return options


def methods_of(text: str) -> tuple[str, ...]:
    """METHODS, and what else is named."""
    named = tuple(one.strip() for one in text.split(","))
    for one in named:
        if one.partition("+")[0] not in METHODS:
            raise argparse.ArgumentTypeError(f"methods are {', '.join(METHODS)}, perhaps with +init; got {one!r}")
    return (*METHODS, *(one for one in named if one not in METHODS))


def perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """The mean loss of each window, in nats a token, of the model in one format."""
    import torch

    from luthier.evaluation.loss import supervised_loss
    from luthier.models.load import load

    model, tokenizer = load(options.model, base="f32")
    round_linear(model, options.format, blur=options.blur)
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


def errors(options: argparse.Namespace) -> dict[str, Any]:
    """The relative squared error of each table, by what is rounded."""
    import torch

    from luthier.adapters.targets import all_linear
    from luthier.models.load import load

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(DRAWN, generator=generator)
    uniform = torch.rand(DRAWN, generator=generator, dtype=torch.float64) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    model, _ = load(options.model, base="f32")
    weights = [model.get_submodule(path).matrix.dequantize() for path in all_linear(model)]
    kinds = {
        "normal": [normal],
        "Laplace": [laplace.to(torch.float32)],
        "the model's": weights,
        "blurred": [blurred(weight, generator) for weight in weights],
    }
    return {"errors": {name: {table: relative_error(values, table) for table in TABLES} for name, values in kinds.items()}}


def relative_error(values: list[Any], table: str) -> float:
    """sum (w - q)^2 / sum w^2 over all tensors, in float64."""
    from luthier.matrices.references import round_trip

    wrong = sum(float((one - round_trip(one, table)).double().square().sum()) for one in values)
    return wrong / sum(float(one.double().square().sum()) for one in values)


def blurred(weight: Any, generator: Any) -> Any:
    """The weights plus noise, even over one step of a grid of 16 values from the least to the largest of each 32 weights.

    Rounding to such a grid moves weights by as much, so that they are spread as before it.
    """
    import torch

    groups = weight.reshape(-1, GROUP)
    step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / 15
    return (groups + step * (torch.rand(groups.shape, generator=generator) - 0.5)).view_as(weight)


def round_linear(model: Any, name: str, *, blur: bool = False) -> None:
    """Put every linear layer but the head into the format, one at a time."""
    import torch

    from luthier.adapters.targets import all_linear
    from luthier.matrices import DenseMatrix, NF4Matrix
    from luthier.matrices.references import round_trip

    generator = torch.Generator().manual_seed(0)
    for path in all_linear(model):
        layer = model.get_submodule(path)
        weight = layer.matrix.dequantize()
        if blur:
            weight = blurred(weight, generator)
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
    order = sorted(FORMATS, key=lambda name: rows[name]["perplexity"], reverse=True)
    return {"windows": len(losses["bf16"]), "formats": rows, "order": order, "double_over_nf4": bootstrap(gap, seed)}


def bootstrap(differences: list[float], seed: int) -> list[float]:
    """The 95 % interval of the mean by resampling."""
    import numpy as np

    generator = np.random.default_rng(seed)
    values = np.array(differences)
    means = values[generator.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    return [float(edge) for edge in np.quantile(means, (0.025, 0.975))]


def tune(train: Path, valid: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of each method after the same steps on the same rows, over the seeds."""
    seeds = range(options.seeds)
    losses = {name: [tuned_loss(train, valid, name, seed, options) for seed in seeds] for name in options.methods}
    summary = {name: {"losses": own, **mean_with_interval(own)} for name, own in losses.items()}
    pairs = [("lora", "full"), *((name, "lora") for name in options.methods if name not in ("full", "lora"))]
    return {
        "train": f"{train.parent.name}/{train.name}",
        "steps": options.steps,
        "methods": summary,
        "ratios": {f"{one} over {other}": ratio(losses[one], losses[other]) for one, other in pairs},
    }


def tuned_loss(train: Path, valid: Path, method: str, seed: int, options: argparse.Namespace) -> float:
    way, _, init = method.partition("+")
    with tempfile.TemporaryDirectory() as work:
        kept = options.runs and options.runs.resolve() / f"{train.parent.name}-{method}-{seed}"
        config = {
            "data": str(train.resolve()), "eval_data": str(valid.resolve()), "model": options.model, "method": way,
            "seed": seed, "steps": options.steps, "batch_size": options.batch, "eval_rows": options.eval_rows,
            "eval_every": options.steps, "save_every": options.steps, "keep_checkpoints": 1, "samples": 0,
            "out": str(kept or Path(work) / "run"), **({"init": init} if init else {}),
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
    print(f"{' > '.join(result['order'])}; double over nf4: {spread(result['double_over_nf4'], 5)}")


def print_errors(result: dict[str, dict[str, float]]) -> None:
    print(f"{'(w - q)^2 / w^2':16}" + "".join(f"{table:>10}" for table in TABLES))
    for name, row in result.items():
        print(f"{name:16}" + "".join(f"{row[table]:10.5f}" for table in TABLES))


def print_tuning(results: Iterable[dict[str, Any]]) -> None:
    for result in results:
        for method, row in result["methods"].items():
            print(f"{result['train']:24}{method:8}{row['mean']:10.4f}   {spread(row['interval'], 4)}")
        for name, found in result["ratios"].items():
            print(f"{'':24}{name}: {found['mean']:.4f}   {spread(found['interval'], 4)} (target at most {WITHIN})")


def spread(edges: list[float], digits: int) -> str:
    return f"[{edges[0]:.{digits}f}, {edges[1]:.{digits}f}]"


PARTS = {"perplexity": perplexity, "errors": errors, "tuning": tuning}

if __name__ == "__main__":
    main()
