"""The lines of compression.py: a fresh model for each, compressed as the line says and measured."""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METHODS = ("svd", "asvd", "whitened", "sequential", "weighted", "allocated")
AVERAGES = ("allocated", "low rank nf4", "low rank bf16")
REPAIRS = ("nearest", "in metric", "rank 8 nf4", "rank 16 nf4", "rank 16 bf16", "rank 32 bf16", "rank 64 bf16")
HEALED = ("rank 8 nf4", "rank 16 nf4")


def lines(bench: Bench, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the table, each as soon as it is measured. A method's decompositions serve all its ratios."""
    yield bench.row("original", 0, lambda: None)
    methods = [one for one in options.methods.split(",") if one]
    for method in methods:
        for ratio in options.ratios:
            yield (row := bench.low_rank(method, ratio))
            if options.heal and method == methods[-1]:
                yield bench.healed(row)
    for line in REPAIRS if options.four_bit else ():
        yield (row := bench.four_bit(line))
        if options.heal and line in HEALED:
            yield bench.healed(row)
    for line in AVERAGES if options.bits_average else ():
        yield bench.average(line, options.bits_average)


class Bench:
    """Texts and weights of tokens, taken once; a fresh model for each line."""

    def __init__(self, options: argparse.Namespace):
        from luthier.compression.settings import Budget, CompressSettings
        from luthier.compression.texts import read_texts
        from luthier.compression.walk import weighted_groups
        from luthier.models.load import load

        self.options = options
        loaded = load(options.model, base="bf16", offline=True)
        self.model: Any = loaded.model
        settings = CompressSettings(
            options.model, Budget.parse("100%"), Path("nowhere"), options.data, options.text,
            windows=options.windows, window=options.window, eval_windows=options.eval_windows, offline=True,
        )  # fmt: skip
        self.texts = read_texts(settings, self.model, loaded.tokenizer)
        self.weighted = weighted_groups(self.model, self.texts.calibration)
        self.teacher: Any = None
        if options.heal:
            from luthier.compression.heal import healing_packs, teacher_of

            width = self.model.config.hidden_size
            packs = healing_packs(self.texts.calibration, self.texts.healing, options.heal, width)
            self.teacher = teacher_of(self.model, packs)
        self.probers: dict[str, Any] = {}
        self.made: dict[str, dict[float, dict[str, Any]]] = {}

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
        from luthier.calibration.inputs import linear_layers
        from luthier.calibration.sensitivity import mean_loss
        from luthier.models.compressed_folder import stored_bytes

        start = time.perf_counter()
        make()
        seconds = time.perf_counter() - start
        loss = mean_loss(self.model, self.texts.evaluation)
        matrices = [layer.matrix for layer in linear_layers(self.model, None).values()]
        bits = 8 * sum(one.size_bytes for one in matrices) / sum(one.shape[0] * one.shape[1] for one in matrices)
        return {
            "line": line, "removed": removed, "bits": bits, "size_bytes": stored_bytes(self.model), "loss": loss,
            "perplexity": math.exp(loss), "seconds": seconds,
        }  # fmt: skip

    def low_rank(self, method: str, ratio: float) -> dict[str, Any]:
        make = self.alone if method in ("svd", "asvd", "whitened") else self.sequential
        return self.row(method, ratio, lambda: make(method, ratio))

    def alone(self, method: str, ratio: float) -> None:
        """Each layer by itself, for what the original model's layers are given. Decomposed once for all ratios."""
        from luthier.calibration.inputs import linear_layers

        if method not in self.made:
            self.made = {method: {one: {} for one in self.options.ratios}}
            self.whitened() if method == "whitened" else self.plain(scaled=method == "asvd")
        for name, layer in linear_layers(self.model, None).items():
            layer.matrix = self.made[method][ratio][name]

    def keep(self, method: str, name: str, found: Any) -> None:
        for ratio, made in self.made[method].items():
            made[name] = _product(found.factors(_rank((found.B.shape[0], found.A.shape[1]), ratio)))

    def plain(self, scaled: bool) -> None:
        from luthier.calibration.inputs import linear_layers
        from luthier.lowrank import scaled_svd, truncated_svd

        sizes = self.input_sizes() if scaled else {}
        for name, layer in linear_layers(self.model, None).items():
            W = layer.matrix.dequantize()
            found = scaled_svd(W, sizes[name].clamp_min(1e-6).sqrt()) if scaled else truncated_svd(W)
            self.keep("asvd" if scaled else "svd", name, found)

    def input_sizes(self) -> dict[str, Any]:
        """The mean of |x| over all calibration windows for every layer, in one pass."""
        import torch

        from luthier.calibration.inputs import look_at_inputs

        sizes: dict[str, Any] = {}

        def see(name: str, x: Any) -> None:
            sizes[name] = sizes.get(name, 0) + x.abs().sum(0, dtype=torch.float64) / tokens

        names = [name for group in self.weighted for name in group.names]
        tokens = self.texts.calibration_tokens
        for pack in self.texts.calibration:
            look_at_inputs(self.model, pack, names, see)
        return sizes

    def whitened(self) -> None:
        from luthier.calibration.inputs import linear_layers
        from luthier.compression.walk import Seen, walk
        from luthier.lowrank import projected

        def visit(seen: Iterator[Seen]) -> None:
            layers = linear_layers(self.model, None)
            for one in seen:
                self.keep("whitened", one.name, projected(layers[one.name].matrix.dequantize(), one.metric))

        walk(self.model, self.texts.calibration, self.unweighted(), visit, changes=False)

    def unweighted(self) -> list[Any]:
        import torch

        from luthier.compression.walk import Group

        return [
            Group(group.names, {name: [torch.ones_like(one) for one in own] for name, own in group.weights.items()})
            for group in self.weighted
        ]

    def sequential(self, method: str, ratio: float) -> None:
        from luthier.compression.build import build

        groups = self.unweighted() if method == "sequential" else self.weighted
        numbers = sum(rows * columns for rows, columns in self.shapes().values())
        if method == "allocated":
            plan = self.allocated("16", int(2 * numbers * (1 - ratio)))
        else:
            plan = self.even(1 - ratio, "bf16")
        build(self.model, self.texts.calibration, groups, plan, {})

    def shapes(self) -> dict[str, tuple[int, int]]:
        from luthier.calibration.inputs import linear_layers

        return {name: layer.matrix.shape for name, layer in linear_layers(self.model, None).items()}

    def even(self, share: float, factors: str) -> dict[str, Any]:
        """The same share of every layer's numbers in the pivoted form."""
        from luthier.compression.specs import Spec, rank_at

        ranks = {name: max(1, int(rank_at(shape, share))) for name, shape in self.shapes().items()}
        return {name: Spec("low-rank", "", rank, factors) for name, rank in ranks.items()}

    def allocated(self, bits: Any, budget: int) -> dict[str, Any]:
        from luthier.compression.candidates import Prober
        from luthier.compression.planning import allocated_plan
        from luthier.compression.walk import walk

        if bits not in self.probers:
            prober = Prober(self.model, bits, "bf16", self.weighted, self.texts.validation)
            walk(self.model, self.texts.calibration, self.weighted, prober.visit, changes=False)
            prober.measure()
            del prober.model  # other lines have others
            for family, probe in prober.probes.items():
                print(f"  {family}: {probe.measured:.4f} nats measured, {probe.predicted:.4f} predicted", flush=True)
            self.probers[bits] = prober
        return allocated_plan(self.probers[bits].facts, [], self.probers[bits], budget).layers

    def average(self, line: str, bits: float) -> dict[str, Any]:
        """All linear layers in `bits` a weight: what the allocator makes of that, or low rank alone, everywhere alike."""
        from luthier.compression.build import build

        def make() -> None:
            budget = int(bits / 8 * sum(rows * columns for rows, columns in self.shapes().values()))
            plan = self.allocated("auto", budget) if line == "allocated" else self.largest_even(line.split()[-1], budget)
            build(self.model, self.texts.calibration, self.weighted, plan, {})

        return self.row(f"{bits:g} bits, {line}", 0, make)

    def largest_even(self, factors: str, budget: int) -> dict[str, Any]:
        """The largest of the `even` plans, at whole per cent, that takes at most so many bytes."""
        from luthier.compression.specs import spec_bytes

        shapes = self.shapes()
        for share in range(99, 0, -1):
            plan = self.even(share / 100, factors)
            if sum(spec_bytes(spec, shapes[name]) for name, spec in plan.items()) <= budget:
                return plan
        raise SystemExit(f"no low rank in {factors} fits {budget} bytes. Raise --bits-average.")

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
