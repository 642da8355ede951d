"""The stages of a compression one by one: metrics against sums made by hand, matrices that are built, healing and its merge."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from luthier.adapters.targets import low_rank_layers
from luthier.calibration.sensitivity import mean_loss
from luthier.compression.build import build
from luthier.compression.candidates import Option, Prober, layer_options, pruned
from luthier.compression.specs import Spec, part_bytes, spec_bytes, whole
from luthier.compression.walk import Seen, walk, weighted_groups
from luthier.data.packing import Pack
from luthier.evaluation.loss import supervised_loss
from luthier.linear import LowRankLinear
from luthier.matrices import stored
from luthier.models.blocks import without_blocks
from luthier.models.load import load
from luthier.models.modes import inputs_require_grads


def packs(count: int = 3, length: int = 24) -> list[Pack]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 400, (length,), generator=generator)
        found.append(Pack.of_texts(ids, torch.tensor([0, length]), torch.arange(length - 1)))
    return found


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with blocks of its own, and one without."""
    return write_tiny(tmp_path_factory.mktemp("stages") / request.param, request.param)


class _Seen:
    """What goes into a layer and the gradient at what comes out of it."""

    def __init__(self) -> None:
        self.x = self.g = torch.empty(0)

    def look(self, _module, inputs, output) -> None:
        self.x = inputs[0].detach()
        output.register_hook(self.keep)

    def keep(self, gradient: torch.Tensor) -> None:
        self.g = gradient.detach()


def by_hand(model, name: str) -> torch.Tensor:
    """sum_t w_t x_t x_t^T / (2 S) in float64, w_t = |g_t|^2 / out_features, through plain hooks."""
    layer = model.get_submodule(name)
    total = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
    for pack in packs():
        seen = _Seen()
        handle = layer.register_forward_hook(seen.look)
        with without_blocks(), inputs_require_grads(model) as entered:
            supervised_loss(model, pack).backward(inputs=entered)
        handle.remove()
        x, g = (tensor.reshape(-1, tensor.shape[-1]).double() for tensor in (seen.x, seen.g))
        total += (x * g.square().mean(1)[:, None]).T @ x
    return total / (2 * sum(pack.supervised_tokens for pack in packs()))


def test_the_metrics_are_sums_over_tokens_weighted_by_gradients(folder: Path) -> None:
    model = load(str(folder)).model
    groups = weighted_groups(model, packs())
    seen: dict[str, torch.Tensor] = {}
    walk(model, packs(), groups, lambda found: seen.update({one.name: one.metric for one in found}), changes=False)
    assert [name for group in groups for name in group.names] == list(seen)
    for name, metric in seen.items():
        expected = by_hand(model, name)
        assert (metric - expected).norm() < 1e-4 * expected.norm()


def test_later_groups_see_what_earlier_ones_were_made(folder: Path) -> None:
    model, other = load(str(folder)).model, load(str(folder)).model
    groups = weighted_groups(model, packs())
    seen: dict[str, torch.Tensor] = {}

    def visit(found: Iterator[Seen]) -> None:
        for one in found:
            seen[one.name] = one.metric
            layer = model.get_submodule(one.name)
            layer.matrix = stored(layer.matrix.dequantize() * 0.5, "f32")

    walk(model, packs(), groups, visit, changes=True)
    # By hand: the other model with everything before a group halved, run from its beginning.
    for group in groups:
        alone: list[Seen] = []
        walk(other, packs(), [group], alone.extend, changes=False)
        for one in alone:
            assert (one.metric - seen[one.name]).norm() < 1e-4 * one.metric.norm()
        for name in group.names:
            layer = other.get_submodule(name)
            layer.matrix = stored(layer.matrix.dequantize() * 0.5, "f32")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # with and without blocks of its own
def test_moments_are_let_go_of_layer_by_layer(tmp_path: Path, family: str) -> None:
    """Of those that were taken in one pass no more is held than what is still to come."""
    model = load(str(write_tiny(tmp_path / family, family))).model
    groups = weighted_groups(model, packs())
    names = []

    def visit(found: Iterator[Seen]) -> None:
        before: weakref.ref[torch.UntypedStorage] | None = None
        for one in found:
            assert before is None or before() is None
            names.append(one.name)
            before = weakref.ref(one.metric.untyped_storage())
            del one

    walk(model, packs(), groups, visit, changes=False)
    assert names == [name for group in groups for name in group.names]


