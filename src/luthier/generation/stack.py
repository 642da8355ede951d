"""A model whose family has blocks, as the native decoder takes it, and its prompts through the packed kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.kernels.attention import packed_attention
from luthier.kernels.decoder import AnyPart, Decoder, FactoredPart, LayerParts, NormPart
from luthier.kernels.elementwise_ops import gated_op, rms_norm_op, rotary_in_place_op
from luthier.kernels.linear_ops import flatten, forward_op
from luthier.linear import LowRankLinear, enabled_terms, joined, outputs_of, right_factor
from luthier.matrices import FactoredMatrix
from luthier.models.blocks import blocks_obstacle, choice
from luthier.models.blocks.description import AttentionHalf, Layer, MlpHalf, Norm
from luthier.models.blocks.families import family_of
from luthier.models.blocks.tokens import Tables, Tokens, is_static
from luthier.models.packed import Head, head_of

LEAST_POSITIONS = 256  # of the rotary tables, which grow by doubling


def stack_obstacle(model: Any) -> str | None:
    """Why this model generates through Transformers' modules, or None where the native decoder computes the same."""
    if choice.is_watched(model) or any(choice.is_watched(module) for module in [model.get_output_embeddings()] if module):
        return "it or its head has hooks or a forward of its own"
    body = model.base_model
    if (obstacle := blocks_obstacle(model)) is not None:
        return obstacle
    family = family_of(body)
    assert family is not None
    layers = [family.describe(layer) for layer in body.layers]
    for layer in layers:
        if (obstacle := choice.layer_obstacle(layer)) is not None:
            return obstacle
        if not all(is_plain_product(linear) for linear in (*layer.attention.linears, *layer.mlp.linears)):
            return "it has linear layers with more than one product and low-rank terms"
    if choice.is_watched(body.norm) or body.norm.weight.dtype != torch.float32:
        return "its last norm is not a plain one in float32"
    if any(choice.is_watched(body.rotary_emb) or not is_static(body.rotary_emb, kind) for kind in _kinds(layers)):
        return "its rotary frequencies depend on the length of a text"
    if head_of(model) is None:
        return "its head is not one that is known"
    return None


def is_plain_product(layer: Any) -> bool:
    """Whether the layer computes x W^T + bias + low-rank terms and nothing else, W in the CPU's memory and not turned."""
    if choice.is_watched(layer):
        return False
    if type(layer) is nn.Linear:
        dense = layer.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return dense and layer.weight.is_contiguous() and layer.weight.device.type == "cpu"
    if type(layer) is not LowRankLinear or layer.weight.device.type != "cpu" or layer.matrix.transposed:
        return False
    return all(term.is_fused and not term.lora_A.is_meta for term in enabled_terms(layer))


def part_of(layer: Any, rights: dict[int, kernels.Storage] | None = None) -> AnyPart:
    """A layer that `is_plain_product` as the decoder takes it; its terms joined into one.

    rights: the storage of each right factor met so far, so that layers which share one are seen to.
    """
    if isinstance(layer, nn.Linear):
        own = None if layer.bias is None else layer.bias.detach().to(torch.float32)
        return kernels.Part(kernels.Storage.dense(layer.weight.detach()), own)
    terms = enabled_terms(layer)
    shifts: list[Tensor] = [term.scaling * term.lora_B_bias for term in terms if term.lora_B_bias is not None]
    shifts += [] if layer.bias is None else [layer.bias]
    bias = torch.stack(shifts).sum(0).detach() if shifts else None
    term = joined(terms)
    if term is not None:
        term = kernels.Term(term.A.detach().contiguous(), term.B.detach().contiguous(), term.scaling)
    matrix = layer.matrix
    if not isinstance(matrix, FactoredMatrix):
        return kernels.Part(matrix.storage(), bias, term)
    known: dict[int, kernels.Storage] = {} if rights is None else rights
    right = known.setdefault(id(matrix.right), matrix.right.storage())
    base = None if matrix.base is None else matrix.base.storage()
    return FactoredPart(matrix.left.storage(), right, base, matrix.places, bias, term)


