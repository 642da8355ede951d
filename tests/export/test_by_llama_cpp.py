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
from luthier.export.by_llama_cpp import Chance
from luthier.export.compare import Difference, difference_to, reference_of
from luthier.export.subject import open_subject, rows_of

LOSS = 0.0178


def difference(loss: float, tokens: float = 1.0, reference: float = LOSS) -> Difference:
    return Difference(0.01, 0.02, loss, reference, tokens, 1.0, 133, 6)


@pytest.mark.parametrize(
    ("loss", "tokens", "equal", "chance", "passed"),
    [
        (LOSS + 0.0004, 1.0, 1.0, None, True),
        (LOSS + 0.0006, 1.0, 1.0, None, False),  # 0.5 % of 0.1 is 0.0005
        (LOSS - 0.0006, 1.0, 1.0, None, False),
        (LOSS, 1.0, 0.96, None, False),
        (LOSS, 1.0, None, None, True),
        (LOSS + 0.0006, 1.0, 1.0, ((-0.0001, 0.0013), (1.0, 1.0)), True),
        (LOSS + 0.0020, 1.0, 1.0, ((0.0006, 0.0040), (1.0, 1.0)), False),  # all of the interval is beyond the bound
        (LOSS - 0.0020, 1.0, 1.0, ((-0.0040, -0.0006), (1.0, 1.0)), False),
        (LOSS, 0.995, 0.8, ((-0.0001, 0.0001), (0.99, 1.0)), True),
        (LOSS, 0.985, 0.8, ((-0.0001, 0.0001), (0.97, 0.995)), True),  # chance may have turned these tokens
        (LOSS, 0.975, 0.8, ((-0.0001, 0.0001), (0.96, 0.985)), False),
        (LOSS, 0.975, 0.98, ((-0.0001, 0.0001), (0.96, 0.985)), True),
    ],
)
def test_what_passes(loss: float, tokens: float, equal: float | None, chance: Any, passed: bool) -> None:
    """Of files on which llama.cpp rounds, chance has its part in the loss, and one token of a hundred in the text."""
    found, bound = by_llama_cpp._passed(difference(loss, tokens), equal, None if chance is None else Chance(*chance))
    assert found == passed
    assert ("as far as these rows tell" in bound) == (chance is not None)
    assert "loss within 0.5%" in bound


def test_a_loss_apart_in_every_row_is_no_chance(tmp_path: Path) -> None:
    """The interval is that of the difference, paired by row: rows of very different losses hide nothing."""
    subject = open_subject(str(adapted(tmp_path)))
    examples = rows_of(subject, row_file(tmp_path), 4)
    reference = reference_of(ours(tmp_path), examples)
    sums = torch.zeros(3, 4, dtype=torch.float64)
    # The expected token of each position becomes less likely, all else stays.
    moved = [
        logits - 0.1 * torch.nn.functional.one_hot(pack.targets, logits.shape[1])
        for pack, logits in zip(reference.packs, reference.logits, strict=True)
    ]
    found = difference_to(reference, by_llama_cpp._adding_up(reference, iter(moved), sums))
    tokens = torch.bincount(torch.cat(reference.row_of))
    assert float(sums[0].sum() / tokens.sum()) == pytest.approx(found.loss_reference, rel=1e-6)
    assert float(sums[1].sum() / tokens.sum()) == pytest.approx(found.loss, rel=1e-6)
    chance = by_llama_cpp._chance(reference, sums)
    low, high = chance.loss
    assert float(sums[2].sum() / tokens.sum()) == pytest.approx(found.token_agreement)
    assert chance.agreement[0] <= found.token_agreement <= chance.agreement[1]
    assert low < found.loss - found.loss_reference < high
    spread = float((sums[0] / tokens).max() - (sums[0] / tokens).min())
    assert high - low < 0.1 * spread
    assert low > 0.09


def test_files_on_which_llama_cpp_rounds(tmp_path: Path) -> None:
    for kind, precise in ((Kind.F32, True), (Kind.F16, True), (Kind.BF16, False), (Kind.Q8_0, False)):
        file = write_gguf(tmp_path / f"{kind.name}.gguf", random_model("llama"), "llama", kind)
        assert by_llama_cpp.is_precise(luthier.load(str(file)).model) == precise, kind
