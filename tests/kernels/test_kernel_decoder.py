"""The native stack of decoder layers over pages of keys and values, against a whole-text computation in float64."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from kernel_checks import assert_same_for_all_threads, relative_error
from stored import random_storage
from torch import Tensor

from luthier.errors import ShapeError
from luthier.kernels import Storage
from luthier.kernels.decoder import PAGE, Decoder, FactoredPart, LayerParts, NormPart
from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.linear_ops import Part, Term

HIDDEN, HEADS, KV_HEADS, SIZE, WIDE, VOCABULARY, LAYERS, POSITIONS = 64, 4, 2, 16, 96, 50, 2, 200
QUERIES, KEYS = HEADS * SIZE, KV_HEADS * SIZE


@dataclass(frozen=True)
class Recipe:
    """What a stack computes, and how its matrices are stored."""

    kind: str = "f32"
    joined: bool = False  # q, k, v as one layer, gate and up too
    extras: bool = False  # biases, low-rank terms, norms of heads and behind each half, weights counted from one
    rank: int = 3  # of the terms
    gate: int = 0
    softcap: float = 0.0
    windows: tuple[int, int] = (0, 0)
    rotary_size: int = SIZE
    head: bool = True


RECIPES = {
    "plain": Recipe(),
    "no head": Recipe(head=False),
    "joined": Recipe(joined=True),
    "extras": Recipe(extras=True, gate=1),
    "ranks of more than one block": Recipe(extras=True, rank=40),
    "all": Recipe("q8_0", joined=True, extras=True, gate=1, softcap=2.0, windows=(7, 70), rotary_size=8),
    "window": Recipe(windows=(0, 9)),
    "softcap": Recipe("bf16", softcap=1.5),
    **{kind: Recipe(kind, extras=True) for kind in ("nf4-double", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")},
}


class Numbers:
    """Random parts, the same for the same seed."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.generator, self.seed = recipe, torch.Generator().manual_seed(3), 0

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def part(self, outputs: int, inputs: int) -> Part:
        self.seed += 1
        kind = self.recipe.kind
        if kind in ("f32", "bf16"):
            storage = Storage.dense((self(outputs, inputs) / inputs**0.5).to({"f32": torch.float32}.get(kind, torch.bfloat16)))
        else:
            storage = random_storage(kind, outputs, inputs, self.seed)
        if not self.recipe.extras:
            return Part(storage)
        rank = self.recipe.rank
        return Part(
            storage, self(outputs), Term(self(rank, inputs) / inputs**0.5, self(outputs, rank), 0.5 * (3 / rank) ** 0.5)
        )

    def norm(self, width: int) -> NormPart:
        return NormPart(1 + 0.1 * self(width), 1e-6) if not self.recipe.extras else NormPart(0.1 * self(width), 1e-5, 1.0)

    def maybe_norm(self, width: int) -> NormPart | None:
        return self.norm(width) if self.recipe.extras else None

    def layer(self, number: int) -> LayerParts:
        r = self.recipe
        return LayerParts(
            norm=self.norm(HIDDEN), mlp_norm=self.norm(HIDDEN),
            projections=[self.part(n, HIDDEN) for n in ([QUERIES + 2 * KEYS] if r.joined else [QUERIES, KEYS, KEYS])],
            output=self.part(HIDDEN, QUERIES), down=self.part(HIDDEN, WIDE),
            gates=[self.part(n, HIDDEN) for n in ([2 * WIDE] if r.joined else [WIDE, WIDE])],
            gate=r.gate, scale=0.3, rotary=number % 2, softcap=r.softcap, window=r.windows[number],
            query_norm=self.maybe_norm(SIZE), key_norm=self.maybe_norm(SIZE),
            attention_post=self.maybe_norm(HIDDEN), mlp_post=self.maybe_norm(HIDDEN),
        )  # fmt: skip


