"""The steps a run will make, known from the lengths of its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from luthier.config import RunConfig
from luthier.data import Example
from luthier.data.packing import cut_in_groups, needed_ids
from luthier.models.prefix_tree import sharing_order
from luthier.training.order import Order
from luthier.training.schedule import total_examples, total_steps

MOST_SIMULATED = 100_000


@dataclass(frozen=True)
class Packing:
    """How the steps fall into packs of at most so many tokens. largest: tokens of the largest pack; supervised_largest:
    the most supervised tokens in one; packs: the mean number in a step; most: the largest number in one step; tokens: the
    mean number of tokens in a step that are computed: a beginning that rows of a pack share once, no end without a target."""

    largest: int
    supervised_largest: int
    packs: float
    most: int
    tokens: float


@dataclass(frozen=True)
class Row:
    """Tokens of an example and how many of them carry loss; how many of its tokens a pack holds, and how many of those it
    begins with in common with the row before it."""

    tokens: int
    supervised: int
    laid: int
    shared: int = 0


@dataclass(frozen=True)
class Workload:
    """The rows in steps, each step's in the order in which they are packed.

    Of very long runs the first 100,000 rows drawn stand for all.
    """

    steps: list[list[Row]]
    total_steps: int
    longest: int
    _packings: dict[int, Packing] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def tokens_per_step(self) -> float:
        return sum(row.tokens for step in self.steps for row in step) / len(self.steps)

    @property
    def supervised_per_step(self) -> float:
        return sum(row.supervised for step in self.steps for row in step) / len(self.steps)

    @property
    def usual_length(self) -> int:
        """The length of the row that a token usually stands in: sum of squared lengths / sum of lengths."""
        lengths = [row.tokens for step in self.steps for row in step]
        return round(sum(length * length for length in lengths) / sum(lengths))

    def truncated(self, length: int) -> Workload:
        """The same with every row cut to `length` tokens."""
        steps = [
            [Row(*(min(count, length) for count in (row.tokens, row.supervised, row.laid, row.shared))) for row in step]
            for step in self.steps
        ]
        return Workload(steps, self.total_steps, min(self.longest, length))

    def packing(self, max_tokens: int) -> Packing:
        """The packs that `pack_examples` will make of the steps. Asked for often, so each answer is kept."""
        if max_tokens not in self._packings:
            self._packings[max_tokens] = self._count_packs(max_tokens)
        return self._packings[max_tokens]

    def _count_packs(self, max_tokens: int) -> Packing:
        packs = [_packs(step, max_tokens) for step in self.steps]
        every = [pack for step in packs for pack in step]
        return Packing(
            largest=max(tokens for tokens, _ in every),
            supervised_largest=max(supervised for _, supervised in every),
            packs=len(every) / len(packs),
            most=max(map(len, packs)),
            tokens=sum(tokens for tokens, _ in every) / len(packs),
        )


def workload(config: RunConfig, examples: Sequence[Example], *, share: bool = False) -> Workload:
    """The steps of the run that `config` describes over `examples`. share: as for `pack_examples`."""
    rows = [Row(len(example.ids), sum(example.supervised[1:]), len(example.ids)) for example in examples]
    drawn = total_examples(config, len(rows))
    order = Order(config.seed, len(rows))
    steps = []
    for start in range(0, min(drawn, MOST_SIMULATED), config.batch_size):
        numbers = order.row_numbers(start, min(start + config.batch_size, drawn))
        steps.append(_shared([rows[number] for number in numbers], [examples[number] for number in numbers], share))
    return Workload(steps, total_steps(config, len(rows)), max(row.tokens for row in rows))


def _shared(rows: list[Row], examples: list[Example], share: bool) -> list[Row]:
    if not share:
        return rows
    texts = [needed_ids(example) for example in examples]
    return [
        replace(rows[number], laid=len(texts[number]), shared=common)
        for number, common in zip(*sharing_order(texts), strict=True)
    ]


def _packs(step: list[Row], max_tokens: int) -> list[tuple[int, int]]:
    """(tokens, supervised tokens) of each pack of the step."""
    packs = []
    for group in cut_in_groups([row.laid for row in step], [row.shared for row in step], max_tokens):
        first, *others = (step[number] for number in group)
        tokens = first.laid + sum(row.laid - row.shared for row in others)
        packs.append((tokens, first.supervised + sum(row.supervised for row in others)))
    return packs
