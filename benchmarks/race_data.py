"""The four works of training.py as rows and batches, and how many tokens of a batch have to be computed. No torch here."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

IGNORED = -100
RANDOM_LENGTHS = (512, 512)
# Below this share of padding another collator can gain no more than that, so none is tried.
PADDING_WORTH_A_TRIAL = 0.05


@dataclass(frozen=True)
class Work:
    """What is trained on: a name, a file of rows (None: random tokens), rows a step, and measured steps by default."""

    name: str
    title: str
    batch_size: int
    steps: int


WORKS = {
    work.name: work
    for work in (
        Work("random", "random text, 2 x 512 tokens, all supervised", 2, 3),
        Work("snips", "snips, batch 8, as the data comes", 8, 6),
        Work("banking77", "banking77, batch 8, all labels in each instruction", 8, 1),
        Work("e2e", "e2e, batch 16, prompt and completion", 16, 2),
    )
}


@dataclass(frozen=True)
class Row:
    """Tokens of one row and which of them are targets; supervised[t] asks for a prediction from the tokens before t."""

    ids: list[int]
    supervised: list[bool]

    @property
    def labels(self) -> list[int]:
        """The targets as Transformers takes them: the token, or -100 where there is no loss."""
        return [token if counts else IGNORED for token, counts in zip(self.ids, self.supervised, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """ids, and the runs of supervised tokens as [first, last + 1]."""
        edges = [t for t in range(len(self.ids) + 1) if self._at(t) != self._at(t - 1)]
        return {"ids": self.ids, "spans": [list(span) for span in zip(edges[::2], edges[1::2], strict=True)]}

    def _at(self, t: int) -> bool:
        return 0 <= t < len(self.supervised) and self.supervised[t]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Row:
        supervised = [False] * len(content["ids"])
        for first, end in content["spans"]:
            supervised[first:end] = [True] * (end - first)
        return cls(content["ids"], supervised)


Batch = list[Row]


@dataclass(frozen=True)
class Needed:
    """What one step over a batch has to compute, whoever computes it.

    tokens: of the rows as the data comes. supervised: targets among them. distinct: nodes of the tree of all prefixes,
    where rows that begin alike share nodes. reached: distinct tokens with something supervised behind them; what follows
    a row's last target plays no part. predicting: distinct tokens whose hidden state predicts a target.
    """

    tokens: int
    supervised: int
    distinct: int
    reached: int
    predicting: int

    def __add__(self, other: Needed) -> Needed:
        return Needed(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def needed(batch: Sequence[Row]) -> Needed:
    """Count a batch's tokens in the tree of its prefixes. A row's first token is never a target."""
    children: dict[tuple[int, int], int] = {}
    reached: set[int] = set()
    predicting: set[int] = set()
    targets = 0
    for row in batch:
        nodes, node = [], 0
        for token in row.ids:
            node = children.setdefault((node, token), len(children) + 1)
            nodes.append(node)
        wanted = [t - 1 for t in range(1, len(row.ids)) if row.supervised[t]]
        targets += len(wanted)
        predicting.update(nodes[t] for t in wanted)
        reached.update(nodes[: wanted[-1] + 1] if wanted else ())
    return Needed(sum(len(row.ids) for row in batch), targets, len(children), len(reached), len(predicting))


@dataclass(frozen=True)
class Weights:
    """Numbers in frozen matrices. everywhere: linear layers of the body that every token passes; last: those of the last
    layer that only predicting tokens need, all but keys and values; head: the output head."""

    everywhere: int
    last: int
    head: int


def useful_flops(weights: Weights, count: Needed) -> int:
    """4 (everywhere * reached + (last + head) * predicting): what a step of low-rank training cannot do without.

    It is 4 N T, 2 flops a weight and token forward and 2 for the gradient to the input, with what need not be computed
    left out: padding, prefixes that rows share but for once, tokens behind the last target, the head where nothing is
    supervised, and the last layer's queries, output and MLP there. Not counted either, though it must be computed:
    attention's scores, the low-rank terms, norms and other element-wise work, so a share made from this is a lower bound
    of what the step reaches. The gradient to the first layer's input is counted, though nothing needs it: 0.1 %.
    """
    return 4 * (weights.everywhere * count.reached + (weights.last + weights.head) * count.predicting)


def attention_flops(length: int, heads: int, head_size: int, layers: int) -> int:
    """Attention's own products over one causal row: 6 length (length + 1) heads head_size layers.

    length (length + 1) / 2 pairs of query and key, 2 head_size flops each, for scores and values forward and for four
    products backward; computing the scores a second time in backward is left out.
    """
    return 6 * length * (length + 1) * heads * head_size * layers


def random_rows(count: int, lengths: Sequence[int], vocabulary: int, seed: int) -> list[Row]:
    """Rows of random tokens, their lengths taken in turn, every token supervised that has one before it."""
    draw = random.Random(seed)
    rows = []
    for n in range(count):
        length = lengths[n % len(lengths)]
        rows.append(Row([draw.randrange(3, vocabulary) for _ in range(length)], [False] + [True] * (length - 1)))
    return rows


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. SystemExit if there is none."""
    with path.open(encoding="utf-8") as source:
        rows = [json.loads(line) for line in source if line.strip()]
    if not rows:
        raise SystemExit(f"a file of rows must hold at least one; {path} is empty.")
    return rows


def with_all_labels(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Classification rows with every label of the data listed in the instruction, in alphabetical order.

    rows: instruction, input and output, the output being the label. SystemExit for rows of another form.
    """
    rows = list(rows)
    strange = [n for n, row in enumerate(rows, 1) if not {"instruction", "input", "output"} <= row.keys()]
    if strange:
        raise SystemExit(f"classification rows have instruction, input and output; row {strange[0]} has not.")
    labels = sorted({row["output"] for row in rows})
    listed = f"Answer with one of these {len(labels)} labels and nothing else: {', '.join(labels)}."
    return [{**row, "instruction": f"{row['instruction'].strip()} {listed}"} for row in rows]


def batches_of(rows: Sequence[Row], size: int) -> list[Batch]:
    """Whole batches of `size` rows, in order."""
    return [list(rows[first : first + size]) for first in range(0, len(rows) - size + 1, size)]


def padded_tokens(batches: Iterable[Batch]) -> int:
    """Tokens computed where each batch is padded to its longest row."""
    return sum(len(batch) * max(len(row.ids) for row in batch) for batch in batches)


def padding_share(batches: Sequence[Batch]) -> float:
    """Padding among the tokens that padded batches compute, 0 to 1."""
    return 1 - sum(len(row.ids) for batch in batches for row in batch) / padded_tokens(batches)


def grouped(batches: Sequence[Batch]) -> list[Batch]:
    """The same rows in as many batches, sorted by length over all of them, the longest first: the least padding there is.

    A trainer that groups by length sorts within stretches of the data and so pads a little more.
    """
    size = len(batches[0])
    return batches_of(sorted((row for batch in batches for row in batch), key=lambda row: -len(row.ids)), size)


def write_batches(path: Path, batches: Sequence[Batch]) -> None:
    path.write_text(json.dumps([[row.to_json() for row in batch] for batch in batches]), encoding="utf-8")


def read_batches(path: Path) -> list[Batch]:
    return [[Row.from_json(row) for row in batch] for batch in json.loads(path.read_text(encoding="utf-8"))]
