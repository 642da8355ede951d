"""The one idea: a linear layer is one frozen matrix plus low-rank terms.

    y = x W^T + b + sum_i  s_i (x A_i^T) B_i^T

x: (..., in_features); W: (out_features, in_features); A_i: (r_i, in_features); B_i: (out_features, r_i).
Source: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.matrices import FactoredMatrix, Matrix, StoredMatrix
from luthier.terms import LowRankTerm, column_norms, gain_of, joined, row_norms

__all__ = [
    "LowRankEmbedding", "LowRankLinear", "LowRankTerm", "column_norms", "count_numbers", "enabled_terms", "joined",
    "keep_checkpoint_names", "outputs_of", "right_factor", "row_norms",
]  # fmt: skip


class LowRankLinear(nn.Module):
    """One frozen matrix, an optional bias, and any number of named low-rank terms.

    In a state dict the matrix and bias have the names a plain linear layer gives them (`weight`, `bias`), so a
    model keeps its checkpoint's names; terms stand under `terms.<name>`.
    """

    def __init__(self, matrix: Matrix, bias: Tensor | None = None):
        super().__init__()
        self.matrix = matrix
        self.bias = None if bias is None else nn.Parameter(bias.to(torch.float32), requires_grad=False)
        self.terms = nn.ModuleDict()
        keep_checkpoint_names(self)

    @property
    def in_features(self) -> int:
        return self.matrix.shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    @property
    def weight(self) -> Tensor:
        """The stored tensor, for code that ties or inspects weights; bytes where the matrix is stored in blocks."""
        return self.matrix.weight

    def forward(self, x: Tensor, inner: Tensor | None = None) -> Tensor:
        """y in x's dtype. Leading terms that can be are computed in one go with the frozen product, and the bias with them.

        inner: x R^T where W is factored and R has been multiplied for another layer already (`outputs_of`).
        """
        terms = enabled_terms(self)
        fused = list(takewhile(lambda term: term.is_fused, terms))
        rest = terms[len(fused) :]
        shift = _summed_bias([*([] if rest or self.bias is None else [self.bias]), *_term_biases(fused)])
        if inner is not None and isinstance(self.matrix, FactoredMatrix):
            y = self.matrix.matmul_after(inner, x, shift, joined(fused))
        else:
            y = self.matrix.matmul(x, shift, joined(fused))
        for term in rest:
            y = (y + term(x) if term.magnitude is None else self._with_magnitude(x, y, term, term.magnitude)).to(x.dtype)
        return y if not rest or self.bias is None else y + self.bias.to(y.dtype)

    def _with_magnitude(self, x: Tensor, base: Tensor, term: LowRankTerm, magnitude: Tensor) -> Tensor:
        """DoRA: g (x W^T + s (x A^T) B^T) with g = m / |W + s B A|_row, the norm detached.

        With dropout D: x W^T + (g - 1) D(x) W^T + g s (D(x) A^T) B^T, as PEFT computes it. `base` is x W^T plus the terms
        before this one, which are scaled as a whole, so the product with W alone is taken out of it there.
        """
        gain = gain_of(magnitude, row_norms(self.matrix, term))
        if term.dropout and self.training:
            dropped = F.dropout(x, term.dropout)
            low_rank = F.linear(F.linear(dropped.to(torch.float32), term.lora_A), term.lora_B, term.lora_B_bias) * term.scaling
            return gain * (base + low_rank) + (gain - 1) * self.matrix.matmul(dropped - x)
        return gain * (base + term(x))

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """The one matrix and bias that compute what this layer computes now, float32.

        W' = g (W + s B A) and b' = g (b' + s b_B) for each enabled term in turn, g = 1 without a magnitude; then b' + b.
        """
        weight = self.matrix.dequantize().to(torch.float32, copy=True)
        shift: Tensor | None = None
        for term in enabled_terms(self):
            weight += term.delta()
            if term.lora_B_bias is not None:
                shift = term.scaling * term.lora_B_bias + (0.0 if shift is None else shift)
            if term.magnitude is not None:
                gain = gain_of(term.magnitude, row_norms(self.matrix, term))
                weight *= gain[:, None]
                shift = None if shift is None else gain * shift
        if shift is None:
            return weight, self.bias
        return weight, shift if self.bias is None else shift + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def outputs_of(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What each layer gives for x. A right factor that several of them share is multiplied once."""
    rights = [right_factor(layer) for layer in layers]
    shared = {id(right): right for right in rights if right is not None and sum(other is right for other in rights) > 1}
    inner = {key: right.matmul(x) for key, right in shared.items()}
    return [
        layer(x, inner[id(right)]) if right is not None and id(right) in inner else layer(x)
        for layer, right in zip(layers, rights, strict=True)
    ]


def right_factor(layer: nn.Module) -> StoredMatrix | None:
    """R of a layer whose matrix is factored, else None."""
    if isinstance(layer, LowRankLinear) and isinstance(layer.matrix, FactoredMatrix):
        return layer.matrix.right
    return None


def _term_biases(terms: Sequence[LowRankTerm]) -> list[Tensor]:
    return [term.scaling * term.lora_B_bias for term in terms if term.lora_B_bias is not None]


def _summed_bias(parts: Sequence[Tensor]) -> Tensor | None:
    return sum(parts[1:], parts[0]) if parts else None


def enabled_terms(layer: LowRankLinear | LowRankEmbedding) -> list[LowRankTerm]:
    """The terms that take part in the layer's sum, in the order they were attached."""
    return [term for term in layer.terms.values() if isinstance(term, LowRankTerm) and term.enabled]


class LowRankEmbedding(nn.Module):
    """Rows of one matrix plus low-rank terms, times an optional constant.

    y[t] = c (W[ids[t]] + sum_i s_i B_i A_i[:, ids[t]]);  W: (vocabulary, hidden), A_i: (r, vocabulary), B_i: (hidden, r).
    c is the constant that Gemma multiplies its embeddings with. A term with a magnitude m (hidden,) multiplies the sum
    so far, itself included, by m / |W^T + s B A|_row.
    """

    def __init__(self, matrix: Matrix, padding_idx: int | None = None, scale: float = 1.0):
        super().__init__()
        self.matrix = matrix
        self.padding_idx = padding_idx
        self.scale = scale
        self.terms = nn.ModuleDict()
        keep_checkpoint_names(self)

    @property
    def num_embeddings(self) -> int:
        return self.matrix.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.matrix.shape[1]

    @property
    def weight(self) -> Tensor:
        """The stored tensor, for code that ties or inspects weights; bytes where the matrix is stored in blocks."""
        return self.matrix.weight

    def forward(self, ids: Tensor) -> Tensor:
        y = self.matrix.rows(ids)
        for term in enabled_terms(self):
            y = y + F.linear(F.embedding(ids, term.lora_A.T, self.padding_idx), term.lora_B) * term.scaling
            if term.magnitude is not None:
                y = y * gain_of(term.magnitude, column_norms(self.matrix, term))
        return y if self.scale == 1.0 else y * self.scale

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one matrix (vocabulary, hidden), float32, whose rows are what this layer gives, before the constant c."""
        weight = self.matrix.dequantize().to(torch.float32, copy=True)
        for term in enabled_terms(self):
            weight += term.delta().T
            if term.magnitude is not None:
                weight *= gain_of(term.magnitude, column_norms(self.matrix, term))
        return weight


def count_numbers(model: nn.Module) -> int:
    """Numbers in the model, shared ones once: the weights that a matrix in blocks stands for, not its bytes."""
    own = [module for module in model.modules() if not isinstance(module, StoredMatrix)]
    matrices = [module for module in model.modules() if isinstance(module, StoredMatrix)]
    plain = {id(parameter): parameter.numel() for module in own for parameter in module.parameters(recurse=False)}
    return sum(plain.values()) + sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)


PARTS = ("left", "right", "places")


def keep_checkpoint_names(module: nn.Module) -> None:
    """Give the matrix's tensors the names `weight...` in the state dict of `module`, and accept them back.

    Of a factored matrix: `left.weight...`, `right.weight...`, `places`, and `weight...` for what they are added to.
    """

    def shorten(_module, state_dict, prefix, _metadata):
        for key in [key for key in state_dict if key.startswith(prefix + "matrix.")]:
            short = key.removeprefix(prefix + "matrix.").removeprefix("base.")
            state_dict[prefix + short] = state_dict.pop(key)

    def lengthen(own, state_dict, prefix, *_args):
        factored = isinstance(own.matrix, FactoredMatrix)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            first = key.removeprefix(prefix).partition(".")[0]
            if first == "weight":
                state_dict[f"{prefix}matrix.{'base.' if factored else ''}{key.removeprefix(prefix)}"] = state_dict.pop(key)
            elif factored and first in PARTS:
                state_dict[f"{prefix}matrix.{key.removeprefix(prefix)}"] = state_dict.pop(key)

    module.register_state_dict_post_hook(shorten)
    module.register_load_state_dict_pre_hook(lengthen)
