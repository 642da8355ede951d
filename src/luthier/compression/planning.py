"""Spends the budget: what each layer, the embedding and the head become, by allocation and, beside it, uniformly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from luthier.adapters.targets import low_rank_layers
from luthier.calibration.sensitivity import mean_loss
from luthier.compression.build import replace_table
from luthier.compression.candidates import (
    LayerFacts,
    Option,
    Prober,
    choices_of,
    layer_options,
    low_rank_options,
    option_of,
    repair_specs,
    whole_specs,
)
from luthier.compression.specs import ENTRY_BYTES, Spec, fitting, part_bytes, rank_at, spec_bytes, whole
from luthier.data.packing import Pack
from luthier.errors import PreflightError
from luthier.linear import LowRankEmbedding
from luthier.lowrank import allocate
from luthier.models.compressed_folder import stored_state
from luthier.progress import Progress
from luthier.units import size_text

LEAST_RISE = 1e-6  # nats: a table in fewer bits is never expected to be better
TABLE_KINDS = ("q8_0", "q4_0", "nf4")
RATIOS = tuple(share / 100 for share in range(5, 100, 5))


@dataclass(frozen=True)
class Plan:
    """layers: the spec of each linear layer; tables: the kind of embedding and of a head of its own; size_bytes: of the file,
    a little too many rather than too few; rise: the expected rise of the mean loss, in nats."""

    name: str
    layers: dict[str, Spec]
    tables: dict[str, str]
    size_bytes: int
    rise: float

    @property
    def has_factors(self) -> bool:
        """Whether some layer has any, which healing can train."""
        return any(spec.rank for spec in self.layers.values())


@dataclass(frozen=True)
class Table:
    """The embedding or a head that is not tied to it. rises: of the mean loss for each kind, measured."""

    name: str
    shape: tuple[int, int]
    rises: dict[str, float]


def tables_of(model: PreTrainedModel, packs: Sequence[Pack], prober: Prober, progress: Progress | None = None) -> list[Table]:
    """Embedding and head, each stored in every kind for a while, and what that does to the loss on `packs`."""
    layers = low_rank_layers(model)
    head = model.get_output_embeddings()
    names = [name for name, layer in layers.items() if isinstance(layer, LowRankEmbedding) or layer is head]
    found: dict[int, str] = {}
    for name in names:
        found.setdefault(id(layers[name].matrix), name)
    before = mean_loss(model, packs)
    tables = []
    for name in found.values():
        matrix = layers[name].matrix
        sharing = [layer for layer in layers.values() if layer.matrix is matrix]
        rises = {prober.sixteen: 0.0}
        kinds = [] if prober.bits == "16" else fitting(TABLE_KINDS, matrix.shape[1])
        for number, kind in enumerate(kinds):
            if progress is not None:
                progress(f"trying {name} in fewer bits", number, len(kinds))
            replace_table(model, name, kind)
            rises[kind] = max(LEAST_RISE, mean_loss(model, packs) - before)
            for layer in sharing:
                layer.matrix = matrix
        tables.append(Table(name, matrix.shape, rises))
    return tables


def fixed_bytes(model: PreTrainedModel) -> int:
    """What is no matrix: norms and biases, and the entries in the header of the file."""
    state, entries = stored_state(model)
    rest = {key: tensor for key, tensor in state.items() if not (key.endswith(".weight") and key[: -len(".weight")] in entries)}
    return sum(tensor.numel() * tensor.element_size() + ENTRY_BYTES for tensor in rest.values()) + ENTRY_BYTES


def allocated_plan(facts: Sequence[LayerFacts], tables: Sequence[Table], prober: Prober, budget: int) -> Plan:
    """The least expected rise within the budget. Raises PreflightError where nothing fits."""
    share = _even_shares(facts, tables, prober, budget)
    options = {one.name: layer_options(one, prober, share) for one in facts}
    for table in tables:
        options[table.name] = _table_options(table)
    _check_fits(options, budget)
    found = allocate(choices_of(options), budget)
    chosen = {name: options[name][place].spec for name, place in found.chosen.items()}
    kinds = {table.name: chosen.pop(table.name).kind for table in tables}
    return Plan("allocated", chosen, kinds, found.size_bytes, found.loss)


def _table_options(table: Table) -> list[Option]:
    return [Option(whole(kind), part_bytes(kind, *table.shape), rise) for kind, rise in table.rises.items()]


def _even_shares(facts: Sequence[LayerFacts], tables: Sequence[Table], prober: Prober, budget: int) -> dict[str, float]:
    """For each kind of factors the share of the layers' numbers that the budget holds in it, tables at their smallest."""
    left = budget - sum(min(part_bytes(kind, *table.shape) for kind in table.rises) for table in tables)
    return {kind: max(0.0, left / sum(part_bytes(kind, *one.shape) for one in facts)) for kind in prober.factor_kinds}