class Model:
    """A small stack, its oracle, and pages that hold NaN where nothing was stored."""

    def __init__(self, recipe: Recipe = RECIPES["plain"], numbers: Numbers | None = None):
        numbers = numbers or Numbers(recipe)
        self.recipe = recipe
        self.layers = [numbers.layer(number) for number in range(LAYERS)]
        self.norm, self.head = numbers.norm(HIDDEN), numbers.part(VOCABULARY, HIDDEN) if recipe.head else None
        angles = numbers(2, POSITIONS, recipe.rotary_size)
        self.tables = [(angle.cos(), angle.sin()) for angle in angles]
        self.decoder = self.made()
        self.store = torch.full((12, self.decoder.page_floats), float("nan"))
        self.pages = [page.data_ptr() for page in self.store]

    def made(self, layers: Sequence[LayerParts] | None = None, **changed) -> Decoder:
        sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "size": SIZE, **changed}
        return Decoder(self.layers if layers is None else layers, self.norm, self.head, **sizes)

    def step(self, embeddings: Tensor, positions, pages, rows=None) -> tuple[Tensor, Tensor | None]:
        rows = range(len(positions)) if rows is None else rows
        positions, pages, rows = torch.tensor(positions), torch.tensor(pages), torch.tensor(list(rows), dtype=torch.int64)
        return self.decoder.step(embeddings.clone(), positions, pages, self.tables, rows)

    def exact(self, embeddings: Tensor) -> list[Tensor]:
        """Of a whole text (n, HIDDEN): what stands behind the final norm, and logits, in float64."""
        x = embeddings.double()
        for layer in self.layers:
            x = x + self._attention(layer, x)
            gate, up = torch.cat([linear(part, norm(layer.mlp_norm, x)) for part in layer.gates], 1).chunk(2, 1)
            active = torch.nn.functional.silu(gate) if layer.gate == 0 else torch.nn.functional.gelu(gate, approximate="tanh")
            x = x + norm(layer.mlp_post, linear(layer.down, active * up))
        normed = norm(self.norm, x)
        return [normed] if self.head is None else [normed, linear(self.head, normed)]

    def _attention(self, layer: LayerParts, x: Tensor) -> Tensor:
        n = len(x)
        joined = torch.cat([linear(part, norm(layer.norm, x)) for part in layer.projections], 1)
        q, k, v = (piece.view(n, -1, SIZE) for piece in joined.split([QUERIES, KEYS, KEYS], 1))
        q, k = self._turned(norm(layer.query_norm, q), layer), self._turned(norm(layer.key_norm, k), layer)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        z = torch.einsum("thd,shd->hts", q, k) * layer.scale
        if layer.softcap:
            z = layer.softcap * torch.tanh(z / layer.softcap)
        behind = torch.arange(n)[:, None] - torch.arange(n)
        seen = (behind >= 0) & (behind < (layer.window or n))
        out = torch.einsum("hts,shd->thd", z.masked_fill(~seen, -torch.inf).softmax(2), v)
        return norm(layer.attention_post, linear(layer.output, out.reshape(n, QUERIES)))

    def _turned(self, heads: Tensor, layer: LayerParts) -> Tensor:
        cos, sin = (table[: len(heads), None].double() for table in self.tables[layer.rotary])
        turned, rest = heads[:, :, : cos.shape[2]], heads[:, :, cos.shape[2] :]
        a, b = turned.chunk(2, 2)
        return torch.cat([turned * cos + torch.cat([-b, a], 2) * sin, rest], 2)


def linear(part: Part | FactoredPart, x: Tensor) -> Tensor:
    y = factored(part, x) if isinstance(part, FactoredPart) else x @ dequantize_reference(part.storage).double().T
    y = y if part.bias is None else y + part.bias
    return y if part.term is None else y + part.term.scaling * (x @ part.term.A.double().T) @ part.term.B.double().T


def factored(part: FactoredPart, x: Tensor) -> Tensor:
    inner = x @ dequantize_reference(part.right).double().T
    y = inner @ dequantize_reference(part.left).double().T
    if part.places is not None:
        return torch.cat([inner, y], 1)[:, part.places.long()]
    return y if part.base is None else y + x @ dequantize_reference(part.base).double().T


def norm(part: NormPart | None, x: Tensor) -> Tensor:
    if part is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + part.eps).rsqrt() * (part.weight.double() + part.plus)


@dataclass(frozen=True)
class Factoring:
    """How factors are stored, and what stands with them. pivoted: some outputs are rows of right x as they are."""

    kind: str
    rank: int
    pivoted: bool = False
    base: str | None = None
    extras: bool = False


