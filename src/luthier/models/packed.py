"""The forward pass over packed documents, and the output head apart from the body.

Both hold for any Transformers causal language model. What cannot be known from outside is measured once a model, on
two short documents: whether packing keeps them apart, and whether head and transform give the model's own logits.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from luthier.errors import ModelError, ShapeError
from luthier.models.blocks import Entry, Tokens, blocks_hidden, blocks_inputs, blocks_obstacle, blocks_range, blocks_share
from luthier.models.modes import evaluation_mode
from luthier.models.pack_layout import NotPackable, documents, packed_layout
from luthier.notices import say_once

PROBE_STARTS = (0, 6, 13)


@dataclass(frozen=True)
class Head:
    """logits = c tanh(scale linear(h) / c), c = softcap; scale linear(h) without one. h: (S, hidden) -> (S, vocabulary)."""

    linear: nn.Module
    softcap: float | None
    scale: float

    @property
    def vocabulary(self) -> int:
        return int(self.linear.out_features)  # type: ignore[arg-type]

    def logits(self, hidden: Tensor) -> Tensor:
        raw = self.linear(hidden)
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


@dataclass
class _Facts:
    """What was measured: why the model cannot be packed, if so, and the transform after its head, if it has a known one."""

    obstacle: str | None
    transform: tuple[float | None, float] | None


_facts: WeakKeyDictionary[nn.Module, _Facts] = WeakKeyDictionary()


def packed_hidden(
    model: PreTrainedModel,
    ids: Tensor,
    starts: Tensor,
    rows: Tensor | None = None,
    parents: Tensor | None = None,
    entry: Entry | None = None,
) -> Tensor:
    """Hidden states before the head, after the final norm, of documents that attend only inside themselves.

    ids: (T,) int64, the documents end to end; starts: (N + 1,) int64, their boundaries from 0 to T; rows: (S,) int64,
    different positions in the pack, or None for all. parents: (N,) int64, for models that `shares_prefixes` names:
    what stands between two boundaries goes on where an earlier one ends, -1 for a beginning; None for all beginnings.
    -> (T, hidden) or (S, hidden) float32, what each document alone would give; positions restart at 0. No padding is
    computed and no mask over the row is made. Known families run as fused blocks, which skip the last layer's work that
    `rows` has no use for. A family that cannot be packed runs its documents one by one, which is logged once.
    entry: begin at a decoder layer, with what goes into it, as `packed_inputs` gives it.
    Raises ShapeError for boundaries that do not fit the ids, parents or an entry with a model that cannot use them.
    """
    boundaries = _check(ids, starts)
    parents = _usable(model, parents)
    if entry is not None and (obstacle := entry_obstacle(model)) is not None:
        raise ShapeError(f"{type(model).__name__} runs as a whole only: {obstacle}. Give no entry.")
    if _facts_of(model).obstacle is None:
        try:
            hidden = blocks_hidden(model, ids, Tokens.of(starts, parents), rows, entry)
            if hidden is not None:
                return hidden.to(torch.float32)
            hidden = _run_packed(model, _body(model), ids, boundaries).last_hidden_state[0]
            return (hidden if rows is None else hidden[rows]).to(torch.float32)
        except NotPackable as error:
            _give_up_packing(model, str(error))
    alone = [_run_alone(_body(model), ids[document]).last_hidden_state[0] for document in documents(boundaries)]
    hidden = torch.cat(alone)
    return (hidden if rows is None else hidden[rows]).to(torch.float32)


def packed_inputs(model: PreTrainedModel, ids: Tensor, starts: Tensor, layer: int, parents: Tensor | None = None) -> Tensor:
    """What goes into decoder layer `layer` for documents that attend only inside themselves: (T, hidden) float32, no graph.

    ids, starts, parents as in `packed_hidden`; layer: 0 gives the embeddings, the number of layers what the final norm reads.
    Raises ShapeError where `entry_obstacle` is not None, or for boundaries that do not fit the ids.
    """
    _check(ids, starts)
    if (obstacle := entry_obstacle(model)) is not None:
        raise ShapeError(f"{type(model).__name__} runs as a whole only: {obstacle}. Run it with packed_hidden.")
    return blocks_inputs(model, ids, Tokens.of(starts, _usable(model, parents)), layer)


def packed_layers(model: PreTrainedModel, hidden: Tensor, starts: Tensor, first: int, last: int) -> Tensor:
    """Decoder layers first ... last - 1 over documents: what goes into the first -> what comes out, (T, hidden) float32.

    starts as in `packed_hidden`. No graph. Raises ShapeError where `entry_obstacle` is not None.
    """
    if (obstacle := entry_obstacle(model)) is not None:
        raise ShapeError(f"{type(model).__name__} runs as a whole only: {obstacle}. Run it with packed_hidden.")
    return blocks_range(model, hidden, Tokens.of(starts), first, last)


def entry_obstacle(model: PreTrainedModel) -> str | None:
    """Why a forward pass of this model cannot begin at a layer of its own, or None."""
    if _facts_of(model).transform is None:
        return "its head is not known"
    return _facts_of(model).obstacle or blocks_obstacle(model)


def packed_logits(model: PreTrainedModel, ids: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """The model's own logits of some rows of a pack: (S, vocabulary) float32. For models whose `head_of` is None.

    ids, starts as in `packed_hidden`; rows: (S,) int64, ascending positions in the pack.
    """
    boundaries = _check(ids, starts)
    keep = "logits_to_keep" in inspect.signature(model.forward).parameters
    if _facts_of(model).obstacle is None:
        try:
            output = _run_packed(model, model, ids, boundaries, {"logits_to_keep": rows} if keep else {})
            return (output.logits[0] if keep else output.logits[0, rows]).to(torch.float32)
        except NotPackable as error:
            _give_up_packing(model, str(error))
    kept = []
    for document in documents(boundaries):
        own = rows[(rows >= document.start) & (rows < document.stop)] - document.start
        if len(own):
            output = _run_alone(model, ids[document], {"logits_to_keep": own} if keep else {})
            kept.append((output.logits[0] if keep else output.logits[0, own]).to(torch.float32))
    return torch.cat(kept)


def head_of(model: PreTrainedModel) -> Head | None:
    """The output head with the transform that follows it, or None where the two do not give the model's logits.

    Known transforms are Gemma's softcap, Granite's division and Cohere's factor; whichever it is, its logits were
    compared with the model's own. With None, `packed_logits` asks the model itself.
    """
    transform = _facts_of(model).transform
    if transform is None:
        say_once(
            model, f"the head of {type(model).__name__} is not one that is known; all logits of a pack are computed at once."
        )
        return None
    return Head(model.get_output_embeddings(), *transform)


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether texts of a pack may share the tokens they begin with, each computed once: all layers are blocks of ours."""
    facts = _facts_of(model)
    return facts.obstacle is None and facts.transform is not None and blocks_share(model)