def test_a_layer_is_run_no_further_than_to_what_is_looked_at(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(str(tiny_llama)).model
    groups = weighted_groups(model, packs())[:4]
    names = {id(module): name for name, module in model.named_modules()}
    run: list[str] = []
    before: list[set[str]] = []
    forward = LowRankLinear.forward
    monkeypatch.setattr(LowRankLinear, "forward", lambda layer, *x: (run.append(names[id(layer)]), forward(layer, *x))[1])
    walk(model, packs(), groups, lambda _found: (before.append(set(run)), run.clear())[1], changes=True)
    down = "model.layers.0.mlp.down_proj"
    assert groups[3].names == (down,)
    assert groups[2].names[0] in before[3]  # what stands before what is looked at, as a module
    for group, ran in zip(groups, before, strict=True):
        assert not ran & {*group.names, down}


def test_what_is_expected_of_options_falls_with_bytes_and_sizes_are_those_of_the_file(folder: Path) -> None:
    model = load(str(folder), base="bf16").model
    groups = weighted_groups(model, packs())
    prober = Prober(model, "auto", "bf16", groups, packs())
    walk(model, packs(), groups, prober.visit, changes=False)
    for facts in prober.facts:
        options = layer_options(facts, prober, {"bf16": 0.5, "nf4": 0.5})
        for smaller, larger in itertools.pairwise(options):
            assert smaller.size_bytes < larger.size_bytes
            assert smaller.loss > larger.loss >= 0
        assert options[-1].loss == 0
    assert all(0 < gain <= 1 for gain in prober.gains.values())
    for kind in ("bf16", "nf4", "q8_0"):
        matrix = stored(torch.randn(96, 64), kind)
        assert 0 <= part_bytes(kind, 96, 64) - matrix.size_bytes < 1300
    pivots = spec_bytes(Spec("low-rank", "", 8, "bf16"), (96, 64))
    assert 0 < pivots - 2 * (8 * (96 + 64) - 8**2) - 4 * 96 < 600


def test_pruning_keeps_what_none_beats() -> None:
    options = [Option(whole("nf4"), size, loss) for size, loss in ((5, 3.0), (4, 3.0), (6, 1.0), (7, 2.0), (3, 9.0))]
    assert [(one.size_bytes, one.loss) for one in pruned(options)] == [(3, 9.0), (4, 3.0), (6, 1.0)]


SPECS = {
    "nf4": whole("nf4"),
    "repair": Spec("repair", "nf4", 8, "bf16"),
    "repair in nf4": Spec("repair", "nf4", 8, "nf4"),
    "low rank": Spec("low-rank", "", 24, "bf16"),
    "low rank in nf4": Spec("low-rank", "", 24, "nf4"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_every_spec_is_built_as_it_says(folder: Path, spec: Spec) -> None:
    model = load(str(folder), base="bf16").model
    groups = weighted_groups(model, packs())
    before = {name: layer.matrix.dequantize() for name, layer in low_rank_layers(model).items()}
    build(model, packs(), groups, {name: spec for group in groups for name in group.names}, {})
    for group in groups:
        matrices = [model.get_submodule(name).matrix for name in group.names]
        assert all(matrix.shape == before[name].shape for name, matrix in zip(group.names, matrices, strict=True))
        if spec.form == "low-rank":
            assert matrices[0].kind == f"p24/{spec.factors},{spec.factors}"
        elif spec.form == "repair":
            assert matrices[0].kind == f"nf4+r8/{spec.factors},{spec.factors}"
            for name, matrix in zip(group.names, matrices, strict=True):
                base_error = (before[name] - matrix.base.dequantize()).norm()
                assert (before[name] - matrix.dequantize()).norm() < base_error * 1.05
        else:
            assert matrices[0].kind == "nf4"
    assert torch.isfinite(torch.tensor(mean_loss(model, packs())))