class Stack:
    """The layers of a model whose `stack_obstacle` is None: prompts in packs, then a few tokens at a time.

    It stands for the model as it is when it is made: adapters switched on or off later need another.
    """

    def __init__(self, model: Any):
        body = model.base_model
        family, head = family_of(body), head_of(model)
        assert family is not None
        assert head is not None
        self._embed, self._rotary, self._head = body.embed_tokens, body.rotary_emb, head
        self._layers: list[Layer] = [family.describe(layer) for layer in body.layers]
        self._norm = family.norm(body.norm)
        self._kinds = _kinds(self._layers)
        parts = [_layer_parts(layer, self._kinds.index(layer.rotary)) for layer in self._layers]
        self._groups = [_Groups(layer, part) for layer, part in zip(self._layers, parts, strict=True)]
        attention = self._layers[0].attention
        self._own_head = is_plain_product(head.linear) and right_factor(head.linear) is None
        self.decoder = Decoder(
            parts, _norm_part(self._norm), whole_part(head.linear) if self._own_head else None,
            heads=attention.heads, kv_heads=attention.kv_heads, size=attention.head_size,
        )  # fmt: skip
        self._tables: list[Tables] = []

    def step(self, ids: Sequence[int], positions: Sequence[int], pages: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Logits (S, vocabulary) float32 behind the tokens `rows`, after all T tokens ran through the layers.

        ids, positions and pages: of each token its id, its place in its text and the addresses of its text's pages.
        """
        self._reach(max(positions) + 1)
        hidden = self._embed(torch.tensor(ids)).contiguous()
        most = max(map(len, pages))
        table = torch.tensor([[*own, *[0] * (most - len(own))] for own in pages])
        normed, raw = self.decoder.step(hidden, torch.tensor(positions), table, self._tables, torch.tensor(rows))
        return self._transformed(normed, raw)

    def prefill(self, ids: Tensor, tokens: Tokens, rows: Tensor, targets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Logits (S, vocabulary) behind the tokens at `rows` of a pack of texts without anything before them.

        ids: (T,) int64; targets: sources, pages and slots as in `Decoder.fill`, where keys and values go.
        """
        self._reach(int(tokens.positions.max()) + 1)
        tables = [(cos[tokens.positions], sin[tokens.positions]) for cos, sin in self._tables]
        hidden = self._embed(ids).contiguous()
        for number, (layer, groups) in enumerate(zip(self._layers, self._groups, strict=True)):
            q, k, v = self._projected(hidden, layer.attention, groups, tables[self._kinds.index(layer.rotary)])
            self.decoder.fill(number, k, v, *targets)
            wanted = rows if number == len(self._layers) - 1 else None
            hidden = _mlp(_attended(hidden, layer.attention, groups, (q, k, v), tokens, wanted), layer.mlp, groups)
        normed = _normed(hidden, self._norm)
        return self._head.logits(normed)

    def _projected(self, hidden: Tensor, half: AttentionHalf, groups: _Groups, tables: Tables) -> tuple[Tensor, ...]:
        """q, k and v, each (T, heads, D), as attention reads them."""
        outputs = groups.projections(_normed(hidden, half.norm))
        if len(outputs) == 1:
            widths = [half.heads * half.head_size, half.kv_heads * half.head_size, half.kv_heads * half.head_size]
            outputs = [piece.contiguous() for piece in outputs[0].split(widths, 1)]
        q, k, v = (output.view(len(output), -1, half.head_size) for output in outputs)
        if half.query_norm is not None and half.key_norm is not None:
            q, k = _head_normed(q, half.query_norm), _head_normed(k, half.key_norm)
        rotary_in_place_op(q, k, *tables, False)
        return q, k, v

    def _transformed(self, normed: Tensor, raw: Tensor | None) -> Tensor:
        head: Head = self._head
        if raw is None:
            return head.logits(normed)
        if head.scale != 1.0:
            raw = raw * head.scale
        return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)

    def _reach(self, length: int) -> None:
        """Make the rotary tables cover positions below `length`."""
        if self._tables and length <= len(self._tables[0][0]):
            return
        length = max(LEAST_POSITIONS, 1 << (length - 1).bit_length())
        positions, like = torch.arange(length)[None], torch.empty(1, 1, 1)
        self._tables = []
        for kind in self._kinds:
            cos, sin = self._rotary(like, positions, *(() if kind is None else (kind,)))
            self._tables.append((cos[0].to(torch.float32).contiguous(), sin[0].to(torch.float32).contiguous()))


