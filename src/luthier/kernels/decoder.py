"""A stack of decoder layers as one native call a step, over cached keys and values in pages: the C side of generation.

There is no reference op: without the library a model generates through Transformers' own modules, which is the oracle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import ShapeError
from luthier.kernels import native
from luthier.kernels.linear_native import Factors, Matrix, _Linear, _linear, _matrix, with_small
from luthier.kernels.linear_ops import Part, Term
from luthier.kernels.storage import Storage

PAGE = 64  # positions of a page, as kPage in csrc/decode.h

F32 = torch.float32
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class NormPart:
    """x / sqrt(mean(x^2) + eps) * (weight + plus). weight: float32, contiguous."""

    weight: Tensor
    eps: float
    plus: float = 0.0


@dataclass(frozen=True, eq=False)
class FactoredPart:
    """One linear layer whose matrix is base + left right, or with places rows of right and of left right.

    right: (rank, in_features); left: (rows, rank); base: (out_features, in_features) or None; places: int32
    (out_features,) or None. Layers with the same `right` storage object multiply it once.
    """

    left: Storage
    right: Storage
    base: Storage | None = None
    places: Tensor | None = None
    bias: Tensor | None = None
    term: Term | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.left.shape[0] if self.places is None else len(self.places), self.right.shape[1]


@dataclass(frozen=True, eq=False)
class LayerParts:
    """A decoder layer (models/blocks/description.py says what it computes).

    projections: q, k, v or the one layer that gives them side by side; gates: gate and up, or the one that gives both.
    gate: the number of the activation; rotary: which of a step's tables; window and softcap 0 for none.
    """

    norm: NormPart
    projections: Sequence[AnyPart]
    output: AnyPart
    mlp_norm: NormPart
    gates: Sequence[AnyPart]
    down: AnyPart
    gate: int
    scale: float
    rotary: int = 0
    softcap: float = 0.0
    window: int = 0
    query_norm: NormPart | None = None
    key_norm: NormPart | None = None
    attention_post: NormPart | None = None
    mlp_post: NormPart | None = None


AnyPart = Part | FactoredPart
# The norms of a layer in the order of its C structure, and whether each is of hidden states or of heads.
NORMS = (
    ("norm", True),
    ("query_norm", False),
    ("key_norm", False),
    ("attention_post", True),
    ("mlp_norm", True),
    ("mlp_post", True),
)


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("eps", c_float), ("plus", c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name, _ in NORMS),
        ("projections", _Linear * 3),
        ("output", _Linear),
        ("gates", _Linear * 2),
        ("down", _Linear),
        ("projection_count", c_int32),
        ("gate_count", c_int32),
        ("gate", c_int32),
        ("rotary", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("window", c_int64),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", c_void_p),
        *((name, c_int64) for name in ("layer_count", "hidden", "heads", "kv_heads", "size")),
        ("norm", _Norm),
        ("head", _Linear),
    )


class _Rotary(ctypes.Structure):
    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("length", c_int64), ("size", c_int64))


class _Step(ctypes.Structure):
    _fields_ = (
        ("T", c_int64),
        ("hidden", c_void_p),
        ("positions", c_void_p),
        ("pages", c_void_p),
        ("most_pages", c_int64),
        ("rotary", c_void_p),
        ("rotary_count", c_int64),
        ("rows", c_void_p),
        ("S", c_int64),
        ("normed", c_void_p),
        ("logits", c_void_p),
    )


class Decoder:
    """All layers, the final norm and, where `head` is given, the output head, ready for `step`.

    heads query heads and kv_heads key heads of `size` values. It points into the parts' tensors and keeps them alive;
    what is done to their numbers later shows in later steps. Raises ShapeError for parts that do not fit their shapes.
    """

    def __init__(
        self,
        layers: Sequence[LayerParts],
        norm: NormPart,
        head: Part | None,
        *,
        heads: int,
        kv_heads: int,
        size: int,
    ):
        self._kept: list[object] = [layers, norm, head]
        self._rights: dict[int, Matrix] = {}
        self._size, self._kv_heads, self._layer_count = size, kv_heads, len(layers)
        self.hidden = norm.weight.numel()
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self.vocabulary = 0 if head is None else head.storage.shape[0]
        own = _norm(norm, "norm", self.hidden)
        sizes = (len(layers), self.hidden, heads, kv_heads, size)
        self._decoder = _Decoder(ctypes.addressof(self._layers), *sizes, own, self._part(head))

    @property
    def page_floats(self) -> int:
        """Numbers in a page: keys and values of PAGE positions in all layers, float32."""
        return self._layer_count * self._layer_floats

    @property
    def _layer_floats(self) -> int:
        return 2 * self._kv_heads * self._size * PAGE

    def step(
        self, hidden: Tensor, positions: Tensor, pages: Tensor, tables: Sequence[Tables], rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Run T tokens through all layers. Their keys and values are stored in their pages and read with those before.

        hidden: (T, hidden) float32, the embeddings; overwritten. positions: (T,) int64, of each token in its text.
        pages: (T, P) int64, the addresses of the pages of each token's text, enough for its position; tokens of one text
        may come together. tables: cos and sin of all positions, (positions, R) float32 each. rows: (S,) int64 of the
        tokens whose results are wanted. -> (S, hidden) after the final norm, and logits (S, vocabulary) with a head.
        Raises ShapeError for other shapes, positions without a page, and positions beyond the tables.
        """
        tokens = native.check_tensor(hidden, "hidden", F32, (None, self.hidden)).shape[0]
        native.check_tensor(positions, "positions", torch.int64, (tokens,))
        native.check_tensor(pages, "pages", torch.int64, (tokens, None))
        native.check_tensor(rows, "rows", torch.int64, (None,))
        rotary = (_Rotary * len(tables))(*map(_rotary, tables))
        normed = hidden.new_empty(len(rows), self.hidden)
        logits = hidden.new_empty(len(rows), self.vocabulary) if self.vocabulary else None
        step = _Step(
            tokens, hidden.data_ptr(), positions.data_ptr(), pages.data_ptr(), pages.shape[1], ctypes.addressof(rotary),
            len(tables), rows.data_ptr(), len(rows), normed.data_ptr(), None if logits is None else logits.data_ptr(),
        )  # fmt: skip
        call = native.entry("lt_decode_step", c_void_p, c_void_p, c_int)
        call(ctypes.addressof(self._decoder), ctypes.addressof(step), native.threads())
        return normed, logits

    def fill(self, layer: int, k: Tensor, v: Tensor, sources: Tensor, pages: Tensor, slots: Tensor) -> None:
        """Store keys and values of one layer: row sources[i] of k and v goes to slot slots[i] of the page at pages[i].

        k, v: (T, kv_heads, size) float32, keys after the rotary embedding; the others (N,) int64. Raises ShapeError.
        """
        if not 0 <= layer < self._layer_count:
            raise ShapeError(f"layer is one of 0 to {self._layer_count - 1}; got {layer}.")
        tokens = native.check_tensor(k, "k", F32, (None, self._kv_heads, self._size)).shape[0]
        native.check_tensor(v, "v", F32, tuple(k.shape))
        for name, tensor in (("sources", sources), ("pages", pages), ("slots", slots)):
            native.check_tensor(tensor, name, torch.int64, (len(sources),))
        if len(sources) and int(sources.max()) >= tokens:
            raise ShapeError(f"sources are rows of k, below {tokens}; got {int(sources.max())}.")
        call = native.entry("lt_cache_fill", c_void_p, c_void_p, c_int64, *[c_void_p] * 3, *[c_int64] * 3, c_int)
        call(
            k.data_ptr(), v.data_ptr(), len(sources), sources.data_ptr(), pages.data_ptr(), slots.data_ptr(),
            self._kv_heads, self._size, layer * self._layer_floats, native.threads(),
        )  # fmt: skip

    def _layer(self, layer: LayerParts) -> _Layer:
        _check_count("projections", layer.projections, 3)
        _check_count("gates", layer.gates, 2)
        own = _Layer(
            *(_norm(getattr(layer, name), name, self.hidden if of_hidden else self._size) for name, of_hidden in NORMS),
            output=self._part(layer.output), down=self._part(layer.down), gate=layer.gate, rotary=layer.rotary,
            projection_count=len(layer.projections), gate_count=len(layer.gates),
            scale=layer.scale, softcap=layer.softcap, window=layer.window,
        )  # fmt: skip
        for number, part in enumerate(layer.projections):
            own.projections[number] = self._part(part)
        for number, part in enumerate(layer.gates):
            own.gates[number] = self._part(part)
        return own

    def _part(self, part: AnyPart | None) -> _Linear:
        if part is None:
            return _Linear()
        term = part.term
        A, B = (None, None) if term is None else (term.A.detach(), term.B.detach())
        scaling = 1.0 if term is None else term.scaling
        if isinstance(part, Part):
            return _linear(self._matrix(part.storage), scaling, part.bias, A, B)
        if part.base is not None and part.places is not None:
            raise ShapeError("a layer with places has no base; got both. Add the base's part to the factors.")
        linear = with_small(part.shape, scaling, part.bias, A, B)
        if part.base is not None:
            linear.matrix = ctypes.pointer(self._matrix(part.base))
        if id(part.right) not in self._rights:
            self._rights[id(part.right)] = self._matrix(part.right)
        factors = Factors(ctypes.pointer(self._rights[id(part.right)]), ctypes.pointer(self._matrix(part.left)))
        if part.places is not None:
            factors.places = native.check_tensor(part.places, "places", torch.int32, (None,)).data_ptr()
            factors.outputs = len(part.places)
        linear.factors = ctypes.pointer(factors)
        self._kept.append(factors)
        return linear

    def _matrix(self, storage: Storage) -> Matrix:
        matrix = _matrix(storage)
        self._kept.append(matrix)
        return matrix


def _check_count(name: str, parts: Sequence[AnyPart], most: int) -> None:
    if len(parts) not in (1, most):
        raise ShapeError(f"{name} are 1 or {most} layers; got {len(parts)}.")


def _norm(part: NormPart | None, name: str, width: int) -> _Norm:
    if part is None:
        return _Norm(None, 0.0, 0.0)
    weight = native.check_tensor(part.weight.detach(), f"{name}'s weight", F32, (width,))
    return _Norm(weight.data_ptr(), part.eps, part.plus)


def _rotary(tables: Tables) -> _Rotary:
    cos, sin = tables
    length, size = native.check_tensor(cos, "cos", F32, (None, None)).shape
    native.check_tensor(sin, "sin", F32, (length, size))
    return _Rotary(cos.data_ptr(), sin.data_ptr(), length, size)
