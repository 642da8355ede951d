"""Which way of merging is recommended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luthier.export import forms
from luthier.export.choices import DEQUANTIZED, ORIGINAL, Choice, Measured, choices_for, recommend
from luthier.export.compare import Difference


def measured(kind: str, size_bytes: int, error: float, *, good: bool = True, base: str = DEQUANTIZED) -> Measured:
    agreement = 1.0 if good else 0.5
    return Measured(Choice(base, kind), size_bytes, Difference(error, error, 1.0, 1.0, agreement, agreement, 10, 2))


def test_the_smallest_that_is_as_good_else_the_nearest_dense_one() -> None:
    f32, bf16 = measured("f32", 400_000, 0.0), measured("bf16", 200_000, 0.01)
    chosen, why = recommend([f32, bf16, measured("nf4", 80_000, 0.2, good=False)], forms.MERGED_KINDS, DEQUANTIZED)
    assert chosen is bf16
    assert "it takes 200 kB instead of 400 kB" in why
    worse = [measured(one.choice.kind, one.size_bytes, one.difference.logits_error, good=False) for one in (f32, bf16)]
    chosen, why = recommend(worse, forms.MERGED_KINDS, DEQUANTIZED)
    assert chosen is worse[0]
    assert why.endswith("the others are worse; to lose nothing, keep the adapter apart.")


@pytest.mark.parametrize(
    ("family", "kinds"),
    [("llama", ["f32", "bf16", "nf4", "q8_0", "q4_k"]), ("olmo2", ["f32", "bf16", "nf4"]), ("gpt2", ["f32", "bf16"])],
)
def test_what_no_form_holds_of_a_family_is_not_compared(family: str, kinds: list[str]) -> None:
    """GGUF files hold no OLMo 2, and nf4 no weights that lie the other way, as GPT-2's: to recommend either would mislead."""
    model = SimpleNamespace(config=SimpleNamespace(model_type=family))
    layer = SimpleNamespace(matrix=SimpleNamespace(transposed=family == "gpt2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.export.choices.low_rank_layers", lambda _: {"layer": layer})
        assert [one.kind for one in choices_for(model, "f32", "bf16", has_original=False)] == kinds  # type: ignore[arg-type]


def test_what_another_form_holds_as_well_is_named() -> None:
    """The table shows types that the form asked for has not: that one is as good must not be passed over."""
    bf16, nf4 = measured("bf16", 200_000, 0.01), measured("nf4", 80_000, 0.2, good=False)
    q8_0 = measured("q8_0", 110_000, 0.02, base=ORIGINAL)
    chosen, why = recommend([bf16, nf4, q8_0], forms.MERGED_KINDS, DEQUANTIZED)
    assert chosen is bf16
    assert why.endswith("no smaller type of this form is as good. As good in 110 kB: --to gguf --dtype q8_0 --base original.")
    f16, good_nf4 = measured("f16", 200_000, 0.01), measured("nf4", 80_000, 0.2)
    assert recommend([f16, good_nf4], forms.GGUF_KINDS, DEQUANTIZED)[1].endswith("As good in 80.0 kB: --to merged --dtype nf4.")
    larger = measured("q8_0", 300_000, 0.02)
    assert recommend([bf16, larger], forms.MERGED_KINDS, DEQUANTIZED)[1].endswith("no smaller type of this form is as good.")
