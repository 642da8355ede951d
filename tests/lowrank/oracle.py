"""Float64 oracles: errors measured on the inputs themselves, and optima found by another road."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(out: int, inputs: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(W float32, X (tokens, in) float64 with inputs of very different size that depend on each other, H = X^T X)."""
    g = generator(seed)
    W = torch.randn(out, inputs, generator=g)
    mixing = torch.randn(inputs, inputs, generator=g, dtype=torch.float64) / inputs**0.5
    sizes = torch.logspace(0, -2, inputs, dtype=torch.float64)
    X = (torch.randn(tokens, inputs, generator=g, dtype=torch.float64) * sizes) @ mixing
    X[0] *= 30
    return W, X, X.T @ X


def output_error(W: Tensor, other: Tensor, X: Tensor) -> float:
    """sum_t |(W - W') x_t|^2."""
    return float((X @ (W.to(torch.float64) - other.to(torch.float64)).T).square().sum())


def metric_error(W: Tensor, other: Tensor, H: Tensor) -> float:
    """tr((W - W') H (W - W')^T)."""
    E = W.to(torch.float64) - other.to(torch.float64)
    return float(((E @ H.to(torch.float64)) * E).sum())


def best_error(W: Tensor, X: Tensor, rank: int) -> float:
    """The least sum_t |(W - W') x_t|^2 over all W' of that rank: what Eckart and Young leave of W X^T."""
    sigma = torch.linalg.svdvals(W.to(torch.float64) @ X.T)
    return float(sigma[rank:].square().sum())
