"""llama.cpp as the judge of a GGUF file: its logits, its greedy text and its tokens against our own reading of the same file.

With float32 and float16 matrices both compute nearly the same. What llama.cpp multiplies with blocks it rounds to 8 bits, and
beside bfloat16 to its 8: that moves losses by chance to either side, and turns a token wherever two are nearly tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.adapters.targets import low_rank_layers
from luthier.data import Example, Renderer
from luthier.evaluation.bootstrap import Figure, Interval, ratio, resample
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.pieces import text_of
from luthier.evaluation.stops import end_tokens
from luthier.export import llama_cpp
from luthier.export.choices import LEAST_LOSS, LOSS_SHARE, TOKEN_AGREEMENT
from luthier.export.compare import Difference, Reference, difference_to, reference_of
from luthier.export.verification import Verification

LEAST_EQUAL_ROWS = 0.97
ANSWER_TOKENS = 64
# Beside matrices of these kinds llama.cpp keeps at least 11 bits of what it multiplies with them.
PRECISE = frozenset({"f32", "f16"})


def judged_by_llama_cpp(
    path: Path, adapter: Path | None, ours: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Verification:
    """llama.cpp against our own reading of the same file.

    Passed where the loss is within LOSS_SHARE and the greedy text the same on LEAST_EQUAL_ROWS of rows; for a file whose
    matrices make llama.cpp round, where the loss's paired 95 % interval over rows reaches that bound, and the text is the
    same or the interval of the share of the rows' own tokens at which both write the same next one reaches TOKEN_AGREEMENT.
    """
    reference = reference_of(ours, examples)
    asked = [example for example in examples if example.prompt_ids]
    longest = max(len(ids) for example in examples for ids in (example.ids, example.prompt_ids))
    sums = torch.zeros(3, reference.rows, dtype=torch.float64)
    judge = llama_cpp.LlamaCpp(path, longest + ANSWER_TOKENS + 1, adapter=adapter)
    try:
        theirs = (judge.pack_logits(pack) for pack in reference.packs)
        difference = difference_to(reference, _adding_up(reference, theirs, sums))
        stops = end_tokens(ours, tokenizer, Renderer(tokenizer, max_length=64))
        texts = [text_of(tokenizer, judge.answer(example.prompt_ids, ANSWER_TOKENS, stops)) for example in asked]
        rows = [str(tokenizer.decode(example.ids)) for example in examples]
        cut = [judge.tokens(row, special=True) == tokenizer(row, add_special_tokens=True).input_ids for row in rows]
    finally:
        judge.close()
    answers = generate_batch(ours, tokenizer, [one.prompt_ids for one in asked], max_new_tokens=ANSWER_TOKENS)
    equal = sum(a == b for a, b in zip(answers, texts, strict=True)) / len(asked) if asked else None
    passed, bound = _passed(difference, equal, None if is_precise(ours) else _chance(reference, sums))
    return Verification(judge.name, "our reading of the file", passed, bound, difference, equal, sum(cut) / len(cut))


def is_precise(model: PreTrainedModel) -> bool:
    """Whether llama.cpp rounds nothing of the model below 11 bits."""
    return all(layer.matrix.kind in PRECISE for layer in low_rank_layers(model).values())


@dataclass(frozen=True)
class Chance:
    """95 % intervals over rows: loss: of their loss less ours, paired; agreement: of the share of same next tokens."""

    loss: Interval
    agreement: Interval


def _adding_up(reference: Reference, logits: Iterator[Tensor], sums: Tensor) -> Iterator[Tensor]:
    """`logits` as they come; sums (3, rows) gets, row by row, -log p of the reference and of these, and how often both
    would write the same next token."""
    for pack, rows, wanted, got in zip(reference.packs, reference.row_of, reference.logits, logits, strict=True):
        losses = [F.cross_entropy(own, pack.targets, reduction="none") for own in (wanted, got)]
        for side, values in zip(sums, (*losses, wanted.argmax(1) == got.argmax(1)), strict=True):
            side.index_add_(0, rows, values.to(torch.float64))
        yield got


def _chance(reference: Reference, sums: Tensor) -> Chance:
    """The intervals of what `_adding_up` has summed."""
    tokens = torch.bincount(torch.cat(reference.row_of), minlength=reference.rows).numpy()
    names = ("ours", "theirs", "same")
    sides = [Figure(name, np.stack([side.numpy(), tokens], 1), ratio) for name, side in zip(names, sums, strict=True)]
    found = resample(sides)
    return Chance(found["theirs"].minus(found["ours"]).interval(), found["same"].interval())


def _passed(difference: Difference, equal: float | None, chance: Chance | None) -> tuple[bool, str]:
    """Whether it did what is asked, and what that is. chance: where rounding leaves something to it, else None."""
    within = LOSS_SHARE * max(difference.loss_reference, LEAST_LOSS)
    apart = difference.loss - difference.loss_reference
    same_text = equal is None or equal >= LEAST_EQUAL_ROWS
    loss_bound = f"loss within {LOSS_SHARE:.1%} (of {LEAST_LOSS:g} where it is smaller)"
    text_bound = f"the same greedy text on {LEAST_EQUAL_ROWS:.0%} of rows"
    if chance is None:
        return abs(apart) <= within and same_text, f"{loss_bound}, {text_bound}"
    low, high = min(chance.loss[0], apart), max(chance.loss[1], apart)
    reaches = low <= within and high >= -within
    same_tokens = max(chance.agreement[1], difference.token_agreement) >= TOKEN_AGREEMENT
    text_bound += f" or the same next token at {TOKEN_AGREEMENT:.0%} of tokens"
    return reaches and (same_text or same_tokens), f"{loss_bound}, {text_bound}, as far as these rows tell"