def carries_state(model: PreTrainedModel) -> bool:
    """Whether layers hand on something of their own beside keys and values: a recurrent state, a convolution's inputs."""
    return bool(getattr(model, "_is_stateful", False)) or any(DynamicCache(config=model.config).is_linear)


def _usable(model: PreTrainedModel, parents: Tensor | None) -> Tensor | None:
    """The parents, or None where they say nothing. Raises ShapeError if the model cannot use them."""
    if parents is None or not bool((parents >= 0).any()):
        return None
    if not shares_prefixes(model):
        raise ShapeError(f"{type(model).__name__} cannot share tokens between texts; pack them with share=False.")
    return parents


def _check(ids: Tensor, starts: Tensor) -> list[int]:
    boundaries = starts.tolist()
    rising = len(boundaries) > 1 and all(first <= end for first, end in pairwise(boundaries))
    if ids.ndim != 1 or len(ids) == 0 or not rising or boundaries[0] != 0 or boundaries[-1] != len(ids):
        raise ShapeError(
            f"boundaries must rise from 0 to the number of ids, (T,); got {boundaries} for ids {tuple(ids.shape)}. "
            "Pack the examples with pack_examples."
        )
    return boundaries


def _body(model: PreTrainedModel) -> nn.Module:
    """The model without its head: its last hidden state is what the head reads."""
    body = model.base_model
    if body is model:
        raise ModelError(f"a causal language model has a body and a head; {type(model).__name__} has no body of its own.")
    return body


def _run_packed(
    model: PreTrainedModel, part: nn.Module, ids: Tensor, starts: list[int], extra: dict[str, Tensor] | None = None
) -> Any:
    positions = torch.cat([torch.arange(b.stop - b.start, device=ids.device) for b in documents(starts)])
    with packed_layout(model, starts):
        return part(input_ids=ids[None], position_ids=positions[None], use_cache=False, **(extra or {}))


def _run_alone(part: nn.Module, ids: Tensor, extra: dict[str, Tensor] | None = None) -> Any:
    return part(input_ids=ids[None], use_cache=False, **(extra or {}))


def _give_up_packing(model: PreTrainedModel, obstacle: str) -> None:
    _facts[model].obstacle = obstacle
    _say_unpackable(model, obstacle)


def _say_unpackable(model: PreTrainedModel, obstacle: str) -> None:
    text = f"{model.config.model_type} cannot be packed ({obstacle}); its documents run one by one."
    say_once(model, text, logging.WARNING)


def _facts_of(model: PreTrainedModel) -> _Facts:
    if model not in _facts:
        with torch.no_grad(), evaluation_mode(model):
            _facts[model] = _measure(model)
    obstacle = _facts[model].obstacle
    if obstacle is not None:
        _say_unpackable(model, obstacle)
    return _facts[model]


def _measure(model: PreTrainedModel) -> _Facts:
    body = _body(model)
    ids = torch.arange(PROBE_STARTS[-1], device=model.device) % model.config.get_text_config().vocab_size
    alone = torch.cat([_run_alone(body, ids[document]).last_hidden_state[0] for document in documents(PROBE_STARTS)])
    obstacle = None
    if carries_state(model):
        obstacle = "its layers carry a state"
    elif "position_ids" not in inspect.signature(body.forward).parameters:
        obstacle = "it takes no positions"
    else:
        try:
            packed = _run_packed(model, body, ids, list(PROBE_STARTS)).last_hidden_state[0]
            obstacle = None if _close(packed, alone) else "one document changes the next"
        except NotPackable as error:
            obstacle = str(error)
    return _Facts(obstacle, _measure_transform(model, ids[: PROBE_STARTS[1]], alone[: PROBE_STARTS[1]]))


def _measure_transform(model: PreTrainedModel, ids: Tensor, hidden: Tensor) -> tuple[float | None, float] | None:
    """The (softcap, scale) with which the head gives the model's logits for one document, or None."""
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    if linear is None:
        return None
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    logits = _run_alone(model, ids).logits[0]
    for transform in ((softcap, scale), (None, 1.0)):
        if _close(Head(linear, *transform).logits(hidden), logits):
            return transform
    return None


def _close(got: Tensor, expected: Tensor) -> bool:
    """Equal to rounding. Where the weights hold NaN both sides do, which is for others to report."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    expected, got = expected.to(torch.float32), got.to(torch.float32)
    size = expected.nan_to_num().abs().max().item()
    return torch.allclose(got, expected, rtol=0, atol=tolerance * size, equal_nan=True)
