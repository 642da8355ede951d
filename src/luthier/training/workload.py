"""The steps a run will make, known from the lengths of its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.config import RunConfig
from luthier.data import Example
from luthier.training.order import Order
from luthier.training.schedule import total_examples, total_steps

MOST_SIMULATED = 100_000


@dataclass(frozen=True)
class Packing:
    """How the steps fall into packs of at most so many tokens. largest: tokens of the largest pack; supervised_largest:
    the most supervised tokens in one; packs: the mean number in a step; most: the largest number in one step."""

    largest: int
    supervised_largest: int
    packs: float
    most: int


@dataclass(frozen=True)
class Workload:
    """The rows as (tokens, supervised tokens) in steps, in the order the run will draw them.

    Of very long runs the first 100,000 rows drawn stand for all.
    """

    steps: list[list[tuple[int, int]]]
    total_steps: int
    longest: int

    @property
    def tokens_per_step(self) -> float:
        return sum(tokens for step in self.steps for tokens, _ in step) / len(self.steps)

    @property
    def supervised_per_step(self) -> float:
        return sum(supervised for step in self.steps for _, supervised in step) / len(self.steps)

    @property
    def usual_length(self) -> int:
        """The length of the row that a token usually stands in: sum of squared lengths / sum of lengths."""
        lengths = [tokens for step in self.steps for tokens, _ in step]
        return round(sum(length * length for length in lengths) / sum(lengths))

    def truncated(self, length: int) -> Workload:
        """The same with every row cut to `length` tokens."""
        steps = [[(min(tokens, length), min(supervised, length)) for tokens, supervised in step] for step in self.steps]
        return Workload(steps, self.total_steps, min(self.longest, length))

    def packing(self, max_tokens: int) -> Packing:
        """The packs that `pack_examples` will make of the steps."""
        counts = []
        largest = supervised_largest = 0
        for step in self.steps:
            packs = _packs(step, max_tokens)
            counts.append(len(packs))
            largest = max(largest, *(tokens for tokens, _ in packs))
            supervised_largest = max(supervised_largest, *(supervised for _, supervised in packs))
        return Packing(largest, supervised_largest, sum(counts) / len(counts), max(counts))


def workload(config: RunConfig, examples: Sequence[Example]) -> Workload:
    """The steps of the run that `config` describes over `examples`."""
    rows = [(len(example.ids), sum(example.supervised[1:])) for example in examples]
    drawn = total_examples(config, len(rows))
    order = Order(config.seed, len(rows))
    steps = []
    for start in range(0, min(drawn, MOST_SIMULATED), config.batch_size):
        numbers = order.row_numbers(start, min(start + config.batch_size, drawn))
        steps.append([rows[number] for number in numbers])
    return Workload(steps, total_steps(config, len(rows)), max(tokens for tokens, _ in rows))


def _packs(step: list[tuple[int, int]], max_tokens: int) -> list[tuple[int, int]]:
    """(tokens, supervised tokens) of each pack: rows in order, a new pack where the next one would not fit."""
    packs = [(0, 0)]
    for tokens, supervised in step:
        if packs[-1][0] and packs[-1][0] + tokens > max_tokens:
            packs.append((0, 0))
        packs[-1] = (packs[-1][0] + tokens, packs[-1][1] + supervised)
    return packs