def whole_part(layer: Any) -> kernels.Part:
    """`part_of` for a layer whose matrix is not in factors."""
    part = part_of(layer)
    assert isinstance(part, kernels.Part)
    return part


class _Groups:
    """The linear layers of a decoder layer, those of one input together, as one op each."""

    def __init__(self, layer: Layer, parts: LayerParts):
        self.projections = _group(layer.attention.projections, parts.projections)
        self.gates = _group(layer.mlp.projections, parts.gates)
        self._output, self._down = _group((layer.attention.output,), [parts.output]), _group((layer.mlp.down,), [parts.down])

    def output(self, x: Tensor) -> Tensor:
        return self._output(x)[0]

    def down(self, x: Tensor) -> Tensor:
        return self._down(x)[0]


def _group(layers: Sequence[Any], parts: Sequence[AnyPart]) -> Callable[[Tensor], list[Tensor]]:
    """x -> what each layer gives: one op, or the layers themselves where some are in factors."""
    whole = [part for part in parts if isinstance(part, kernels.Part)]
    if len(whole) < len(parts):
        return lambda x: outputs_of(layers, x)
    arguments = flatten(whole)
    return lambda x: forward_op(x, *arguments)[0]


def _attended(
    x: Tensor, half: AttentionHalf, groups: _Groups, qkv: tuple[Tensor, ...], tokens: Tokens, rows: Tensor | None
) -> Tensor:
    q, k, v = qkv
    out = packed_attention(
        q, k, v, tokens.starts, half.scale, window=half.window, softcap=half.softcap, parents=tokens.parents
    ).flatten(1)
    y = groups.output(out if rows is None else out[rows])
    y = y if half.post_norm is None else _normed(y, half.post_norm)
    return y.add_(x if rows is None else x[rows])


def _mlp(x: Tensor, half: MlpHalf, groups: _Groups) -> Tensor:
    outputs = groups.gates(_normed(x, half.norm))
    gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, 1)
    y = groups.down(gated_op(gate, up, half.gate))
    y = y if half.post_norm is None else _normed(y, half.post_norm)
    return y.add_(x)


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return rms_norm_op(x, None, norm.weight, norm.plus, norm.eps)[1]


def _head_normed(x: Tensor, norm: Norm) -> Tensor:
    """The norm of each head. x: (T, heads, D)."""
    return _normed(x.reshape(-1, x.shape[2]), norm).view(x.shape)


def _kinds(layers: Sequence[Layer]) -> list[str | None]:
    """The names of the rotary tables that layers use, each once."""
    return list(dict.fromkeys(layer.rotary for layer in layers))


def _norm_part(norm: Norm) -> NormPart:
    return NormPart(norm.weight.detach(), norm.eps, norm.plus)


def _maybe_norm(norm: Norm | None) -> NormPart | None:
    return None if norm is None else _norm_part(norm)


def _layer_parts(layer: Layer, rotary: int) -> LayerParts:
    attention, mlp = layer.attention, layer.mlp
    assert mlp.gate is not None
    rights: dict[int, kernels.Storage] = {}
    return LayerParts(
        norm=_norm_part(attention.norm), projections=[part_of(linear, rights) for linear in attention.projections],
        output=part_of(attention.output), mlp_norm=_norm_part(mlp.norm),
        gates=[part_of(linear, rights) for linear in mlp.projections],
        down=part_of(mlp.down), gate=mlp.gate, scale=attention.scale, rotary=rotary, softcap=attention.softcap or 0.0,
        window=attention.window or 0, query_norm=_maybe_norm(attention.query_norm), key_norm=_maybe_norm(attention.key_norm),
        attention_post=_maybe_norm(attention.post_norm), mlp_post=_maybe_norm(mlp.post_norm),
    )  # fmt: skip
