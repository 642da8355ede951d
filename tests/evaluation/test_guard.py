"""Guards: bounds as people write them, and verdicts with the interval taken into account."""

from __future__ import annotations

import numpy as np
import pytest

from luthier.errors import ConfigError
from luthier.evaluation.bootstrap import Figure, Resampled, mean_of, ratio, resample
from luthier.evaluation.guard import Guard, judge, parse_bound

ROWS = 60


def losses(shift: float, noise: float = 0.0, seed: int = 0) -> dict[str, Resampled]:
    generator = np.random.default_rng(7)
    base = generator.normal(2.0, 0.5, ROWS)
    spread = np.random.default_rng(seed).normal(0, 1, ROWS)
    moved = base + shift + noise * (spread - spread.mean())
    return resample([Figure("loss", np.stack([moved * 10, np.full(ROWS, 10.0)], 1), ratio)])


@pytest.mark.parametrize(
    ("text", "path", "guard"),
    [
        ("w.jsonl", "w.jsonl", Guard(None, 0.02, True)),
        ("w.jsonl:0.05", "w.jsonl", Guard(None, 0.05, False)),
        ("w.jsonl:.5%", "w.jsonl", Guard(None, 0.005, True)),
        ("w.jsonl:0", "w.jsonl", Guard(None, 0.0, False)),
        ("C:/some folder/w.jsonl:choice_accuracy=1e-2", "C:/some folder/w.jsonl", Guard("choice_accuracy", 0.01, False)),
        ("owner/name:validation", "owner/name:validation", Guard()),
        ("owner/name:train[:10%]", "owner/name:train[:10%]", Guard()),
    ],
)
def test_bounds_as_people_write_them(text: str, path: str, guard: Guard) -> None:
    assert parse_bound(text) == (path, guard)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w.jsonl:-0.1", "a bound says how much worse a figure may get, 0 or more; got -0.1."),
        ("w.jsonl:lss=0.1", "got 'lss'. Did you mean 'loss'?"),
        ("w.jsonl:tokens=1", "a guard watches one of loss, perplexity, exact_match"),
        ("w.jsonl:loss=much", "a bound is a number or a percentage, such as 0.05 or 2%, or FIGURE=BOUND; got 'loss=much'."),
        ("w.jsonl:two%", "got 'two%'."),
        ("w.jsonl:1e999", "0 or more; got 1e999."),
    ],
)
def test_bounds_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bound(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("shift", "noise", "kept", "certain"),
    [
        (-0.1, 0, True, True),
        (0.01, 0.01, True, True),
        (0.03, 0.3, True, False),
        (0.07, 0.3, False, False),
        (0.2, 0.1, False, True),
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_verdicts(shift: float, noise: float, kept: bool, certain: bool, relative: bool) -> None:
    base, tuned = losses(0.0), losses(shift, noise)
    # 2.5 % of a loss near 2 is about 0.05 too.
    guard = Guard(None, 0.05 / base["loss"].value if relative else 0.05, relative)
    verdict = judge("wiki", guard, base, tuned)
    assert (verdict.figure, verdict.kept, verdict.certain) == ("loss", kept, certain)
    assert verdict.allowed == pytest.approx(0.05)
    low, high = verdict.interval
    assert low <= verdict.worse_by <= high
    assert verdict.worse_by == pytest.approx(verdict.tuned - verdict.base)
    words = {
        (True, True): "kept",
        (True, False): "more rows could show otherwise",
        (False, False): "chance may have a part in it; more rows would tell",
        (False, True): "the whole interval lies beyond the bound",
    }
    assert verdict.sentence().endswith(words[kept, certain])


def test_a_figure_that_should_be_high_is_worse_when_it_falls() -> None:
    base = resample([mean_of("choice_accuracy", [1.0] * 40 + [0.0] * 20)])
    tuned = resample([mean_of("choice_accuracy", [1.0] * 30 + [0.0] * 30)])
    verdict = judge("quiz", Guard("choice_accuracy", 0.05, False), base, tuned)
    assert (verdict.worse_by, verdict.kept, verdict.certain) == (pytest.approx(1 / 6), False, True)
    assert verdict.sentence().startswith("quiz: choice accuracy 66.7 % -> 50 %, worse by 16.7 points (95 % interval 8.3 to ")
    assert "at most 5.0 points is allowed: broken" in verdict.sentence()
    # Without a figure named, rows with choices are judged by their choices.
    assert judge("quiz", Guard(), base, tuned).figure == "choice_accuracy"
    assert judge("quiz", Guard(), tuned, base).kept


def test_a_bound_of_nothing_allows_no_loss_at_all() -> None:
    assert judge("a", Guard(None, 0.0, False), losses(0.0), losses(0.0)).kept
    assert not judge("a", Guard(None, 0.0, False), losses(0.0), losses(1e-6)).kept
