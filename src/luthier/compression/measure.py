"""What a model is worth and what it costs: loss on windows of text, agreement with the original, speed, bytes, energy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.data.packing import Pack
from luthier.evaluation.bootstrap import Array, Figure, Interval, ratio, resample
from luthier.evaluation.loss import predicting_hidden
from luthier.evaluation.scores import token_log_likelihoods
from luthier.generation.generator import Generator, position_limit
from luthier.linear import count_numbers
from luthier.models.compressed_folder import stored_bytes
from luthier.models.modes import evaluation_mode
from luthier.models.packed import head_of, packed_hidden, packed_logits

PROMPT_TOKENS, BEGIN_TOKENS, DECODED_TOKENS, ROUNDS = 512, 64, 32, 3
ROWS_AT_ONCE = 128
# Energy of moving a byte from memory and of one multiply-add, in joules, at 45 nm: Horowitz, Computing's energy problem,
# ISSCC 2014: 1.3 to 2.6 nJ for 64 bits of DRAM; 3.7 + 0.9 pJ in float32. Machines differ; ratios of the estimate hold better.
JOULES_A_BYTE, JOULES_A_MULTIPLY_ADD = 2.0e-9 / 8, 4.6e-12


@dataclass(frozen=True)
class Windows:
    """A model on N windows. losses: (N,) sums of -log p over each window's supervised tokens; tokens: (N,) their numbers;
    likeliest: for each window the likeliest next token at each of them; right: (N,) at how many it is the text's."""

    losses: Array
    tokens: Array
    likeliest: list[Tensor]
    right: Array

    @property
    def mean_loss(self) -> float:
        return float(self.losses.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Quality:
    """Figures with 95 % intervals from resampled windows. accuracy: the share of tokens at which the likeliest next one is the
    text's; agreement: at which it is the original's; rise: of the mean loss over the original's, paired window by window."""

    perplexity: float
    perplexity_interval: Interval
    loss: float
    agreement: float
    agreement_interval: Interval
    rise: float
    rise_interval: Interval
    windows: int
    tokens: int
    accuracy: float
    accuracy_interval: Interval


@dataclass(frozen=True)
class Cost:
    """size_bytes: of all weights as stored; parameters: stored numbers; tokens a second of a prompt of 512, one text at a
    time, and of greedy decoding of 32 behind one of 64; joules_per_token: estimated for decoding, from bytes moved and
    multiply-adds."""

    size_bytes: int
    parameters: int
    prompt_tokens_per_second: float
    decode_tokens_per_second: float
    joules_per_token: float


@torch.no_grad()
def measure_windows(model: PreTrainedModel, packs: Sequence[Pack]) -> Windows:
    """Each pack is one window."""
    losses, likeliest, right = [], list[Tensor](), []
    with evaluation_mode(model):
        for pack in packs:
            losses.append(-float(token_log_likelihoods(model, pack).sum(dtype=torch.float64)))
            likeliest.append(_likeliest(model, pack))
            right.append(float((likeliest[-1] == pack.targets).sum()))
    tokens = np.array([float(pack.supervised_tokens) for pack in packs])
    return Windows(np.array(losses), tokens, likeliest, np.array(right))


def _likeliest(model: PreTrainedModel, pack: Pack) -> Tensor:
    head = head_of(model)
    if head is None:
        return packed_logits(model, pack.ids, pack.starts, pack.predict).argmax(1)
    hidden = predicting_hidden(model, pack)
    return torch.cat([head.logits(rows).argmax(1) for rows in hidden.split(ROWS_AT_ONCE)])


def quality_of(own: Windows, original: Windows) -> Quality:
    """A model beside the original on the same windows."""
    same = np.array([float((a == b).sum()) for a, b in zip(own.likeliest, original.likeliest, strict=True)])
    found = resample(
        [
            Figure("perplexity", np.stack([own.losses, own.tokens], 1), lambda sums: np.exp(ratio(sums))),
            Figure("loss", np.stack([own.losses, own.tokens], 1), ratio),
            Figure("before", np.stack([original.losses, original.tokens], 1), ratio),
            Figure("agreement", np.stack([same, own.tokens], 1), ratio),
            Figure("accuracy", np.stack([own.right, own.tokens], 1), ratio),
        ]
    )
    rise = found["loss"].minus(found["before"])
    return Quality(
        perplexity=found["perplexity"].value,
        perplexity_interval=found["perplexity"].interval(),
        loss=found["loss"].value,
        agreement=found["agreement"].value,
        agreement_interval=found["agreement"].interval(),
        rise=rise.value,
        rise_interval=rise.interval(),
        windows=len(own.losses),
        tokens=int(own.tokens.sum()),
        accuracy=found["accuracy"].value,
        accuracy_interval=found["accuracy"].interval(),
    )


def loss_difference(own: Windows, other: Windows) -> tuple[float, Interval]:
    """own - other of the mean loss, paired window by window, with its 95 % interval."""
    figures = [Figure(name, np.stack([one.losses, one.tokens], 1), ratio) for name, one in (("own", own), ("other", other))]
    found = resample(figures)
    apart = found["own"].minus(found["other"])
    return apart.value, apart.interval()


@torch.no_grad()
def cost_of(model: PreTrainedModel, ids: Tensor) -> Cost:
    """ids: at least one token, repeated to the prompts' lengths. Speeds are of the best of three rounds."""
    prompt = ids.repeat(-(-PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]
    longest = position_limit(model)
    prompt = prompt if longest is None else prompt[: max(1, longest - DECODED_TOKENS - 1)]
    starts = torch.tensor([0, len(prompt)])
    begin, generator = prompt[:BEGIN_TOKENS].tolist(), Generator(model)
    reading, first_token, all_tokens = [], [], []
    with evaluation_mode(model):
        for _ in range(ROUNDS):
            reading.append(_seconds(lambda: packed_hidden(model, prompt, starts, torch.tensor([len(prompt) - 1]))))
            first_token.append(_seconds(lambda: generator.generate([begin], 1)))
            all_tokens.append(_seconds(lambda: generator.generate([begin], 1 + DECODED_TOKENS)))
    # The best of each: of differences the best would be that whose first token was held up.
    decoding = max(min(all_tokens) - min(first_token), 1e-9)
    return Cost(
        stored_bytes(model),
        count_numbers(model),
        len(prompt) / min(reading),
        DECODED_TOKENS / decoding,
        joules_of_a_token(model),
    )


def joules_of_a_token(model: PreTrainedModel) -> float:
    """To decode one: every weight is read and multiplied once; of an embedding that is not the head's too, one row is read."""
    size_bytes, numbers = stored_bytes(model), count_numbers(model)
    embedding: Any = model.get_input_embeddings()
    if getattr(model.get_output_embeddings(), "matrix", None) is not embedding.matrix:
        rows, columns = embedding.matrix.shape
        size_bytes -= embedding.matrix.size_bytes * (rows - 1) // rows
        numbers -= rows * columns
    return size_bytes * JOULES_A_BYTE + numbers * JOULES_A_MULTIPLY_ADD


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