def _check_fits(options: dict[str, list[Option]], budget: int) -> None:
    smallest = sum(min(option.size_bytes for option in own) for own in options.values())
    if smallest > budget:
        raise PreflightError(
            f"the budget must hold the smallest form of every layer, {size_text(smallest)} in all; "
            f"{size_text(max(0, budget))} are left for them. Raise --budget, or allow fewer bits with --bits auto."
        )


def uniform_plan(
    facts: Sequence[LayerFacts], tables: Sequence[Table], prober: Prober, budget: int, *, factored: bool = False
) -> Plan | None:
    """The best of the plans that treat all linear layers alike, by expected rise, that fits; None where none does.

    factored: only plans in which every layer has factors, which healing can train.
    """
    best: Plan | None = None
    for options in _families(facts, prober):
        if factored and not options[0].spec.rank:
            continue
        for kind in _common_kinds(tables):
            size = sum(option.size_bytes for option in options) + sum(part_bytes(kind, *table.shape) for table in tables)
            rise = sum(option.loss for option in options) + sum(table.rises[kind] for table in tables)
            if size <= budget and (best is None or rise < best.rise):
                layers = {one.name: option.spec for one, option in zip(facts, options, strict=True)}
                name = "uniform in factors" if factored else "uniform"
                best = Plan(name, layers, {table.name: kind for table in tables}, size, rise)
    return best


def _common_kinds(tables: Sequence[Table]) -> list[str]:
    """The kinds that every table can have, whose widths may differ; "" where there is no table."""
    return [kind for kind in tables[0].rises if all(kind in one.rises for one in tables)] if tables else [""]


def _families(facts: Sequence[LayerFacts], prober: Prober) -> Iterator[list[Option]]:
    """One option for every layer, of the same form throughout."""
    each = [whole_specs(one, prober) + repair_specs(one, prober) for one in facts]
    for spec in (spec for spec in each[0] if all(spec in own for own in each)):
        yield [option_of(one, spec, prober) for one in facts]
    for factors in prober.factor_kinds:
        for share in RATIOS:
            ranked = [_at_share(one, prober, factors, share) for one in facts]
            if all(ranked):
                yield [option for option in ranked if option is not None]


def _at_share(facts: LayerFacts, prober: Prober, factors: str, share: float) -> Option | None:
    """The layer at the rank that takes about `share` of its numbers."""
    options = [option for option in low_rank_options(facts, prober) if option.spec.factors == factors]
    return min(options, key=lambda one: abs(one.spec.rank - rank_at(facts.shape, share)), default=None)


def nf4_plan(facts: Sequence[LayerFacts], tables: Sequence[Table], budget: int) -> Plan:
    """Plain NF4 at nearest codes: all linear layers in it, embedding and head in as many bits as the budget leaves.

    Where even the smallest does not fit it is the smallest all the same, for comparison. Its rise is predicted without a
    factor, for those are measured for rounding in the metric.
    """
    layers = {one.name: whole("nf4") for one in facts}
    linear = sum(spec_bytes(layers[one.name], one.shape) for one in facts)
    sizes = {kind: linear + sum(part_bytes(kind, *table.shape) for table in tables) for kind in _common_kinds(tables)}
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])
    kind = next((kind for kind in kinds if sizes[kind] <= budget), kinds[-1])
    rise = sum(one.errors["nf4"] for one in facts) + sum(table.rises[kind] for table in tables)
    return Plan("plain nf4", layers, {table.name: kind for table in tables}, sizes[kind], rise)
