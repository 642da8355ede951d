"""llama.cpp as the judge of a GGUF file: its logits, its greedy text and its tokens against our own reading of the same file.

With float32 and float16 matrices both compute nearly the same. What llama.cpp multiplies with blocks it rounds to 8 bits, and
beside bfloat16 to its 8: that moves losses by chance to either side, and turns a token wherever two are nearly tied. How far
it moves the logits is measured on our own forward, rounded in the same way: a file that is read wrongly is beyond that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from luthier.export.choices import LEAST_LOSS, LOSS_SHARE
from luthier.export.compare import Difference, Reference, difference_to, reference_of
from luthier.export.rounding import rounded_logits
from luthier.export.verification import Verification
from luthier.units import percent_text

LEAST_EQUAL_ROWS = 0.97
ANSWER_TOKENS = 64
# How many times as far as by our own rounding the logits may be moved. Of right files it is 0.9 to 1.1 times: seven types in
# six families of random models, and SmolLM2-135M on four rows.
MOST_TIMES = 2.0
# What is not rounded alike all the same: sums in another order, and Gemma's GELU, which llama.cpp looks up in float16 (2e-4).
LEAST_MOVED = 1e-3
# Beside matrices of these kinds llama.cpp keeps at least 11 bits of what it multiplies with them.
PRECISE = frozenset({"f32", "f16"})


def judged_by_llama_cpp(
    path: Path, adapter: Path | None, ours: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Verification:
    """llama.cpp against our own reading of the same file.

    Passed where it cuts LEAST_EQUAL_ROWS of rows into the same tokens, the error of the logits is at most MOST_TIMES that of
    our own forward with its inputs rounded alike, and the loss is within LOSS_SHARE; for a file beside whose matrices
    llama.cpp keeps fewer than 11 bits, where the loss's paired 95 % interval over rows reaches that. The greedy text is
    compared and not judged: it turns wherever two tokens are nearly tied.
    """
    reference = reference_of(ours, examples)
    asked = [example for example in examples if example.prompt_ids]
    longest = max(len(ids) for example in examples for ids in (example.ids, example.prompt_ids))
    losses = torch.zeros(2, reference.rows, dtype=torch.float64)
    judge = llama_cpp.LlamaCpp(path, longest + ANSWER_TOKENS + 1, adapter=adapter)
    try:
        theirs = (judge.pack_logits(pack) for pack in reference.packs)
        difference = difference_to(reference, _adding_losses(reference, theirs, losses))
        stops = end_tokens(ours, tokenizer, Renderer(tokenizer, max_length=64))
        texts = [text_of(tokenizer, judge.answer(example.prompt_ids, ANSWER_TOKENS, stops)) for example in asked]
        rows = [str(tokenizer.decode(example.ids)) for example in examples]
        cut = [judge.tokens(row, special=True) == tokenizer(row, add_special_tokens=True).input_ids for row in rows]
    finally:
        judge.close()
    answers = generate_batch(ours, tokenizer, [one.prompt_ids for one in asked], max_new_tokens=ANSWER_TOKENS)
    equal = sum(a == b for a, b in zip(answers, texts, strict=True)) / len(asked) if asked else None
    same_tokens = sum(cut) / len(cut)
    moved = difference_to(reference, rounded_logits(ours, reference)).logits_error
    passed, bound = _passed(difference, same_tokens, moved, None if is_precise(ours) else _interval(reference, losses))
    return Verification(judge.name, "our reading of the file", passed, bound, difference, equal, same_tokens)


def is_precise(model: PreTrainedModel) -> bool:
    """Whether llama.cpp rounds nothing of the model below 11 bits."""
    return all(layer.matrix.kind in PRECISE for layer in low_rank_layers(model).values())


def _adding_losses(reference: Reference, logits: Iterator[Tensor], losses: Tensor) -> Iterator[Tensor]:
    """`logits` as they come; losses (2, rows) gets the sums of -log p of the reference and of these, row by row."""
    for pack, rows, wanted, got in zip(reference.packs, reference.row_of, reference.logits, logits, strict=True):
        for side, own in zip(losses, (wanted, got), strict=True):
            side.index_add_(0, rows, F.cross_entropy(own, pack.targets, reduction="none").to(torch.float64))
        yield got


def _interval(reference: Reference, losses: Tensor) -> Interval:
    """The paired 95 % interval, over rows, of the loss of the second side less that of the first."""
    tokens = torch.bincount(torch.cat(reference.row_of), minlength=reference.rows).numpy()
    sides = [
        Figure(name, np.stack([side.numpy(), tokens], 1), ratio) for name, side in zip(("ours", "theirs"), losses, strict=True)
    ]
    found = resample(sides)
    return found["theirs"].minus(found["ours"]).interval()


def _passed(difference: Difference, same_tokens: float, moved: float, interval: Interval | None) -> tuple[bool, str]:
    """Whether it did what is asked, and what that is. moved: the error of the logits that rounding alone makes; interval: of
    the loss apart, where chance has a part in it."""
    within = LOSS_SHARE * max(difference.loss_reference, LEAST_LOSS)
    farthest = MOST_TIMES * max(moved, LEAST_MOVED)
    apart = difference.loss - difference.loss_reference
    low, high = (apart, apart) if interval is None else (min(interval[0], apart), max(interval[1], apart))
    near = difference.logits_error <= farthest and low <= within and high >= -within
    bound = (
        f"loss within {percent_text(LOSS_SHARE)} (of {LEAST_LOSS:g} where it is smaller)"
        f"{'' if interval is None else ' as far as these rows tell'}, the same tokens on {percent_text(LEAST_EQUAL_ROWS)} of "
        f"rows, error of the logits at most {farthest:.2g}, {MOST_TIMES:g} times what rounding moves them"
    )
    return near and same_tokens >= LEAST_EQUAL_ROWS, bound
