"""What predictions are multiplied by: measured rises against a loss taken by hand, and what they do to choices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_stages import packs
from tiny import write_tiny

from luthier.calibration.inputs import linear_layers
from luthier.calibration.sensitivity import mean_loss, replaced
from luthier.compression.build import layer_matrix
from luthier.compression.candidates import LayerFacts, Prober, layer_options, low_rank_options, option_of
from luthier.compression.planning import Table, allocated_plan, nf4_plan, uniform_plan
from luthier.compression.probing import EACH, Probe, probed_names
from luthier.compression.settings import Bits
from luthier.compression.specs import Spec, rank_at, spec_bytes, whole
from luthier.compression.walk import Group, Seen, walk, weighted_groups
from luthier.lowrank import projected, round_nf4
from luthier.matrices import Matrix, stored
from luthier.models.load import load


def walked(folder: Path, bits: Bits) -> Prober:
    model = load(str(folder), base="bf16").model
    groups = weighted_groups(model, packs())
    prober = Prober(model, bits, "bf16", groups, packs(5))
    walk(model, packs(), groups, prober.visit, changes=False)
    return prober


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("probing") / "llama", "llama")


@pytest.fixture(scope="module")
def prober(folder: Path) -> Prober:
    found = walked(folder, "auto")
    found.measure()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_measured_is_the_rise_of_the_loss_and_the_model_stays(tmp_path: Path, family: str) -> None:
    """Against all layers cut, or rounded, at once: two layers of each name, so that all of them are tried."""
    model = load(str(write_tiny(tmp_path / family, family)), base="bf16").model
    groups = weighted_groups(model, packs())
    prober = Prober(model, "auto", "bf16", groups, packs(5))
    layers = linear_layers(model, [name for group in groups for name in group.names])
    before = {name: layer.matrix for name, layer in layers.items()}
    made: dict[str, dict[str, Matrix]] = {"low rank": {}, "rounded": {}}

    def visit(found: Iterator[Seen]) -> None:
        seen = list(found)
        for one in seen:
            W = layers[one.name].matrix.dequantize()
            cut = projected(W, one.metric).factors(int(rank_at((W.shape[0], W.shape[1]), 0.8)))
            made["low rank"][one.name] = stored(cut.B.bfloat16().float() @ cut.A.bfloat16().float(), "f32")
            made["rounded"][one.name] = round_nf4(W, one.metric)
        prober.visit(iter(seen))

    walk(model, packs(), groups, visit, changes=False)
    prober.measure()
    assert all(layer.matrix is before[name] for name, layer in layers.items())
    base = mean_loss(model, packs(5))
    for kind, matrices in made.items():
        with replaced(model, matrices):
            rise = mean_loss(model, packs(5)) - base
        probe = prober.probes[kind]  # type: ignore[index]
        assert probe.measured == pytest.approx(rise, rel=0.02, abs=5e-6)
        assert abs(rise) > 1e-4
        assert probe.layers == len(layers)
    dropped = sum(one.dropped(int(rank_at(one.shape, 0.8))) for one in prober.facts)
    assert prober.probes["low rank"].predicted == pytest.approx(dropped, rel=1e-12)
    assert 0 < prober.probes["rounded"].predicted < 0.8 * sum(one.errors["nf4"] for one in prober.facts)


def test_without_bits_nothing_is_rounded_in_the_metric(folder: Path) -> None:
    found = walked(folder, "16")
    found.measure()
    assert found.probes.keys() == {"low rank"}


def test_factors_are_held_within_what_little_text_can_tell() -> None:
    assert Probe(1, 0.1, 0.25).factor == 2.5
    assert Probe(1, 0.1, -0.01).factor == 0.5
    assert Probe(1, 0.001, 5.0).factor == 10.0
    assert Probe(0, 0.0, 0.0).factor == 1.0


def test_layers_of_every_name_are_tried_evenly_over_the_depth() -> None:
    groups = [Group((f"layers.{n}.q", f"layers.{n}.k"), {}) for n in range(30)] + [Group(("top.head",), {})]
    chosen = probed_names(groups)
    assert len(chosen) == 2 * EACH + 1
    assert {f"layers.{n}.q" for n in (3, 11, 18, 26)} <= chosen
    assert "top.head" in chosen


def test_each_family_is_multiplied_by_its_own_factor(prober: Prober) -> None:
    facts = prober.facts[0]
    specs = [whole("nf4"), Spec("repair", "nf4", 8, "bf16"), Spec("low-rank", "", 16, "bf16")]
    prober_alone = Prober(prober.model, "auto", "bf16", [], [], gains=prober.gains)
    alone = [option_of(facts, spec, prober_alone).loss for spec in specs]
    prober_alone.probes = {"low rank": Probe(1, 1.0, 3.0), "rounded": Probe(1, 1.0, 2.0)}
    assert [option_of(facts, spec, prober_alone).loss for spec in specs] == pytest.approx(
        [2 * alone[0], 2 * alone[1], 3 * alone[2]], rel=1e-12
    )
    in_nf4 = option_of(facts, Spec("low-rank", "", 16, "nf4"), prober_alone).loss
    rounding = 2 * prober.gain(facts.name, "nf4") * 2 * facts.nf4_error * (facts.dropped(0) - facts.dropped(16))
    assert in_nf4 == pytest.approx(3 * alone[2] + rounding, rel=1e-12)
    assert option_of(facts, whole("bf16"), prober_alone).loss == 0


def test_low_rank_that_costs_more_than_predicted_is_left_alone(prober: Prober) -> None:
    """One layer that 64 components nearly are and one that none are, at the bytes of NF4: which is cheaper for the first?"""
    kinds = {"nf4": 0.02, "q4_0": 0.02, "q4_k": 0.02, "q8_0": 1e-4}
    steep = torch.cat([torch.full((64,), 0.995 / 64), torch.full((448,), 0.005 / 448)]).double()
    facts = [
        LayerFacts("steep", (512, 512), steep, kinds, {}),
        LayerFacts("flat", (512, 512), torch.full((512,), 1 / 512).double(), kinds, {}),
    ]
    budget = 2 * spec_bytes(whole("nf4"), (512, 512))
    forms = {}
    for factor in (1.0, 10.0):
        own = Prober(prober.model, "auto", "bf16", [], [], probes={"low rank": Probe(1, 1.0, factor)})
        plan = allocated_plan(facts, [], own, budget)
        assert plan.size_bytes <= budget
        forms[factor] = (plan.layers["steep"].form, plan.layers["flat"].form)
    assert forms == {1.0: ("low-rank", "whole"), 10.0: ("whole", "whole")}


def test_no_layer_is_cut_below_half_an_even_share(prober: Prober) -> None:
    for facts in prober.facts:
        shares = {"bf16": 0.5, "nf4": 4.0}
        ranks = {kind: [] for kind in shares}
        for option in layer_options(facts, prober, shares):
            if option.spec.form == "low-rank":
                ranks[option.spec.factors].append(option.spec.rank)
        assert all(2 * rank >= rank_at(facts.shape, 0.5) for rank in ranks["bf16"])
        assert all(2 * rank >= min(facts.shape) for rank in ranks["nf4"])
        below = {option.spec.rank for option in low_rank_options(facts, prober)}
        assert min(below) == 16


@pytest.mark.parametrize(("bits", "kinds"), [("16", {"bf16"}), ("4", {"nf4", "q4_0"})])
def test_plain_nf4_is_predicted_whatever_bits_are_allowed(folder: Path, bits: Bits, kinds: set[str]) -> None:
    found = walked(folder, bits)
    found.measure()
    for facts in found.facts:
        options = layer_options(facts, found, {"bf16": 0.0, "nf4": 0.0})
        assert {option.spec.kind or option.spec.factors for option in options} <= kinds
    plain = nf4_plan(found.facts, [], 0)
    assert plain.rise == pytest.approx(sum(one.errors["nf4"] for one in found.facts), rel=1e-12)
    assert plain.rise > 0
    uniform = uniform_plan(found.facts, [], found, 10**9)
    assert uniform is not None
    assert {spec.kind or spec.factors for spec in uniform.layers.values()} <= kinds


def test_tables_of_different_widths_get_a_kind_that_both_can_have(prober: Prober) -> None:
    wide = Table("embedding", (100, 64), {"bf16": 0.0, "q8_0": 0.001, "q4_0": 0.003, "nf4": 0.002})
    narrow = Table("head", (100, 48), {"bf16": 0.0, "nf4": 0.004})
    for tables in ([wide, narrow], [narrow, wide]):
        plain = nf4_plan(prober.facts, tables, 0)
        assert plain.tables == {"embedding": "nf4", "head": "nf4"}
        assert plain.rise == pytest.approx(sum(one.errors["nf4"] for one in prober.facts) + 0.006, rel=1e-12)
        assert set(nf4_plan(prober.facts, tables, 10**9).tables.values()) == {"bf16"}
        uniform = uniform_plan(prober.facts, tables, prober, plain.size_bytes)
        assert uniform is not None
        assert set(uniform.tables.values()) <= {"bf16", "nf4"}


def test_a_matrix_of_lower_rank_than_asked_for_is_kept() -> None:
    """Rows of the basis then depend on each other, and whoever fits the rest to them has many answers."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    X = torch.randn(300, 64, generator=generator, dtype=torch.float64)
    for kind, most in (("f32", 1e-4), ("nf4", 0.1)):
        made = layer_matrix(stored(W, "f32"), X.T @ X, Spec("low-rank", "", 16, kind))
        assert (made.dequantize() - W).norm() < most * W.norm()


def test_a_layer_that_no_loss_feels_is_kept() -> None:
    W = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    made = layer_matrix(stored(W, "f32"), torch.zeros(64, 64, dtype=torch.float64), Spec("repair", "nf4", 8, "bf16"))
    assert (made.dequantize() - W).norm() < 0.1 * W.norm()
