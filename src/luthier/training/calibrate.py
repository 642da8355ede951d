"""What one layer, the head and the optimiser cost on this machine: measured on a stand-in, a second or two in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters import trainable_parameters
from luthier.config import RunConfig
from luthier.errors import ConfigError
from luthier.evaluation.loss import LOGITS_AT_ONCE, MIN_CHUNK_ROWS, linear_cross_entropy, suits_the_kernel
from luthier.kernels.head import rows_at_once
from luthier.kernels.probe import fma_peak
from luthier.linear import LowRankLinear
from luthier.models.packed import Head, packed_hidden
from luthier.training.blueprint import Blueprint
from luthier.training.live_bytes import LiveBytes
from luthier.training.optimizer import Optimizer
from luthier.training.prepare import set_training_mode
from luthier.training.recompute import decoder_layers, set_recomputed
from luthier.training.sample import VOCABULARY, sample_matrix, sample_model

FLOPS_AT_ONCE = 4e10
LEAST_TOKENS, MEMORY_TOKENS = 128, 256
REPEATS = 2
HEAD_WEIGHTS_AT_ONCE = 1 << 24
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Line:
    """seconds(x) = fixed + each * x, through two measured points."""

    fixed: float
    each: float

    def at(self, x: float) -> float:
        return self.fixed + self.each * x


@dataclass(frozen=True)
class ByteCosts:
    """Bytes. Of one decoder layer, a token's share: what it keeps for backward; its input alone, where it is computed
    again; the most that its backward holds beside what is kept; the same with its second forward. head: one chunk of rows."""

    kept: float
    input: float
    working: float
    recomputing: float
    head: int


@dataclass(frozen=True)
class TimeCosts:
    """Seconds of one decoder layer over a pack of so many tokens, of the head for one supervised token both ways, and of
    the optimiser. flops: of a layer's frozen products for one token, both ways. peak_flops: of the machine, None without
    the native kernels."""

    forward: Line
    backward: Line
    head: float
    optimizer: float
    layer_flops: float
    head_flops: float
    peak_flops: float | None


@dataclass(frozen=True)
class StandIn:
    """What is measured: a model of one layer of each kind, and a part of the head with one chunk of rows to read."""

    config: RunConfig
    model: PreTrainedModel
    head: Head
    head_share: float
    rows: Tensor
    targets: Tensor

    def head_both_ways(self) -> None:
        linear_cross_entropy(self.rows, self.head, self.targets).backward()
        self.head.linear.zero_grad(set_to_none=True)


def stand_in(blueprint: Blueprint, config: RunConfig, targets: list[str], supervised: int) -> StandIn:
    """Make it. The head has as many rows as make HEAD_WEIGHTS_AT_ONCE weights, or all.

    supervised: the most supervised tokens that a pack may hold, and so the most rows of a chunk of logits.
    """
    model = sample_model(blueprint, config, targets)
    set_training_mode(model)
    hidden_size, vocabulary = blueprint.hidden_size, blueprint.vocabulary
    part = min(vocabulary, max(VOCABULARY, HEAD_WEIGHTS_AT_ONCE // hidden_size))
    layer = LowRankLinear(sample_matrix(blueprint.head_storage, part, hidden_size, double=config.double_quant))
    layer.requires_grad_(config.method == "full")
    head = Head(layer, getattr(blueprint.config.get_text_config(), "final_logit_softcapping", None), 1.0)
    rows = torch.full((1, hidden_size), 0.01)
    chunk = min(supervised, max(MIN_CHUNK_ROWS, LOGITS_AT_ONCE // vocabulary))
    if suits_the_kernel(layer, rows):
        chunk = rows_at_once(supervised, vocabulary)
    rows = rows.repeat(max(1, chunk), 1).requires_grad_()
    return StandIn(config, model, head, part / vocabulary, rows, torch.arange(len(rows)) % part)


def measure_bytes(sample: StandIn, tokens: int, length: int) -> ByteCosts:
    """One forward and backward with everything kept, one with all layers recomputed. length: of a usual example."""
    model, (ids, starts) = sample.model, _pack(min(tokens, MEMORY_TOKENS), length)
    depth = len(decoder_layers(model))
    held, worked = [], []
    for count in (0, depth):
        set_recomputed(model, count)
        _both_ways(model, ids, starts)
        with LiveBytes() as live:
            hidden = packed_hidden(model, ids, starts)
            held.append(live.now)
            live.restart_peak()
            hidden.backward(torch.ones_like(hidden))
            worked.append((live.peak - held[-1]) / len(ids))
        model.zero_grad(set_to_none=True)
    set_recomputed(model, 0)
    input_bytes = model.config.get_text_config().hidden_size * 4
    kept = (held[0] - held[1]) / depth / len(ids) + input_bytes
    return ByteCosts(kept, input_bytes, worked[0], worked[1], _head_bytes(sample))


def _head_bytes(sample: StandIn) -> int:
    """What the head holds for one chunk of rows. The kernel's logits are its own and not seen from outside."""
    sample.head_both_ways()
    with LiveBytes() as live:
        linear_cross_entropy(sample.rows, sample.head, sample.targets)
    if not suits_the_kernel(sample.head.linear, sample.rows):
        return int(live.peak / sample.head_share)
    return live.peak + int(len(sample.rows) * sample.head.vocabulary / sample.head_share) * FLOAT_BYTES


