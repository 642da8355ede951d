"""How the next token is chosen from its logits: greedily, or drawn from what temperature, top-k and top-p leave."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import ConfigError

# A share top_p of the probability nearly always lies in so many tokens; where it does not, all are sorted.
_LIKELIEST = 512
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that rows of one seed, and seeds of one row, all differ


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; otherwise a token is drawn from softmax(logits / temperature).

    top_k: only the so many likeliest tokens are drawn from, 0 for all. top_p: only the likeliest that together reach this
    probability, counted after top_k. repetition_penalty: logits of tokens that stand in the prompt or the answer are
    divided by it where positive and multiplied where negative (CTRL, arXiv:1909.05858), before all else and greedily too.
    seed: every row draws from a generator of its own, made of the seed and the row's number, so that what one row draws
    does not depend on the others. Raises ConfigError for a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 or a finite number above it; got {self.temperature}. Try 0.7.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1; got {self.top_p}. Try 0.9.")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 for all tokens or a number of them; got {self.top_k}. Try 40.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0 and finite; got {self.repetition_penalty}. Try 1.1.")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"a seed lies in 0 to 2^63 - 1; got {self.seed}.")

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as the model gives it."""
        return self.temperature == 0 and self.repetition_penalty == 1.0


class Sampler:
    """Chooses the tokens of one row."""

    def __init__(self, sampling: Sampling, row: int, prompt: Iterable[int]):
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed((sampling.seed + row * _SEED_STEP) % (1 << 63))
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1.0 else None

    def penalized(self, logits: Tensor) -> Tensor:
        """The logits (V,) after the repetition penalty; a copy where there is one."""
        if not self._seen:
            return logits
        ids = torch.tensor(list(self._seen), device=logits.device)
        found = logits[ids]
        penalty = self._sampling.repetition_penalty
        return logits.index_copy(0, ids, torch.where(found < 0, found * penalty, found / penalty))

    def choose(self, logits: Tensor) -> int:
        """A token, from logits (V,) float32 that are penalized; -Inf for a token that may not come."""
        if self._sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            values, ids = kept(logits.cpu(), self._sampling)
            token = int(ids[draw(values, self._generator)]) if ids is not None else draw(values, self._generator)
        if self._seen is not None:
            self._seen[token] = None
        return token


def kept(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """(values, ids): how far the logits of the tokens that top_k and top_p keep lie below the largest, over the temperature,
    (N,) float64; ids None for all.

    A token is kept by top_p if those likelier than it do not reach top_p yet; the likeliest always is.
    """
    # Differences first: a quotient by a temperature near 0 may pass the largest number.
    scaled = (logits.to(torch.float64) - logits.max()) / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return scaled, None
    count = min(sampling.top_k or len(scaled), len(scaled))
    if sampling.top_p == 1:
        return scaled.topk(count)
    # With top_k the shares are of the tokens that it keeps, else of all, so a first stretch of them may already tell.
    total = scaled.topk(count).values.logsumexp(0) if sampling.top_k else scaled.logsumexp(0)
    values, ids = scaled.topk(min(count, _LIKELIEST))
    shares = _shares_before(values, total)
    if count > len(values) and float(shares[-1]) < sampling.top_p:
        values, ids = scaled.topk(count)
        shares = _shares_before(values, total)
    chosen = shares < sampling.top_p
    chosen[0] = True
    return values[chosen], ids[chosen]


def _shares_before(values: Tensor, total: Tensor) -> Tensor:
    """The probability of all tokens before each, values in falling order; total: the log sum of what is drawn from."""
    shares = (values - total).exp()
    return shares.cumsum(0) - shares


def draw(values: Tensor, generator: torch.Generator) -> int:
    """A place in values (N,), the largest 0, with probability softmax(values): where the cumulated sum passes a uniform
    number."""
    sums = values.exp().cumsum(0)
    point = torch.rand((), generator=generator, dtype=torch.float64) * sums[-1]
    place = int(torch.searchsorted(sums, point, right=True))
    return min(place, len(values) - 1)
