"""Low-rank terms that start from the weights or from what goes into them: QERA, LoftQ, PiSSA, EVA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from luthier.errors import ShapeError
from luthier.lowrank.factors import Factors
from luthier.lowrank.singular import top_eigenvectors, top_singular


def qera(weight: Tensor, quantized: Tensor, second: Tensor, rank: int) -> Factors:
    """The B A of that rank for which E |(W - Q - B A) x|^2 is least: exact repair of a quantised matrix on its inputs.

        R = E[x x^T];   (W - Q) R^1/2 = U S V^T;   B A = U_r S_r V_r^T R^-1/2 = U_r U_r^T (W - Q)

    The last form needs no inverse, so that inputs which do not span the space do no harm. What is left is
    trace((W - Q - B A) R (W - Q - B A)^T) = sum of the S_j^2 beyond rank r.
    weight, quantized: (out_features, in_features), W and what its storage gives back; second: (in_features, in_features),
    R or any multiple of it. Float64 throughout. Raises ShapeError where shapes or the rank do not fit, NumericError for
    NaN or Inf.
    Source: QERA, arXiv:2410.06040, theorem 1; the same as CLoQ's and EoRA's.
    """
    _check_shapes(weight, quantized, second)
    error = weight.to(torch.float64) - quantized.to(torch.float64)
    R = second.to(torch.float64)
    if weight.shape[0] <= weight.shape[1]:
        U, _ = top_eigenvectors(error @ R @ error.T, rank)
    else:
        U, _, _ = top_singular(error @ _square_root(R), rank)
    return _balanced(U.T @ error, U)


def loftq(weight: Tensor, rank: int, quantize: Callable[[Tensor], Tensor], iterations: int = 1) -> tuple[Tensor, Factors]:
    """(Q, B A): a quantised matrix and its repair, found in turns, so that |W - Q - B A| falls.

        B A = 0;   `iterations` times:  Q = quantize(W - B A),  B A = the best approximation of W - Q of rank r

    weight: (out_features, in_features); quantize: float32 (out, in) -> what the storage gives back, the same shape.
    With one iteration Q = quantize(W), the matrix that stands in any quantised copy of the model; with more it is another
    one, which must be kept beside the factors. Raises ShapeError for a rank or a number of iterations out of range.
    Source: LoftQ, arXiv:2310.08659, algorithm 1.
    """
    if iterations < 1:
        raise ShapeError(f"iterations must be at least 1; got {iterations}.")
    W = weight.to(torch.float32)
    repair = torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - repair)
        factors = pissa(W - Q, rank)
        repair = factors.B @ factors.A
    return Q, factors


def pissa(weight: Tensor, rank: int) -> Factors:
    """B = U_r S_r^1/2, A = S_r^1/2 V_r^T of W = U S V^T: the principal part of the weights, to be trained as the term.

    What stays frozen is W - B A. weight: (out_features, in_features). Raises ShapeError for a rank out of range.
    Source: PiSSA, arXiv:2404.02948.
    """
    U, S, V = top_singular(weight, rank)
    root = S.sqrt()
    return Factors((root[:, None] * V.T).to(torch.float32), (U * root).to(torch.float32))


def eva(second: Tensor, rank: int) -> Tensor:
    """A: the right singular vectors of X to its largest singular values, (rank, in_features) float32, orthonormal rows.

    second: (in_features, in_features), X^T X for inputs X (T, in_features), or any multiple of it. B is to be 0.
    Raises ShapeError for a rank out of range, NumericError for NaN or Inf. Source: EVA, arXiv:2410.07170, section 3.
    """
    vectors, _ = top_eigenvectors(second, rank)
    return vectors.T.to(torch.float32).contiguous()


def _balanced(A: Tensor, B: Tensor) -> Factors:
    """The same product with row i of A as long as column i of B; float64 in, float32 out."""
    lengths = A.norm(dim=1), B.norm(dim=0)
    root = (lengths[0] / lengths[1].clamp_min(1e-300)).sqrt()
    dead = root == 0
    return Factors((A / root.masked_fill(dead, 1.0)[:, None]).to(torch.float32), (B * root).to(torch.float32))


def _square_root(symmetric: Tensor) -> Tensor:
    """L (n, n) with L L^T = R, float64. Rounding can make eigenvalues of (near) 0 negative; they count as 0."""
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp_min(0).sqrt()


def _check_shapes(weight: Tensor, quantized: Tensor, second: Tensor) -> None:
    rows = weight.shape[1] if weight.ndim == 2 else 0
    if weight.ndim != 2 or quantized.shape != weight.shape or second.shape != (rows, rows):
        raise ShapeError(
            "W and Q are (out, in) and the second moments (in, in); got "
            f"{tuple(weight.shape)}, {tuple(quantized.shape)} and {tuple(second.shape)}."
        )
