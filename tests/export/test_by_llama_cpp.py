"""When llama.cpp's reading of a file is taken for the same as ours; llama.cpp itself is in test_llama_cpp.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import adapted, ours, row_file
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf

import luthier
from luthier.export import by_llama_cpp
from luthier.export.compare import Difference, difference_to, reference_of
from luthier.export.subject import open_subject, rows_of

LOSS = 0.0178


def difference(loss: float, error: float) -> Difference:
    return Difference(error, error, loss, LOSS, 0.9, 0.5, 133, 6)


@pytest.mark.parametrize(
    ("loss", "error", "tokens", "interval", "passed"),
    [
        (LOSS + 0.0004, 0.01, 1.0, None, True),
        (LOSS + 0.0006, 0.01, 1.0, None, False),  # 0.5 % of 0.1 is 0.0005
        (LOSS - 0.0006, 0.01, 1.0, None, False),
        (LOSS, 0.059, 1.0, None, True),
        (LOSS, 0.061, 1.0, None, False),  # twice what rounding moves them is 0.06
        (LOSS, 0.01, 0.96, None, False),
        (LOSS + 0.0006, 0.01, 1.0, (-0.0001, 0.0013), True),
        (LOSS + 0.0020, 0.01, 1.0, (0.0006, 0.0040), False),  # all of the interval is beyond the bound
        (LOSS - 0.0020, 0.01, 1.0, (-0.0040, -0.0006), False),
        (LOSS, 0.059, 1.0, (-0.0001, 0.0001), True),
        (LOSS, 0.061, 1.0, (-0.0001, 0.0001), False),
        (LOSS, 0.01, 0.96, (-0.0001, 0.0001), False),
        (float("nan"), float("nan"), 1.0, None, False),
    ],
)
def test_what_passes(loss: float, error: float, tokens: float, interval: Any, passed: bool) -> None:
    """Of files on which llama.cpp rounds, chance has its part in the loss."""
    found, bound = by_llama_cpp._passed(difference(loss, error), tokens, 0.03, interval)
    assert found == passed
    assert ("as far as these rows tell" in bound) == (interval is not None)
    assert bound.startswith("loss within 0.5 %")
    assert bound.endswith("the same tokens on 97 % of rows, error of the logits at most 0.06, 2 times what rounding moves them")


def test_what_rounding_does_not_move_is_not_asked_to_be_equal() -> None:
    """Sums in another order differ in float32 too."""
    assert by_llama_cpp._passed(difference(LOSS, 1e-3), 1.0, 1e-6, None)[0]
    assert not by_llama_cpp._passed(difference(LOSS, 3e-3), 1.0, 1e-6, None)[0]


def test_a_loss_apart_in_every_row_is_no_chance(tmp_path: Path) -> None:
    """The interval is that of the difference, paired by row: rows of very different losses hide nothing."""
    subject = open_subject(str(adapted(tmp_path)))
    examples = rows_of(subject, row_file(tmp_path), 4)
    reference = reference_of(ours(tmp_path), examples)
    losses = torch.zeros(2, 4, dtype=torch.float64)
    # The expected token of each position becomes less likely, all else stays.
    moved = [
        logits - 0.1 * torch.nn.functional.one_hot(pack.targets, logits.shape[1])
        for pack, logits in zip(reference.packs, reference.logits, strict=True)
    ]
    found = difference_to(reference, by_llama_cpp._adding_losses(reference, iter(moved), losses))
    tokens = torch.bincount(torch.cat(reference.row_of))
    assert float(losses[0].sum() / tokens.sum()) == pytest.approx(found.loss_reference, rel=1e-6)
    assert float(losses[1].sum() / tokens.sum()) == pytest.approx(found.loss, rel=1e-6)
    low, high = by_llama_cpp._interval(reference, losses)
    assert low < found.loss - found.loss_reference < high
    spread = float((losses[0] / tokens).max() - (losses[0] / tokens).min())
    assert high - low < 0.1 * spread
    assert low > 0.09


def test_files_on_which_llama_cpp_rounds(tmp_path: Path) -> None:
    for kind, precise in ((Kind.F32, True), (Kind.F16, True), (Kind.BF16, False), (Kind.Q8_0, False)):
        file = write_gguf(tmp_path / f"{kind.name}.gguf", random_model("llama"), "llama", kind)
        assert by_llama_cpp.is_precise(luthier.load(str(file)).model) == precise, kind
