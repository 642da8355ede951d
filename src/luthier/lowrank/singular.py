"""The leading singular vectors of a matrix, from the exact eigenvectors of its smaller Gram matrix, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import NumericError, ShapeError


def top_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V) of the best approximation U diag(S) V^T of rank `rank`: (m, r), (r,) falling, (n, r), float64.

    matrix: (m, n), finite; 1 <= rank <= min(m, n). Costs one product and one `eigh` of side min(m, n), several times less
    than a whole SVD. Of the singular values, those above 1e-6 of the largest have a relative error of at most about 1e-4,
    those above 1e-3 of 1e-10, for the Gram matrix squares the condition; vectors to values of (near) 0 are zero on the side
    that is not the smaller one. The largest entry of each u is above 0, so that a decomposition is the same each time.
    Raises ShapeError for a rank out of range, NumericError for NaN or Inf.
    """
    if matrix.ndim != 2 or not 1 <= rank <= min(matrix.shape):
        raise ShapeError(f"rank must be between 1 and min(m, n) = {min(matrix.shape)}; got {rank}. Try a smaller rank.")
    wide = matrix.to(torch.float64)
    turned = wide.shape[0] > wide.shape[1]
    short = wide.T if turned else wide
    left, squares = top_eigenvectors(short @ short.T, rank)
    values = squares.clamp_min(0).sqrt()
    tiny = values <= values[0] * 1e-8
    right = short.T @ left / values.masked_fill(tiny, 1.0)
    right = right.masked_fill(tiny, 0.0)
    U, V = (right, left) if turned else (left, right)
    signs = _signs(U)
    return U * signs, values, V * signs


def top_eigenvectors(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(vectors, values) of the `count` largest eigenvalues, falling: (n, count) and (count,), float64.

    symmetric: (n, n); its lower triangle is read. The largest entry of each vector is above 0. Raises ShapeError for a
    count out of range, NumericError for NaN or Inf.
    """
    size = symmetric.shape[0]
    if symmetric.shape != (size, size) or not 1 <= count <= size:
        raise ShapeError(f"the number of eigenvectors must be between 1 and n = {size}; got {count}.")
    if not bool(symmetric.isfinite().all()):
        raise NumericError("a matrix to decompose must be finite; it holds NaN or Inf. Check the weights it was made from.")
    values, vectors = torch.linalg.eigh(symmetric.to(torch.float64))
    chosen = vectors[:, -count:].flip(1)
    return chosen * _signs(chosen), values[-count:].flip(0)


def _signs(vectors: Tensor) -> Tensor:
    """+1 or -1 for each column, by the sign of its entry of the largest size."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