FACTORINGS = [
    Factoring("bf16", 24),
    Factoring("bf16", 19, pivoted=True, extras=True),
    Factoring("bf16", 7, base="q4_1", extras=True),
    Factoring("nf4", 64),
    Factoring("nf4", 64, pivoted=True),
    Factoring("nf4-double", 40, pivoted=True, extras=True),
    Factoring("nf4", 33, base="nf4"),
    Factoring("q8_0", 32),
]


class FactoredNumbers(Numbers):
    """Layers of factors; those of one input have the same right factor where the ranks allow it."""

    def __init__(self, factoring: Factoring):
        super().__init__(Recipe(extras=factoring.extras))
        self.factoring = factoring

    def stored(self, kind: str, rows: int, columns: int) -> Storage:
        self.seed += 1
        if kind == "bf16":
            return Storage.dense((self(rows, columns) / columns**0.5).to(torch.bfloat16))
        return random_storage(kind, rows, columns, self.seed)

    def factored(self, outputs: int, right: Storage) -> FactoredPart:
        f, rank = self.factoring, right.shape[0]
        left = self.stored(f.kind, outputs - rank if f.pivoted else outputs, rank)
        places = torch.randperm(outputs, generator=self.generator).to(torch.int32) if f.pivoted else None
        base = None if f.base is None else self.stored(f.base, outputs, right.shape[1])
        if not f.extras:
            return FactoredPart(left, right, base, places)
        term = Term(self(3, right.shape[1]) / right.shape[1] ** 0.5, self(outputs, 3), 0.5)
        return FactoredPart(left, right, base, places, self(outputs), term)

    def group(self, inputs: int, *outputs: int) -> list[FactoredPart]:
        """Layers of one input. Narrow ones take a right factor of their own, of fewer rows."""
        f = self.factoring
        shared = self.stored(f.kind, f.rank, inputs)
        own = [shared if n - f.pivoted >= f.rank else self.stored(f.kind, n // 2, inputs) for n in outputs]
        return [self.factored(n, right) for n, right in zip(outputs, own, strict=True)]

    def layer(self, number: int) -> LayerParts:
        return replace(
            super().layer(number),
            projections=self.group(HIDDEN, QUERIES, KEYS, KEYS), gates=self.group(HIDDEN, WIDE, WIDE),
            output=self.group(QUERIES, HIDDEN)[0], down=self.group(WIDE, HIDDEN)[0],
        )  # fmt: skip


def texts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randn(length, HIDDEN, generator=generator) for length in lengths]


def run_interleaved(
    model: Model, embeddings: list[Tensor], tables: list[list[int]], begin: Sequence[int]
) -> list[list[Tensor]]:
    """Normed states and logits of each text i from token begin[i] on, in steps of 1 to 33 tokens of any texts, in any order."""
    turns, at = random.Random(4), list(begin)
    results: list[list] = [[None] * len(text) for text in embeddings]
    while any(place < len(text) for place, text in zip(at, embeddings, strict=True)):
        chosen: list[tuple[int, int]] = []
        for _ in range(turns.choice((1, 1, 2, 3, 4, 9, 33))):
            open_texts = [i for i, text in enumerate(embeddings) if at[i] < len(text)]
            if open_texts:
                i = turns.choice(open_texts)
                chosen.append((i, at[i]))
                at[i] += 1
        turns.shuffle(chosen)
        tokens = torch.stack([embeddings[i][place] for i, place in chosen])
        outputs = model.step(tokens, [place for _, place in chosen], [tables[i] for i, _ in chosen])
        for row, (i, place) in enumerate(chosen):
            results[i][place] = [y[row] for y in outputs if y is not None]
    return [
        [torch.stack(column) for column in zip(*rows[first:], strict=True)] for rows, first in zip(results, begin, strict=True)
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_steps_over_several_texts_agree_with_float64(name):
    model, embeddings = Model(RECIPES[name]), texts(3, 70, 135)
    tables = [[*model.pages[4 * i : 4 * i + 3]] for i in range(3)]
    # Blocks of GGUF files meet one or two tokens in fixed point of 16 bits.
    bound = 1e-4 if RECIPES[name].kind.startswith("q") else 1e-5
    for got, text in zip(run_interleaved(model, embeddings, tables, (0, 0, 0)), embeddings, strict=True):
        expected = model.exact(text)
        assert len(got) == len(expected)
        for result, want in zip(got, expected, strict=True):
            assert relative_error(result, want) <= bound


@pytest.mark.parametrize("factoring", FACTORINGS, ids=str)
def test_layers_of_factors_agree_with_float64(factoring):
    numbers = FactoredNumbers(factoring)
    model, embeddings = Model(numbers.recipe, numbers), texts(3, 70)
    tables = [model.pages[:2], model.pages[4:6]]
    bound = 1e-4 if "q" in f"{factoring.kind} {factoring.base}" else 1e-5
    for got, text in zip(run_interleaved(model, embeddings, tables, (0, 0)), embeddings, strict=True):
        for result, want in zip(got, model.exact(text), strict=True):
            assert relative_error(result, want) <= bound


def test_factors_with_places_and_a_base_are_refused():
    numbers = FactoredNumbers(Factoring("bf16", 8, pivoted=True))
    model = Model()
    down = replace(numbers.group(WIDE, HIDDEN)[0], base=Storage.dense(torch.zeros(HIDDEN, WIDE)))
    with pytest.raises(ShapeError, match="a layer with places has no base; got both"):
        model.made([replace(model.layers[0], down=down)])


@pytest.mark.parametrize("name", ["plain", "window", "all"])
def test_texts_may_share_the_pages_of_what_they_begin_with(name):
    model, (beginning, *ends) = Model(RECIPES[name]), texts(PAGE, 70, 3)
    embeddings = [torch.cat([beginning, end]) for end in ends]
    model.step(beginning, range(PAGE), [[model.pages[0]]] * PAGE, [PAGE - 1])
    kept = model.store[0].clone()
    tables = [[model.pages[0], *model.pages[1 + 2 * i : 3 + 2 * i]] for i in range(2)]
    for got, text in zip(run_interleaved(model, embeddings, tables, (PAGE, PAGE)), embeddings, strict=True):
        for result, want in zip(got, model.exact(text), strict=True):
            assert relative_error(result, want[PAGE:]) <= 1e-4
    assert torch.equal(model.store[0], kept)


def test_fill_stores_what_a_step_would_have():
    model, (text,) = Model(RECIPES["extras"]), texts(80)
    one, other = model.pages[:2], model.pages[4:6]
    model.step(text[:79], range(79), [one] * 79, [])
    for layer in range(LAYERS):
        stored = model.store[:2].view(2, LAYERS, 2, -1)[:, layer]
        keys = stored[:, 0].view(2, KV_HEADS, SIZE, PAGE).permute(0, 3, 1, 2).reshape(2 * PAGE, KV_HEADS, SIZE)
        values = stored[:, 1].view(2, KV_HEADS, PAGE, SIZE).transpose(1, 2).reshape(2 * PAGE, KV_HEADS, SIZE)
        order = torch.randperm(79, generator=torch.Generator().manual_seed(layer))
        addresses = torch.tensor(other)[order // PAGE]
        model.decoder.fill(layer, keys.contiguous(), values.contiguous(), order, addresses, order % PAGE)
    for kept, filled in zip(model.store[:2], model.store[4:6], strict=True):
        assert torch.equal(kept.nan_to_num(7), filled.nan_to_num(7))
    for first, second in zip(*(model.step(text[79:], [79], [pages]) for pages in (one, other)), strict=True):
        assert torch.equal(first, second)


def test_results_are_the_same_bits_for_every_number_of_threads():
    def run() -> list[Tensor]:
        model = Model(RECIPES["all"])
        tables = [model.pages[:3], model.pages[4:7]]
        return [y for results in run_interleaved(model, texts(20, 90), tables, (0, 0)) for y in results]

    assert_same_for_all_threads(run)


@pytest.mark.parametrize("name", ["plain", "q4_0"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_own_text_alone(name, value):
    model, (one, other) = Model(RECIPES[name]), texts(2, 2)
    one[0, 5] = value
    tokens, tables = torch.stack([one[0], other[0], one[1], other[1]]), [model.pages[:1], model.pages[1:2]] * 2
    normed, logits = model.step(tokens, [0, 0, 1, 1], tables)
    assert logits is not None
    for result in (normed, logits):
        assert result[[0, 2]].isnan().any(1).all()
        assert result[[1, 3]].isfinite().all()


def test_rows_choose_whose_results_are_wanted():
    model, (text,) = Model(), texts(6)
    every = model.step(text, range(6), [model.pages[:1]] * 6)
    some = model.step(text, range(6), [model.pages[:1]] * 6, [4, 1, 4])
    for whole, chosen in zip(every, some, strict=True):
        assert relative_error(chosen, whole[[4, 1, 4]]) <= 1e-6  # the head adds in another order for another number of rows
    assert model.step(text, range(6), [model.pages[:1]] * 6, [])[0].shape == (0, HIDDEN)


REFUSED = r"lt_decode_step refused its arguments \(status 1\)"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, HIDDEN + 1)}, r"hidden must have shape \(\*, 64\); got \(2, 65\)"),
        ({"hidden": torch.zeros(2, HIDDEN).double()}, r"hidden must be torch.float32; got torch.float64"),
        ({"hidden": torch.zeros(HIDDEN, 2).T}, "hidden must be contiguous"),
        ({"positions": torch.tensor([0])}, r"positions must have shape \(2\); got \(1,\)"),
        ({"positions": torch.tensor([0, 1], dtype=torch.int32)}, r"positions must be torch.int64"),
        ({"positions": torch.tensor([0, -1])}, REFUSED),
        ({"positions": torch.tensor([0, PAGE])}, REFUSED),
        ({"pages": torch.zeros(1, 1, dtype=torch.int64)}, r"pages must have shape \(2, \*\); got \(1, 1\)"),
        ({"pages": torch.zeros(2, 1, dtype=torch.int64)}, REFUSED),
        ({"pages": torch.zeros(2, 0, dtype=torch.int64)}, REFUSED),
        ({"rows": torch.tensor([2])}, REFUSED),
        ({"rows": torch.tensor([-1])}, REFUSED),
        ({"rows": torch.tensor([0, 1, 1])}, REFUSED),
        ({"tables": []}, REFUSED),
        ({"tables": [(torch.ones(1, SIZE),) * 2] * 2}, REFUSED),
        ({"tables": [(torch.ones(POSITIONS, SIZE + 2),) * 2] * 2}, REFUSED),
        ({"tables": [(torch.ones(POSITIONS, 3),) * 2] * 2}, REFUSED),
        ({"tables": [(torch.ones(5, SIZE), torch.ones(4, SIZE))] * 2}, r"sin must have shape \(5, 16\); got \(4, 16\)"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(changed, message):
    model = Model()
    fitting = {
        "hidden": torch.zeros(2, HIDDEN),
        "positions": torch.tensor([0, 1]),
        "pages": torch.tensor([model.pages[:1]] * 2),
        "tables": model.tables,
        "rows": torch.tensor([0, 1]),
    }
    model.decoder.step(**fitting)
    with pytest.raises(ShapeError, match=message):
        model.decoder.step(**{**fitting, **changed})


def part(outputs: int, inputs: int, **more) -> Part:
    return Part(Storage.dense(torch.zeros(outputs, inputs)), **more)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm": NormPart(torch.ones(HIDDEN - 1), 1e-6)}, r"norm's weight must have shape \(64\); got \(63,\)"),
        ({"mlp_norm": NormPart(torch.ones(HIDDEN + 1), 1e-6)}, r"mlp_norm's weight must have shape \(64\); got \(65,\)"),
        ({"attention_post": NormPart(torch.ones(2), 1e-6)}, r"attention_post's weight must have shape \(64\); got \(2,\)"),
        ({"mlp_post": NormPart(torch.ones(2), 1e-6)}, r"mlp_post's weight must have shape \(64\); got \(2,\)"),
        ({"query_norm": NormPart(torch.ones(HIDDEN), 1e-6)}, r"query_norm's weight must have shape \(16\); got \(64,\)"),
        ({"key_norm": NormPart(torch.ones(8), 1e-6)}, r"key_norm's weight must have shape \(16\); got \(8,\)"),
        ({"norm": NormPart(torch.ones(HIDDEN).double(), 1e-6)}, r"norm's weight must be torch.float32; got torch.float64"),
        ({"projections": [part(QUERIES, HIDDEN)] * 4}, "projections are 1 or 3 layers; got 4"),
        ({"projections": [part(QUERIES, HIDDEN)] * 2}, "projections are 1 or 3 layers; got 2"),
        ({"gates": [part(WIDE, HIDDEN)] * 3}, "gates are 1 or 2 layers; got 3"),
        ({"gates": []}, "gates are 1 or 2 layers; got 0"),
        ({"down": part(HIDDEN, WIDE, bias=torch.ones(2))}, r"bias must have shape \(64\); got \(2,\)"),
        ({"down": part(HIDDEN, WIDE, term=Term(torch.ones(2, 8), torch.ones(HIDDEN, 2)))}, r"A must have shape \(\*, 96\)"),
        ({"down": part(HIDDEN, WIDE, term=Term(torch.ones(2, WIDE), torch.ones(HIDDEN, 3)))}, r"B must have shape \(64, 2\)"),
    ],
)
def test_layers_that_do_not_fit_are_refused(changed, message):
    model = Model()
    with pytest.raises(ShapeError, match=message):
        model.made([replace(model.layers[0], **changed)])


@pytest.mark.parametrize(
    "changed",
    [
        {"output": part(HIDDEN, QUERIES + 1)},
        {"output": part(HIDDEN - 1, QUERIES)},
        {"down": part(HIDDEN, WIDE - 1)},
        {"output": Part(Storage.dense(torch.zeros(QUERIES, HIDDEN), transposed=True))},
        {"projections": [part(QUERIES, HIDDEN), part(KEYS, HIDDEN), part(KEYS - 1, HIDDEN)]},
        {"projections": [part(QUERIES, HIDDEN)]},
        {"gates": [part(WIDE, HIDDEN), part(WIDE - 1, HIDDEN)]},
        {"gates": [part(2 * WIDE - 1, HIDDEN)]},
        {"gate": 2},
        {"rotary": 2},
        {"rotary": -1},
        {"window": -1},
    ],
)
def test_layers_that_the_library_cannot_run_are_refused_at_the_step(changed):
    model = Model()
    model.decoder = model.made([replace(model.layers[0], **changed)])
    with pytest.raises(ShapeError, match=REFUSED):
        model.step(torch.zeros(1, HIDDEN), [0], [model.pages[:1]])


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"kv_heads": 0}, {"kv_heads": 3}, {"size": 1}])
def test_heads_that_do_not_share_keys_evenly_are_refused(sizes):
    model = Model()
    model.decoder = model.made(**sizes)
    with pytest.raises(ShapeError, match=REFUSED):
        model.step(torch.zeros(1, HIDDEN), [0], [model.pages[:1]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": LAYERS}, "layer is one of 0 to 1; got 2"),
        ({"layer": -1}, "layer is one of 0 to 1; got -1"),
        ({"k": torch.zeros(2, KV_HEADS, SIZE + 1)}, r"k must have shape \(\*, 2, 16\)"),
        ({"v": torch.zeros(3, KV_HEADS, SIZE)}, r"v must have shape \(2, 2, 16\)"),
        ({"sources": torch.tensor([0, 2])}, "sources are rows of k, below 2; got 2"),
        ({"sources": torch.tensor([0, -1])}, "lt_cache_fill refused its arguments"),
        ({"slots": torch.tensor([0, PAGE])}, "lt_cache_fill refused its arguments"),
        ({"slots": torch.tensor([0, -1])}, "lt_cache_fill refused its arguments"),
        ({"slots": torch.tensor([0])}, r"slots must have shape \(2\)"),
        ({"pages": torch.tensor([0, 0])}, "lt_cache_fill refused its arguments"),
    ],
)
def test_a_fill_that_does_not_fit_is_refused(changed, message):
    model = Model()
    rows = torch.zeros(2, KV_HEADS, SIZE)
    places = {"sources": torch.tensor([0, 1]), "pages": torch.tensor(model.pages[:2]), "slots": torch.tensor([0, 1])}
    fitting = {"layer": 0, "k": rows, "v": rows, **places}
    model.decoder.fill(**fitting)
    with pytest.raises(ShapeError, match=message):
        model.decoder.fill(**{**fitting, **changed})


@pytest.mark.parametrize("kind", ["q4_k", "q5_k", "q6_k"])
def test_blocks_of_256_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows must be multiples of 256, so the whole model is wider."""
    for name, value in {"HIDDEN": 256, "SIZE": 64, "QUERIES": 256, "KEYS": 128, "WIDE": 256}.items():
        monkeypatch.setitem(globals(), name, value)
    model, (text,) = Model(Recipe(kind, rotary_size=64)), texts(70)
    (got,) = run_interleaved(model, [text], [model.pages[:2]], (0,))
    for result, want in zip(got, model.exact(text), strict=True):
        assert relative_error(result, want) <= 1e-4
