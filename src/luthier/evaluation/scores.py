"""Log-likelihoods: of each supervised token, and of each example as the sum over its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from luthier.data import Example
from luthier.data.packing import Pack, pack_examples
from luthier.errors import DataError, NumericError, ShapeError, bulleted
from luthier.evaluation.bootstrap import Array
from luthier.evaluation.loss import LOGITS_AT_ONCE, MIN_CHUNK_ROWS, predicting_hidden, suits_the_kernel
from luthier.generation.generator import position_limit
from luthier.kernels.head import linear_cross_entropy as kernel_cross_entropy
from luthier.matrices import StoredMatrix
from luthier.models.modes import evaluation_mode
from luthier.models.packed import Head, head_of, packed_logits, shares_prefixes
from luthier.progress import Progress

PACK_TOKENS = 2048
CANDIDATE_TOKENS = 1 << 15


@torch.no_grad()
def token_log_likelihoods(model: PreTrainedModel, pack: Pack) -> Tensor:
    """log p(target) of each of the pack's S supervised tokens, (S,) float32, in the order of pack.targets.

    The logits of a chunk of tokens are alive at any time, except for a model whose head is not known.
    """
    if pack.supervised_tokens == 0:
        return torch.zeros(0)
    pack = pack.on(model.device)
    head = head_of(model)
    if head is None:
        logits = packed_logits(model, pack.ids, pack.starts, pack.predict)
        return -F.cross_entropy(logits, pack.targets, reduction="none")
    return _head_log_likelihoods(predicting_hidden(model, pack), head, pack.targets)


def _head_log_likelihoods(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    linear = head.linear
    if suits_the_kernel(linear, hidden):
        assert isinstance(linear.matrix, StoredMatrix)
        storage, bias = linear.matrix.storage(), linear.bias
        return -kernel_cross_entropy(hidden, storage, targets, bias=bias, softcap=head.softcap, scale=head.scale)[1]
    rows = max(MIN_CHUNK_ROWS, LOGITS_AT_ONCE // head.vocabulary)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return -torch.cat([F.cross_entropy(head.logits(some), wanted, reduction="none") for some, wanted in chunks])


def pack_log_likelihoods(model: PreTrainedModel, pack: Pack, examples: Sequence[Example]) -> Tensor:
    """The sum of log p(target) over the supervised tokens of each example of a pack: float64, one an entry of pack.rows.

    examples: the list that the pack was made of. An example without supervised tokens has 0.
    Raises ShapeError where the examples are not those of the pack.
    """
    counts = torch.tensor([supervised_count(examples[row]) for row in pack.rows])
    if int(counts.sum()) != pack.supervised_tokens:
        raise ShapeError(
            f"the examples of a pack must have its {pack.supervised_tokens} supervised tokens; they have {int(counts.sum())}."
        )
    scores = token_log_likelihoods(model, pack).to(torch.float64).cpu()
    owners = torch.arange(len(counts)).repeat_interleave(counts)
    return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, owners, scores)


def score_examples(
    model: PreTrainedModel, examples: Sequence[Example], *, progress: Progress | None = None, stage: str = "scoring"
) -> Array:
    """`pack_log_likelihoods` of any number of examples in their order, (len(examples),); modes of the model are left alone.

    What neighbours in a pack begin with in common is computed once, where the model can.
    progress(stage, examples done, examples) after each pack.
    """
    scores = np.zeros(len(examples))
    done = 0
    with torch.no_grad(), evaluation_mode(model):
        for pack in pack_examples(examples, max_tokens=PACK_TOKENS, share=shares_prefixes(model)):
            scores[pack.rows] = pack_log_likelihoods(model, pack, examples).numpy()
            done += len(pack.rows)
            if progress is not None:
                progress(stage, done, len(examples))
    return scores


def score_answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    where: Sequence[str],
    *,
    progress: Progress | None = None,
    stage: str = "scoring",
) -> list[Array]:
    """log p(answer | prompt) for the candidate answers of each prompt: for each prompt one value a candidate.

    prompts: token ids; answers: for each prompt, the token ids of its candidates, at least one token each.
    A prompt is computed once for those of its candidates that fit a pack together.
    Raises DataError naming the rows whose prompt is empty or that leave the model's positions, NumericError for a score
    that is not finite.
    """
    _check_lengths(model, prompts, answers, where)
    scores: list[Array] = []
    for rows in _row_batches(prompts, answers):
        candidates = [_candidate(prompts[row], answer, where[row]) for row in rows for answer in answers[row]]
        found = score_examples(model, candidates)
        damaged = np.flatnonzero(~np.isfinite(found))
        if len(damaged):
            raise NumericError(
                f"the log-likelihood of an answer must be finite; {candidates[damaged[0]].where} has {found[damaged[0]]}. "
                "The model's weights are damaged."
            )
        ends = np.cumsum([len(answers[row]) for row in rows])
        scores += np.split(found, ends[:-1])
        if progress is not None:
            progress(stage, len(scores), len(prompts))
    return scores


def _row_batches(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]) -> Iterator[range]:
    """Neighbouring rows whose candidates, written out with their prompts, have about CANDIDATE_TOKENS tokens."""
    first = tokens = 0
    for row, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        tokens += sum(len(prompt) + len(answer) for answer in own)
        if tokens >= CANDIDATE_TOKENS:
            yield range(first, row + 1)
            first, tokens = row + 1, 0
    if first < len(prompts):
        yield range(first, len(prompts))


def _candidate(prompt: Sequence[int], answer: Sequence[int], where: str) -> Example:
    """The prompt with one answer, of which only the answer is supervised."""
    supervised = [False] * len(prompt) + [True] * len(answer)
    return Example([*prompt, *answer], supervised, list(prompt), "", None, where)


def answer_tokens(example: Example) -> list[int]:
    """The tokens that a model writes to give the answer of a row: from the end of the prompt to the last supervised token.

    That is the end of turn; what a template puts behind it is nothing that a model says.
    """
    end = max((t for t, supervised in enumerate(example.supervised) if supervised), default=-1) + 1
    return example.ids[len(example.prompt_ids) : end]


def supervised_count(example: Example) -> int:
    """How many of its tokens carry loss; the first never does."""
    return sum(example.supervised[1:])


def _check_lengths(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    where: Sequence[str],
) -> None:
    limit = position_limit(model) or math.inf
    problems = []
    for prompt, own, place in zip(prompts, answers, where, strict=True):
        length = len(prompt) + max(map(len, own))
        if not prompt:
            problems.append(f"{place} has an empty prompt")
        elif length > limit:
            problems.append(f"{place} has {length} tokens with its longest answer")
    if problems:
        room = "" if limit == math.inf else f" and fit the model's {limit} positions"
        raise DataError(
            f"rows whose answers are scored need a prompt{room}; these do not:\n{bulleted(problems)}\nLeave these rows out."
        )
