"""Healing: the weakest directions of a compressed model's factors are trained to give back the original's next tokens.

The last directions of each factored layer become a low-rank term, the rest stays frozen, and

    loss = mean over tokens of KL(softmax(logits of the original) | softmax(logits))

is lowered over the calibration text. Then the term goes back into the factors in the same places, so that neither rank nor
bytes grow; what is trained is rounded to the factors' storage once, at the end. Layers that share a right factor keep it:
of these the left directions alone are trained.
Sources: distillation of logits, arXiv:1503.02531; training what a decomposition left, SVD-LLM, arXiv:2403.07378, section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters.targets import low_rank_layers
from luthier.data.packing import Pack
from luthier.errors import ConfigError, NumericError
from luthier.evaluation.loss import predicting_hidden
from luthier.linear import LowRankLinear, LowRankTerm
from luthier.lowrank import Factors, pivoted
from luthier.matrices import FactoredMatrix, stored
from luthier.matrices.factored import StoredMatrix
from luthier.models.modes import evaluation_mode
from luthier.models.packed import Head, head_of
from luthier.progress import Progress

TERM, START = "healing", "healing_start"
DIRECTIONS = 32
STEP_WINDOWS = 2
LEARNING_RATE, WARMUP, CLIP = 5e-4, 0.05, 1.0
ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class Teacher:
    """The original's states before its head, (S, hidden) bfloat16 for each pack, and that head: its logits without itself."""

    hidden: list[Tensor]
    head: Head


@torch.no_grad()
def teacher_of(model: PreTrainedModel, packs: Sequence[Pack]) -> Teacher:
    """Raises ConfigError for a model whose head is not one that is known."""
    head = head_of(model)
    if head is None:
        raise ConfigError(f"healing needs a head that is known; {type(model).__name__} has another. Leave --heal out.")
    with evaluation_mode(model):
        hidden = [predicting_hidden(model, pack).to(torch.bfloat16) for pack in packs]
    linear = head.linear
    assert isinstance(linear, LowRankLinear)
    # A layer of its own on the same matrix, which stays when the model's head is replaced.
    return Teacher(hidden, Head(LowRankLinear(linear.matrix, linear.bias), head.softcap, head.scale))


def heal(
    model: PreTrainedModel,
    teacher: Teacher,
    packs: Sequence[Pack],
    steps: int,
    *,
    seed: int = 0,
    learning_rate: float = LEARNING_RATE,
    progress: Progress | None = None,
) -> list[float]:
    """Train and merge; the loss of every step. Deterministic for a seed.

    Raises ConfigError where no layer has factors, NumericError where the loss is not finite.
    """
    layers = {name: layer for name, layer in low_rank_layers(model).items() if isinstance(layer, LowRankLinear)}
    factored = {name: layer for name, layer in layers.items() if isinstance(layer.matrix, FactoredMatrix)}
    if not factored:
        raise ConfigError("healing trains the factors of layers, and no layer has any at this budget. Leave --heal out.")
    shared = _shared_rights(factored)
    model.requires_grad_(False)
    for layer in factored.values():
        _peel(layer, id(layer.matrix.right) in shared)
    losses = _train(model, teacher, packs, steps, seed, learning_rate, progress)
    merged: dict[int, StoredMatrix] = {}
    for layer in factored.values():
        _merge(layer, merged)
    return losses


def _shared_rights(layers: dict[str, LowRankLinear]) -> set[int]:
    rights = [id(layer.matrix.right) for layer in layers.values() if isinstance(layer.matrix, FactoredMatrix)]
    return {right for right in rights if rights.count(right) > 1}


def _peel(layer: LowRankLinear, keeps_right: bool) -> None:
    """Put a term B A on the layer that starts as the last directions, beside a frozen one of - B A as it starts.

    What is stored stays as it is; together the terms add what training changes.
    """
    matrix = layer.matrix
    assert isinstance(matrix, FactoredMatrix)
    own = min(DIRECTIONS, matrix.rank)
    factors = _directions(matrix)
    A, B = factors.A[-own:], factors.B[:, -own:]
    term = LowRankTerm(A.clone(), B.clone(), 1.0)
    term.lora_A.requires_grad_(not keeps_right)
    layer.terms[TERM] = term
    layer.terms[START] = LowRankTerm(A.clone(), -B, 1.0).requires_grad_(False)


