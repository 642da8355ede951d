"""Healing: what a compressed model stores is trained a little to give back the original's next tokens.

    loss = mean over tokens of KL(softmax(logits of the original) | softmax(logits))

over the calibration text and all the text beside it that nothing is measured on. Factors, norms and biases are trained
(trained.py); neither rank nor bytes grow.
Sources: distillation of logits, arXiv:1503.02531; training what a decomposition left, SVD-LLM, arXiv:2403.07378, section 3.3;
norms of a quantised model, arXiv:2309.02784.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from luthier.compression.trained import Opened, Trained
from luthier.data.packing import Pack
from luthier.errors import ConfigError, NumericError
from luthier.evaluation.loss import predicting_hidden
from luthier.linear import LowRankLinear
from luthier.models.modes import evaluation_mode
from luthier.models.packed import Head, head_of
from luthier.progress import Progress
from luthier.training.optimizer import flushed_denormals

STEP_WINDOWS = 1
LEARNING_RATE, WARMUP, CLIP, BETAS = 1e-4, 0.05, 1.0, (0.9, 0.99)
ROWS_AT_ONCE = 128
# What the original's states over the text of healing may take, unless the calibration text alone takes more.
STATES_BYTES = 256 << 20


@dataclass(frozen=True)
class Teacher:
    """The original on the text of healing: its states before its head, (S, hidden) bfloat16 for each pack, and that head, which
    gives its logits without itself."""

    packs: list[Pack]
    hidden: list[Tensor]
    head: Head


def known_head(model: PreTrainedModel) -> Head:
    """Raises ConfigError for a model whose head is not one that is known."""
    head = head_of(model)
    if head is None:
        raise ConfigError(f"healing needs a head that is known; {type(model).__name__} has another. Leave --heal out.")
    return head


@torch.no_grad()
def teacher_of(model: PreTrainedModel, packs: Sequence[Pack]) -> Teacher:
    """Raises what `known_head` raises."""
    head = known_head(model)
    with evaluation_mode(model):
        hidden = [predicting_hidden(model, pack).to(torch.bfloat16) for pack in packs]
    linear = head.linear
    assert isinstance(linear, LowRankLinear)
    # A layer of its own on the same matrix, which stays when the model's head is replaced.
    return Teacher(list(packs), hidden, Head(LowRankLinear(linear.matrix, linear.bias), head.softcap, head.scale))


def healing_packs(calibration: Sequence[Pack], rest: Sequence[Pack], steps: int, width: int) -> list[Pack]:
    """The calibration text and, evenly spread, as much of the rest as so many steps see and STATES_BYTES has room for.

    width: of the model's hidden states.
    """
    states = sum(pack.supervised_tokens for pack in [*calibration, *rest]) * 2 * width
    room = STATES_BYTES * (len(calibration) + len(rest)) // max(1, states)
    more = max(0, min(room, steps * STEP_WINDOWS, len(calibration) + len(rest)) - len(calibration))
    return [*calibration, *(rest[number * len(rest) // more] for number in range(more))]


def heal(
    model: PreTrainedModel,
    teacher: Teacher,
    steps: int,
    *,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    progress: Progress | None = None,
) -> list[float]:
    """Train and store; the loss of every step. The same for the same seed.

    A step takes STEP_WINDOWS packs; AdamW, a short rise and half a cosine of the rate, gradients clipped to a norm of CLIP.
    Memory beside the model: one pack's activations and 16 bytes for a number that is trained. Raises NumericError where the
    loss is not finite.
    """
    opened = Opened(model, seed)
    groups = [{"params": [one.latent], "rate": one.rate} for one in opened.trained]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    losses: list[float] = []
    with evaluation_mode(model), flushed_denormals():
        for step, chosen in zip(range(steps), _order(len(teacher.packs), seed), strict=False):
            if progress is not None:
                progress("healing", step, steps)
            loss = _backward(model, teacher, chosen)
            if not math.isfinite(loss):
                raise NumericError(f"healing must stay finite; the loss of step {step + 1} is {loss}. Leave --heal out.")
            _step(optimizer, opened.trained, learning_rate * _schedule(step, steps))
            losses.append(loss)
    opened.close()
    return losses


def _order(count: int, seed: int) -> Iterator[list[int]]:
    """STEP_WINDOWS numbers below `count` at a time: all of them in a drawn order, then in another one, without an end."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while True:
        while len(order) < STEP_WINDOWS:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:STEP_WINDOWS]
        order = order[STEP_WINDOWS:]


def _step(optimizer: torch.optim.Optimizer, trained: Sequence[Trained], learning_rate: float) -> None:
    for one in trained:
        one.take_gradient()
    torch.nn.utils.clip_grad_norm_([one.latent for one in trained], CLIP)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
    optimizer.step()
    optimizer.zero_grad()
    for one in trained:
        one.place()


def _schedule(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to a tenth."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _backward(model: PreTrainedModel, teacher: Teacher, chosen: Sequence[int]) -> float:
    """Add the gradients of the loss over the chosen packs; the loss."""
    head = known_head(model)
    tokens = sum(teacher.packs[number].supervised_tokens for number in chosen)
    total = 0.0
    for number in chosen:
        with torch.enable_grad():
            hidden = predicting_hidden(model, teacher.packs[number])
        gradient, share = _divergence(head, hidden.detach(), teacher.head, teacher.hidden[number])
        hidden.backward(gradient / tokens)
        total += share / tokens
    return total


def _divergence(head: Head, hidden: Tensor, known: Head, wanted: Tensor) -> tuple[Tensor, float]:
    """(gradient to `hidden`, sum of KL(p | q) over rows) for p of the states `wanted` and q of `hidden`, (S, hidden).

    d KL / d logits = q - p. Logits of ROWS_AT_ONCE rows live at a time.
    """
    gradient = torch.empty_like(hidden)
    total = 0.0
    for first in range(0, len(hidden), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        with torch.enable_grad():
            leaf = hidden[rows].requires_grad_()
            logits = head.logits(leaf)
        log_q = F.log_softmax(logits.detach(), 1)
        with torch.no_grad():
            log_p = F.log_softmax(known.logits(wanted[rows].to(torch.float32)), 1)
        p = log_p.exp()
        total += float(torch.dot(p.view(-1), log_p.sub_(log_q).view(-1)))
        (gradient[rows],) = torch.autograd.grad(logits, leaf, log_q.exp_().sub_(p))
    return gradient, total
