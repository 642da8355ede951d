"""AdapterSpec: what it accepts, what it computes, and the wording of its refusals."""

from __future__ import annotations

import math

import pytest

from luthier.adapters import AdapterSpec
from luthier.errors import AdapterError

REFUSED = {
    "rank must be a whole number of at least 1; got 0. Try rank=16.": {"rank": 0},
    "rank must be a whole number of at least 1; got 2.5. Try rank=16.": {"rank": 2.5},
    "rank must be a whole number of at least 1; got True. Try rank=16.": {"rank": True},
    "alpha must be a finite number above 0; got nan. Try alpha=32.": {"alpha": math.nan},
    "alpha must be a finite number above 0; got -1. Try alpha=32.": {"alpha": -1},
    "dropout must be at least 0 and below 1; got 1.0. Try dropout=0.05.": {"dropout": 1.0},
    "variant must be one of lora, rslora, dora, rsdora; got 'dorra'. Did you mean 'dora'?": {"variant": "dorra"},
    "targets, given as one string, must be a regular expression; '(q': missing ) at position 2.": {"targets": "(q"},
    "targets must be 'all-linear', a list of module names, or one regular expression; got [1].": {"targets": [1]},
    "an adapter needs targets, in PEFT too; the list is empty. Try targets='all-linear'.": {"targets": []},
    "modules_to_save must be a list of module names; got 'lm_head'.": {"modules_to_save": "lm_head"},
    "rank_pattern: the value for 'q_proj' must be a whole number of at least 1; got 0.": {"rank_pattern": {"q_proj": 0}},
    "alpha_pattern: the value for 'q_proj' must be a finite number above 0; got inf.": {"alpha_pattern": {"q_proj": math.inf}},
    "rank_pattern: '[' must be a regular expression; unterminated character set at position 1.": {"rank_pattern": {"[": 1}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_out_of_range_is_refused(message: str) -> None:
    with pytest.raises(AdapterError) as caught:
        AdapterSpec(**REFUSED[message])
    assert str(caught.value) == message


def test_all_problems_come_at_once() -> None:
    with pytest.raises(AdapterError) as caught:
        AdapterSpec(rank=0, alpha=0)
    assert str(caught.value).splitlines() == [
        "the adapter's settings must be in range:",
        "  - rank must be a whole number of at least 1; got 0. Try rank=16.",
        "  - alpha must be a finite number above 0; got 0. Try alpha=32.",
    ]


def test_the_first_pattern_that_fits_wins() -> None:
    spec = AdapterSpec(rank=8, alpha=16, rank_pattern={r"layers\.0\..*": 2, "q_proj": 4}, alpha_pattern={"q_proj": 6})
    assert [spec.rank_of(name) for name in ("m.layers.0.q_proj", "m.layers.1.q_proj", "m.layers.1.k_proj")] == [2, 4, 8]
    assert [spec.scaling_of(name) for name in ("m.layers.0.q_proj", "m.layers.1.q_proj", "m.layers.1.k_proj")] == [
        3.0,
        1.5,
        2.0,
    ]
    assert AdapterSpec(rank=8, rank_pattern={"q": 2}).rank_of("seq") == 8


def test_rank_stabilized_scaling() -> None:
    assert AdapterSpec(rank=16, alpha=32, variant="rslora").scaling_of("x") == 8.0
    assert AdapterSpec(rank=16, alpha=32, variant="rsdora").scaling_of("x") == 8.0
    assert AdapterSpec(rank=16, alpha=32, variant="dora").scaling_of("x") == 2.0
