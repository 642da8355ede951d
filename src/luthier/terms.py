"""Low-rank terms s (x A^T) B^T, their sum as one, and the norms that a magnitude needs of W + s B A.

A: (r, in_features); B: (out_features, r). Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import kernels
from luthier.errors import ShapeError
from luthier.matrices import Matrix


class LowRankTerm(nn.Module):
    """s (x A^T) B^T, its factors in float32 whatever the matrix beside it is stored in.

    lora_A: (r, in_features); lora_B: (out_features, r); lora_B_bias: (out_features,) or None;
    magnitude: (out_features,), only in DoRA, where the layer computes m (W + s B A) / |W + s B A|_row.
    `enabled=False` takes the term out of its layer's sum. Raises ShapeError where the factors do not fit each other.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
        lora_B_bias: Tensor | None = None,
    ):
        super().__init__()
        if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise ShapeError(f"A is (r, in) and B is (out, r); got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}.")
        self.lora_A = nn.Parameter(lora_A.to(torch.float32).contiguous())
        self.lora_B = nn.Parameter(lora_B.to(torch.float32).contiguous())
        self.lora_B_bias = None if lora_B_bias is None else nn.Parameter(lora_B_bias.to(torch.float32))
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.to(torch.float32))
        self.scaling = scaling
        self.dropout = dropout
        self.enabled = True

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def is_fused(self) -> bool:
        """Whether the term can be part of the frozen product: no magnitude, and no dropout of its own on x."""
        return self.magnitude is None and not (self.dropout and self.training)

    def forward(self, x: Tensor) -> Tensor:
        """The term alone, in float32."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        y = F.linear(F.linear(dropped.to(torch.float32), self.lora_A), self.lora_B, self.lora_B_bias)
        return y * self.scaling

    def delta(self) -> Tensor:
        """s B A, (out_features, in_features), float32."""
        return self.scaling * (self.lora_B @ self.lora_A)


def joined(terms: Sequence[LowRankTerm]) -> kernels.Term | None:
    """The sum of the terms as one: A stacked on rows, s B side by side. None where there is none."""
    if not terms:
        return None
    if len(terms) == 1:
        return kernels.Term(terms[0].lora_A, terms[0].lora_B, terms[0].scaling)
    A = torch.cat([term.lora_A for term in terms])
    return kernels.Term(A, torch.cat([term.scaling * term.lora_B for term in terms], 1))


@torch.no_grad()
def row_norms(matrix: Matrix, term: LowRankTerm) -> Tensor:
    """|W + s B A| of each row, (out_features,), float32, without forming W + s B A.

    |w_o + s b_o A|^2 = |w_o|^2 + 2 s b_o . (A w_o) + s^2 b_o (A A^T) b_o^T, summed in float64. |w_o|^2 is kept by the
    matrix, so a step costs what r tokens through W cost.
    """
    return _norms(matrix.row_norms_squared(), matrix.matmul(term.lora_A).T, term)


@torch.no_grad()
def column_norms(matrix: Matrix, term: LowRankTerm) -> Tensor:
    """|W^T + s B A| of each row, (hidden,), float32: the same for an embedding, whose W is (vocabulary, hidden)."""
    cross = torch.zeros(matrix.shape[1], term.rank, device=term.lora_A.device)
    for start, rows in matrix.row_blocks():
        cross += rows.T @ term.lora_A[:, start : start + len(rows)].T
    return _norms(matrix.column_norms_squared(), cross, term)


def _norms(squared: Tensor, cross: Tensor, term: LowRankTerm) -> Tensor:
    """sqrt(squared + 2 s cross . B + s^2 B (A A^T) B^T), row by row. squared: (out,); cross: (out, r) = W A^T."""
    A, B = term.lora_A.to(torch.float64), term.lora_B.to(torch.float64)
    own = ((B @ (A @ A.T)) * B).sum(1)
    total = squared + 2 * term.scaling * (cross.to(torch.float64) * B).sum(1) + term.scaling**2 * own
    return total.clamp_min(0).sqrt().to(torch.float32)


def gain_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / |row|, and 0 for a row that is zero, as in the unused rows of a vocabulary: there is nothing to scale."""
    empty = norms == 0
    return torch.where(empty, 0.0, magnitude / norms.masked_fill(empty, 1.0))