def _directions(matrix: FactoredMatrix) -> Factors:
    """The factors in falling order of their directions: as they are stored, or of a pivoted matrix those of its product."""
    A, L = matrix.right.dequantize(), matrix.left.dequantize()
    if matrix.places is None:
        return Factors(A, L)
    B = torch.cat([torch.eye(matrix.rank), L])[matrix.places.to(torch.int64)]
    (outer, upper), (inner, lower) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, sigma, Vt = torch.linalg.svd(upper @ lower.T)
    root = sigma.sqrt()
    return Factors(root[:, None] * (Vt @ inner.T), (outer @ U) * root)


def _merge(layer: LowRankLinear, merged: dict[int, StoredMatrix]) -> None:
    """Put the trained directions back in their places. merged: right factors by that of the matrix they come from."""
    matrix, term = layer.matrix, layer.terms[TERM]
    assert isinstance(matrix, FactoredMatrix)
    assert isinstance(term, LowRankTerm)
    A, B = (factor.clone() for factor in _directions(matrix))
    keeps_right = torch.equal(A[-term.rank :], term.lora_A.detach())
    A[-term.rank :], B[:, -term.rank :] = term.lora_A.detach(), term.lora_B.detach()
    if matrix.places is not None:
        parts = pivoted(Factors(A, B))
        left, right = stored(parts.coefficients, matrix.left.kind), stored(parts.basis, matrix.right.kind)
        layer.matrix = FactoredMatrix(left, right, places=parts.places)
    else:
        right = matrix.right if keeps_right else merged.setdefault(id(matrix.right), stored(A, matrix.right.kind))
        layer.matrix = FactoredMatrix(stored(B, matrix.left.kind), right, base=matrix.base)
    del layer.terms[TERM], layer.terms[START]


def _train(
    model: PreTrainedModel,
    teacher: Teacher,
    packs: Sequence[Pack],
    steps: int,
    seed: int,
    learning_rate: float,
    progress: Progress | None,
) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    losses = []
    head = head_of(model)
    assert head is not None
    with evaluation_mode(model):
        for step in range(steps):
            if progress is not None:
                progress("healing", step, steps)
            while len(order) < STEP_WINDOWS:
                order += torch.randperm(len(packs), generator=generator).tolist()
            chosen, order = order[:STEP_WINDOWS], order[STEP_WINDOWS:]
            tokens = sum(packs[number].supervised_tokens for number in chosen)
            loss = sum(_backward(model, head, teacher, packs[number], number, tokens) for number in chosen)
            if not math.isfinite(loss):
                raise NumericError(f"healing must stay finite; the loss of step {step + 1} is {loss}. Leave --heal out.")
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
    return losses


def _schedule(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to a tenth."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _backward(model: PreTrainedModel, head: Head, teacher: Teacher, pack: Pack, number: int, tokens: int) -> float:
    """Add the gradients of one pack's share of the loss; that share. Logits of ROWS_AT_ONCE tokens at a time."""
    with torch.enable_grad():
        hidden = predicting_hidden(model, pack)
    gradient = torch.empty_like(hidden)
    total = 0.0
    wanted = teacher.hidden[number]
    for first in range(0, len(hidden), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        own = hidden[part].detach().requires_grad_()
        with torch.no_grad():
            expected = F.log_softmax(teacher.head.logits(wanted[part].to(torch.float32)), 1)
        with torch.enable_grad():
            got = F.log_softmax(head.logits(own), 1)
            loss = F.kl_div(got, expected, reduction="sum", log_target=True) / tokens
        loss.backward()
        assert own.grad is not None
        gradient[part] = own.grad
        total += loss.item()
    hidden.backward(gradient)
    return total
