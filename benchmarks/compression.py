"""Low rank at several ratios by several methods, and 4 bits with and without repair: perplexity of each.

    python benchmarks/compression.py --data c4.jsonl --text test.raw [--model M] [--ratios 10,20,40,60] [--methods ...]
                                     [--windows 48] [--eval-windows 24] [--heal STEPS] [--json FILE]

A ratio is the share of the linear layers' numbers that is removed; head and embedding stay in 16 bits. Methods, each with all
that stands before it except where it says otherwise:

    svd          the best approximation of the weights, each layer alone, the same share of ranks everywhere
    asvd         inputs scaled by the root of their mean size (arXiv:2312.05821)
    whitened     the best approximation of the outputs on the calibration text, inputs of the original model (SVD-LLM)
    sequential   inputs as the compressed layers below give them; the pivoted form, which has room for more ranks
    weighted     tokens weighed by how much the loss feels them
    allocated    ranks given to where the loss feels them, by the knapsack

4-bit lines: NF4 at nearest codes, rounded in the metric, and repaired with factors of rank 8 to 64. `--heal` trains the last
method of each ratio, and NF4 repaired with factors in NF4, and prints each before and after.
Each line is built on a fresh copy of the model; windows of `--text` are never calibrated on.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from pathlib import Path
from typing import Any

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

METHODS = ("svd", "asvd", "whitened", "sequential", "weighted", "allocated")
REPAIRS = ("nearest", "in metric", "rank 8 nf4", "rank 16 nf4", "rank 16 bf16", "rank 32 bf16", "rank 64 bf16")
HEALED = ("rank 8 nf4", "rank 16 nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="calibration text, or rows")
    parser.add_argument("--text", required=True, help="text to measure perplexity on")
    parser.add_argument("--ratios", default="10,20,40,60", help="per cent of the linear layers' numbers removed")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--four-bit", action="store_true", help="the 4-bit lines too")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--eval-windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--heal", type=int, default=0, help="steps of healing of the last method and the repairs in NF4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options)
    rows = [bench.row("original", 0, lambda: None)]
    print_row(rows[-1])
    for ratio in [float(one) / 100 for one in options.ratios.split(",") if one]:
        for method in options.methods.split(","):
            rows.append(bench.low_rank(method, ratio))
            print_row(rows[-1])
        if options.heal:
            rows.append(bench.healed(rows[-1]))
            print_row(rows[-1])
    for line in REPAIRS if options.four_bit else ():
        rows.append(bench.four_bit(line))
        print_row(rows[-1])
        if options.heal and line in HEALED:
            rows.append(bench.healed(rows[-1]))
            print_row(rows[-1])
    if options.json:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from common import describe_machine, write_json

        write_json(options.json, {"benchmark": "compression", "environment": describe_machine(), "rows": rows})


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['line']:28s} {100 * row['removed']:5.1f} % removed  {row['size_bytes'] / 1e6:7.1f} MB  "
        f"perplexity {row['perplexity']:10.2f}  {row['seconds']:6.1f} s",
        flush=True,
    )


class Bench:
    """Texts and weights of tokens, taken once; a fresh model for each line."""

    def __init__(self, options: argparse.Namespace):
        from luthier.compression.settings import Budget, CompressSettings
        from luthier.compression.texts import read_texts
        from luthier.compression.walk import weighted_groups
        from luthier.models.load import load

        self.options = options
        self.model = load(options.model, base="bf16", offline=True).model
        tokenizer = load(options.model, base="bf16", offline=True).tokenizer
        settings = CompressSettings(
            options.model, Budget.parse("100%"), Path("nowhere"), options.data, options.text,
            windows=options.windows, window=options.window, eval_windows=options.eval_windows, offline=True,
        )  # fmt: skip
        self.texts = read_texts(settings, self.model, tokenizer)
        self.weighted = weighted_groups(self.model, self.texts.calibration)
        self.facts: Any = None
        self.teacher: Any = None
        if options.heal:
            from luthier.compression.heal import healing_packs, teacher_of

            width = self.model.config.hidden_size
            packs = healing_packs(self.texts.calibration, self.texts.healing, options.heal, width)
            self.teacher = teacher_of(self.model, packs)

    def fresh(self) -> None:
        from luthier.models.load import load

        self.model = None
        gc.collect()
        self.model = load(self.options.model, base="bf16", offline=True).model

    def row(self, line: str, removed: float, make: Any) -> dict[str, Any]:
        """A line on a fresh copy of the model."""
        if self.model is None or line != "original":
            self.fresh()
        return self.measured(line, removed, make)

    def healed(self, row: dict[str, Any]) -> dict[str, Any]:
        """The line after the one that was measured last, its model trained."""
        from luthier.compression.heal import heal

        steps = self.options.heal
        return self.measured(f"{row['line']}, {steps} steps", row["removed"], lambda: heal(self.model, self.teacher, steps))

    def measured(self, line: str, removed: float, make: Any) -> dict[str, Any]:
        from luthier.calibration.sensitivity import mean_loss
        from luthier.models.compressed_folder import stored_bytes

        start = time.perf_counter()
        make()
        seconds = time.perf_counter() - start
        loss = mean_loss(self.model, self.texts.evaluation)
        size_bytes = stored_bytes(self.model)
        return {
            "line": line, "removed": removed, "size_bytes": size_bytes, "loss": loss, "perplexity": math.exp(loss),
            "seconds": seconds,
        }  # fmt: skip

    def low_rank(self, method: str, ratio: float) -> dict[str, Any]:
        makes = {"svd": self.alone, "asvd": self.alone, "whitened": self.whitened}
        if method in makes:
            return self.row(method, ratio, lambda: makes[method](method, ratio))
        return self.row(method, ratio, lambda: self.sequential(method, ratio))

    def alone(self, method: str, ratio: float) -> None:
        """Each layer by itself, without what goes into it, or with its mean size alone."""
        from luthier.calibration.inputs import linear_layers
        from luthier.calibration.moments import collect_moments
        from luthier.lowrank import scaled_svd, truncated_svd

        layers = linear_layers(self.model, None)
        seen = {}
        for name in layers if method == "asvd" else ():
            if name not in seen:  # a pass a layer keeps memory at one layer's moments
                seen |= collect_moments(self.model, self.texts.calibration[:8], [name])
                seen[name] = seen[name].mean_abs
        for name, layer in layers.items():
            W = layer.matrix.dequantize()
            found = truncated_svd(W) if method == "svd" else scaled_svd(W, seen[name].clamp_min(1e-6).sqrt())
            layer.matrix = _product(found.factors(_rank(W.shape, ratio)))

    def whitened(self, _method: str, ratio: float) -> None:
        """Each layer by the moments of the original model's inputs."""
        from luthier.calibration.inputs import linear_layers
        from luthier.compression.walk import Seen, walk
        from luthier.lowrank import projected

        def visit(seen: list[Seen]) -> None:
            layers = linear_layers(self.model, [one.name for one in seen])
            for one in seen:
                W = layers[one.name].matrix.dequantize()
                made[one.name] = _product(projected(W, one.metric).factors(_rank(W.shape, ratio)))

        made: dict[str, Any] = {}
        walk(self.model, self.texts.calibration, self.unweighted(), visit, changes=False)
        for name, layer in linear_layers(self.model, list(made)).items():
            layer.matrix = made[name]

    def unweighted(self) -> list[Any]:
        import torch

        from luthier.compression.walk import Group

        return [
            Group(group.names, {name: [torch.ones_like(one) for one in own] for name, own in group.weights.items()})
            for group in self.weighted
        ]

    def sequential(self, method: str, ratio: float) -> None:
        from luthier.calibration.inputs import linear_layers
        from luthier.compression.build import build
        from luthier.compression.planning import rank_at
        from luthier.compression.specs import Spec

        groups = self.unweighted() if method == "sequential" else self.weighted
        layers = linear_layers(self.model, None)
        ranks = {name: int(rank_at(layer.matrix.shape, 1 - ratio)) for name, layer in layers.items()}
        plan = {name: Spec("low-rank", "", rank, "bf16") for name, rank in ranks.items()}
        if method == "allocated":
            plan = self.allocated(ratio)
        build(self.model, self.texts.calibration, groups, plan, {})

    def allocated(self, ratio: float) -> dict[str, Any]:
        from luthier.compression.candidates import Prober
        from luthier.compression.planning import Table, allocated_plan
        from luthier.compression.walk import walk

        if self.facts is None:
            self.facts = Prober(self.model, "16", "bf16", frozenset())
            walk(self.model, self.texts.calibration, self.weighted, self.facts.visit, changes=False)
        numbers = sum(one.shape[0] * one.shape[1] for one in self.facts.facts)
        tables: list[Table] = []
        return allocated_plan(self.facts.facts, tables, self.facts, int(2 * numbers * (1 - ratio))).layers

    def four_bit(self, line: str) -> dict[str, Any]:
        from luthier.compression.build import build
        from luthier.compression.specs import Spec, whole

        spec = whole("nf4")
        if line.startswith("rank"):
            _, rank, factors = line.split()
            spec = Spec("repair", "nf4", int(rank), factors)
        plan = {name: spec for group in self.weighted for name in group.names}

        def make() -> None:
            build(self.model, self.texts.calibration, self.weighted, plan, {}, in_metric=line != "nearest")

        return self.row(f"nf4, {line}", 0, make)


def _rank(shape: tuple[int, ...], ratio: float) -> int:
    rows, columns = shape[0], shape[1]
    return max(1, int((1 - ratio) * rows * columns / (rows + columns)))


def _product(factors: Any) -> Any:
    from luthier.lowrank import rebalanced
    from luthier.matrices import FactoredMatrix, stored

    even = rebalanced(factors)
    return FactoredMatrix(stored(even.B, "bf16"), stored(even.A, "bf16"))


if __name__ == "__main__":
    main()
