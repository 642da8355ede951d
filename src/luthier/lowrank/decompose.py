"""Decompositions of a weight, each of which serves every rank: W ~ B_k A_k with the first k components.

    plain      minimises |W - W'|_F^2                          SVD of W
    scaled     minimises |(W - W') D|_F^2                      ASVD, arXiv:2312.05821: D a diagonal of input sizes
    whitened   minimises tr((W - W') H (W - W')^T)             SVD-LLM, arXiv:2403.07378: H = sum_t x_t x_t^T, so this is
                                                               sum_t |(W - W') x_t|^2, the layer's squared output error
    projected  the same minimum without inverting H            W' = U U^T W, U: eigenvectors of W H W^T

W: (out_features, in_features); H: (in_features, in_features). Moments may be weighted by token, divided by the number of
tokens, or summed over layers that share an input; all that is needed is that they are symmetric and positive semidefinite.
Layers that share an input may be decomposed together by stacking their rows: they then share A (`factors.split`). All is
computed in float64 and returned in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import NumericError, ShapeError
from luthier.lowrank.factors import Factors


@dataclass(frozen=True, eq=False)
class Decomposition:
    """B A = W, components in falling order of what they are worth.

    A: (p, in_features), B: (out_features, p), float32, p = min(in, out). energies: (p,) float64, falling: sigma_k^2, by which
    component k lowers the error that the decomposition minimises.
    """

    A: Tensor
    B: Tensor
    energies: Tensor

    @property
    def max_rank(self) -> int:
        return len(self.energies)

    def factors(self, rank: int) -> Factors:
        """The best product of that rank; no copy. Raises ShapeError for a rank that is not 1 to max_rank."""
        self._check(rank)
        return Factors(self.A[:rank], self.B[:, :rank])

    def dropped(self, rank: int) -> float:
        """sum_{k > rank} sigma_k^2: the error that is left at that rank, in the units of what is minimised."""
        self._check(rank)
        return float(self.energies[rank:].sum())

    def _check(self, rank: int) -> None:
        if not 1 <= rank <= self.max_rank:
            raise ShapeError(f"rank must be between 1 and min(in, out) = {self.max_rank}; got {rank}.")


def truncated_svd(weight: Tensor) -> Decomposition:
    """W = U S V^T; B = U S, A = V^T: the best approximation of each rank where every input counts alike."""
    U, sigma, Vt = torch.linalg.svd(_matrix(weight), full_matrices=False)
    return _result(Vt, U * sigma, sigma.square())


def scaled_svd(weight: Tensor, scales: Tensor) -> Decomposition:
    """ASVD: W D = U S V^T, D = diag(scales); B = U S, A = V^T D^-1. The baseline that knows only the size of each input.

    scales: (in_features,), positive; ASVD takes (mean_t |x_t,i|)^0.5. energies are of |(W - W') D|^2.
    Raises ShapeError for scales of another shape, NumericError where one is not positive.
    """
    W, D = _matrix(weight), scales.to(torch.float64)
    if D.shape != (W.shape[1],):
        raise ShapeError(f"scales are one an input, ({W.shape[1]},); got {tuple(D.shape)}.")
    if not bool((D > 0).all() and D.isfinite().all()):
        raise NumericError(f"scales must be positive and finite; the least is {D.min().item():.3g}. Raise it to a small share.")
    U, sigma, Vt = torch.linalg.svd(W * D, full_matrices=False)
    return _result(Vt / D, U * sigma, sigma.square())


def whitened_svd(weight: Tensor, moments: Tensor, damping: float = 0.0) -> Decomposition:
    """SVD-LLM: H + damping mean(diag H) I = S S^T (Cholesky), W S = U Sigma V^T; B = U Sigma, A = V^T S^-1.

    energies: what is dropped at rank k is exactly tr((W - W_k) H (W - W_k)^T), with the damping in H.
    Raises NumericError where H is not positive definite: fewer tokens than inputs, or inputs that are always zero.
    """
    W, H = _matrix(weight), _moments(moments, weight.shape[1])
    S, failed = torch.linalg.cholesky_ex(H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype))
    if int(failed):
        raise NumericError(
            f"whitening needs positive definite moments, so as many independent tokens as inputs ({len(H)}); these have "
            "fewer. Give more calibration text, a damping, or use the projected form."
        )
    U, sigma, Vt = torch.linalg.svd(W @ S, full_matrices=False)
    A = torch.linalg.solve_triangular(S, Vt, upper=False, left=False)
    return _result(A, U * sigma, sigma.square())


def projected(weight: Tensor, moments: Tensor) -> Decomposition:
    """The same minimum without an inverse of H: eigh(W H W^T) = U Sigma^2 U^T; B = U, A = U^T W, U orthonormal.

    One eigendecomposition, of the smaller side: for more rows than columns W = Q R is taken first, and
    U = Q eigenvectors(R H R^T). Works for any positive semidefinite H; directions that no input has are last.
    """
    W, H = _matrix(weight), _moments(moments, weight.shape[1])
    Q, W = (None, W) if len(W) <= W.shape[1] else torch.linalg.qr(W)  # from here on the smaller R, if there is one
    gram = W @ H @ W.T
    energies, U = torch.linalg.eigh((gram + gram.T) / 2)
    energies, U = energies.flip(0).clamp(min=0), U.flip(1)
    return _result(U.T @ W, U if Q is None else Q @ U, energies)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Weights of layers that read the same input, one below the other: (sum of out_features, in_features), float32.

    The error of the stack is the sum of the layers' errors; to weigh layers differently, multiply a layer's rows by a factor
    and divide its rows of B by it. Raises ShapeError where the inputs differ.
    """
    widths = {weight.shape[1] for weight in weights}
    if len(widths) != 1:
        raise ShapeError(f"layers that share an input have the same in_features; got {sorted(widths)}.")
    return torch.cat([weight.to(torch.float32) for weight in weights])


def _result(A: Tensor, B: Tensor, energies: Tensor) -> Decomposition:
    return Decomposition(A.to(torch.float32).contiguous(), B.to(torch.float32).contiguous(), energies)


def _matrix(weight: Tensor) -> Tensor:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ShapeError(
            f"a weight is a matrix (out_features, in_features) of floats; got {tuple(weight.shape)} {weight.dtype}."
        )
    if not bool(weight.isfinite().all()):
        raise NumericError("a weight to decompose must be finite; it holds NaN or Inf. Download the model again.")
    return weight.detach().to(torch.float64)


def _moments(moments: Tensor, size: int) -> Tensor:
    if moments.shape != (size, size):
        raise ShapeError(f"moments are (in_features, in_features) = ({size}, {size}); got {tuple(moments.shape)}.")
    least, most = moments.aminmax()  # NaN if there is one; `isfinite` makes several copies
    if not bool(least.isfinite() and most.isfinite()):
        raise NumericError("moments must be finite; they hold NaN or Inf. Check the calibration text and the model.")
    return moments.detach().to(torch.float64)