def measure_seconds(sample: StandIn, tokens: int, length: int, trained: int) -> TimeCosts:
    """Passes over packs of `tokens` tokens, and half of that, fewer for a large model. trained: numbers in training."""
    layers = decoder_layers(sample.model)
    linear = [module for layer in layers for module in layer.modules() if isinstance(module, LowRankLinear)]
    weights = sum(module.in_features * module.out_features for module in linear) / len(layers)
    most = max(LEAST_TOKENS, int(FLOPS_AT_ONCE / (6 * weights * len(layers))))
    forward, backward = _lines(sample.model, min(tokens, most), length)
    head = _least(sample.head_both_ways) / sample.head_share / len(sample.rows)
    head_weights = sample.rows.shape[1] * sample.head.vocabulary / sample.head_share
    optimizer = _optimizer_seconds(sample, trained)
    return TimeCosts(forward, backward, head, optimizer, 4 * weights, 4 * head_weights, _peak_flops())


def _lines(model: PreTrainedModel, tokens: int, length: int) -> tuple[Line, Line]:
    """Seconds of one layer's forward and backward as lines over the tokens of a pack."""
    layers = len(decoder_layers(model))
    points = []
    for count in (tokens // 2, tokens):
        ids, starts = _pack(max(2, count), length)
        times = [_both_ways(model, ids, starts) for _ in range(1 + REPEATS)][1:]
        points.append((len(ids), *(min(one) / layers for one in zip(*times, strict=True))))
    (x1, f1, b1), (x2, f2, b2) = points
    return _line(x1, f1, x2, f2), _line(x1, b1, x2, b2)


def _line(x1: float, y1: float, x2: float, y2: float) -> Line:
    """Through both points, unless noise would make it fall or start below zero: then through the origin and the second."""
    each = (y2 - y1) / (x2 - x1) if x2 > x1 else 0.0
    fixed = y2 - each * x2
    return Line(fixed, each) if each > 0 and fixed > 0 else Line(0.0, y2 / x2)


def _both_ways(model: PreTrainedModel, ids: Tensor, starts: Tensor) -> tuple[float, float]:
    """Seconds of a forward and a backward pass; gradients are let go again."""
    started = time.perf_counter()
    hidden = packed_hidden(model, ids, starts)
    between = time.perf_counter()
    hidden.backward(torch.ones_like(hidden))
    ended = time.perf_counter()
    model.zero_grad(set_to_none=True)
    return between - started, ended - between


def _pack(tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """Documents of `length` tokens end to end, the last one shorter."""
    starts = [*range(0, tokens, max(1, length)), tokens]
    return torch.arange(tokens) % VOCABULARY, torch.tensor(starts)


def _optimizer_seconds(sample: StandIn, trained: int) -> float:
    """Of one step over all `trained` numbers, from a step over those of the stand-in, in torch's AdamW."""
    parameters = trainable_parameters(sample.model)
    for _, parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = Optimizer(parameters, sample.config.model_copy(update={"optimizer": "adamw"}))

    def step() -> None:
        optimizer.clip()
        optimizer.step(1e-6)

    seconds = _least(step)
    optimizer.zero_grad()
    return seconds * trained / max(1, sum(parameter.numel() for _, parameter in parameters))


def _least(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _peak_flops() -> float | None:
    try:
        return fma_peak()
    except ConfigError:  # the reference kernels are in use; there is nothing to compare with
        return None
