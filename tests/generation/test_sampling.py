"""Sampling against plain torch and Transformers' own warpers in float64, and against the probabilities it should draw from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.errors import ConfigError
from luthier.generation.sampling import Sampler, Sampling, draw, kept


def some_logits(seed: int, size: int = 1000, spread: float = 3.0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from, over the whole vocabulary, by `kept`."""
    values, ids = kept(logits, sampling)
    found = torch.zeros(len(logits), dtype=torch.float64)
    found[slice(None) if ids is None else ids] = values.softmax(0)
    return found


def by_transformers(logits: Tensor, sampling: Sampling) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None].double())[0].softmax(0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 30.0])
@pytest.mark.parametrize("top_k", [0, 1, 7, 600, 5000])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1.0])
def test_what_is_left_is_what_transformers_leaves(temperature: float, top_k: int, top_p: float) -> None:
    """At temperature 30 nearly all tokens are needed for the share, more than the stretch that is sorted first."""
    sampling = Sampling(temperature, top_p, top_k)
    for seed in range(3):
        logits = some_logits(seed)
        assert torch.allclose(probabilities(logits, sampling), by_transformers(logits, sampling), rtol=1e-9, atol=1e-15)


def test_tokens_that_may_not_come_never_do() -> None:
    logits = torch.full((600,), -torch.inf)
    logits[[3, 500]] = torch.tensor([1.0, 2.0])
    for sampling in (Sampling(9.0, 0.99, 40), Sampling(9.0), Sampling(9.0, 0.999), Sampling(9.0, 1.0, 40)):
        sampler = Sampler(sampling, 0, [])
        assert {sampler.choose(logits) for _ in range(60)} == {3, 500}


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_a_temperature_near_nothing_takes_the_likeliest(temperature: float) -> None:
    logits = some_logits(1)
    for top_p, top_k in ((1.0, 0), (0.9, 0), (0.9, 5)):
        assert Sampler(Sampling(temperature, top_p, top_k), 0, []).choose(logits) == int(logits.argmax())


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """Shares of 10,000 draws lie within five standard deviations."""
    sampling = Sampling(temperature=1.3, top_p=0.9, top_k=9)
    logits = some_logits(4, size=30)
    sampler = Sampler(sampling, 0, [])
    draws = 10_000
    found = torch.bincount(torch.tensor([sampler.choose(logits) for _ in range(draws)]), minlength=30).double() / draws
    expected = by_transformers(logits, sampling)
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_a_draw_is_where_the_cumulated_sum_passes_a_uniform_number() -> None:
    values = some_logits(2, size=50).double()
    values -= values.max()
    ours, theirs = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    for _ in range(200):
        point = torch.rand((), generator=theirs, dtype=torch.float64)
        assert draw(values, ours) == int((values.softmax(0).cumsum(0) <= point).sum())


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_is_transformers_own_over_prompt_and_answer(penalty: float) -> None:
    logits = some_logits(5, size=40)
    sampler = Sampler(Sampling(repetition_penalty=penalty), 0, [1, 2, 2, 3])
    oracle = RepetitionPenaltyLogitsProcessor(penalty)
    seen = [1, 2, 2, 3]
    for step in range(6):
        before = logits.clone()
        penalized = sampler.penalized(logits)
        assert torch.equal(penalized, oracle(torch.tensor([seen]), logits[None].clone())[0])
        assert torch.equal(logits, before)
        seen.append(sampler.choose(penalized))
        logits = some_logits(6 + step, size=40)


def test_the_same_seed_and_row_draw_the_same_and_others_do_not() -> None:
    def drawn(seed: int, row: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=2.0, seed=seed), row, [])
        return [sampler.choose(some_logits(step)) for step in range(8)]

    assert drawn(1, 0) == drawn(1, 0)
    different = [drawn(seed, row) for seed in (0, 1, 2, (1 << 63) - 1) for row in range(4)]
    assert len(set(map(tuple, different))) == 16


def test_greedy_draws_nothing() -> None:
    assert Sampling().is_plain
    assert not Sampling(repetition_penalty=1.1).is_plain
    assert Sampler(Sampling(top_k=3, top_p=0.1), 0, []).choose(some_logits(1)) == int(some_logits(1).argmax())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or a finite number above it; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or a finite number above it; got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or a finite number above it; got inf"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1; got 1.1"),
        ({"top_k": -1}, "top_k must be 0 for all tokens or a number of them; got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite; got 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be above 0 and finite; got inf"),
        ({"seed": -1}, r"a seed lies in 0 to 2\^63 - 1; got -1"),
        ({"seed": 1 << 63}, r"a seed lies in 0 to 2\^63 - 1; got 9223372036854775808"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)
