"""Rows generated together through Transformers' own forward, padded on the left: for families without blocks of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from luthier.models.packed import carries_state


@dataclass(eq=False)
class PaddedRow:
    """A row by its place in the batch; -1 once it has left."""

    place: int


class TransformersSession:
    """One batch of rows that start together; rows that have ended leave it."""

    joins = False  # rows start together

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._rows: list[PaddedRow] = []

    def cache_bytes(self, tokens: int, shared: int = 0) -> int:
        """Keys and values of a row of so many tokens in all layers, float32. Rows share none: shared is 0."""
        assert shared == 0
        config = self._model.config.get_text_config()
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_size * 4 * tokens

    def committed_bytes(self, rows: Sequence[tuple[PaddedRow, int]]) -> int:
        """Of the rows that others would start beside; here there are none."""
        assert not rows
        return 0

    def start(self, prompts: Sequence[list[int]]) -> tuple[list[PaddedRow], Tensor]:
        """New rows that hold the prompts, in place of those before, and the logits (rows, vocabulary) behind them."""
        ids, self._mask = _padded_left(prompts, self._model.device)
        self._positions = (self._mask.cumsum(1) - 1).clamp_min(0)
        self._cache = DynamicCache(config=self._model.config)
        self._rows = [PaddedRow(place) for place in range(len(prompts))]
        return list(self._rows), self._forward(ids)

    def extend(self, rows: Sequence[PaddedRow], tokens: Sequence[int]) -> Tensor:
        """Logits (rows, vocabulary) behind one more token of each row that is still there, in their order."""
        if len(rows) < len(self._rows):
            keep = torch.tensor([row.place for row in rows], device=self._mask.device)
            self._mask, self._positions = self._mask[keep], self._positions[keep]
            self._cache.batch_select_indices(keep)
            self._rows = list(rows)
            for place, row in enumerate(rows):
                row.place = place
        self._positions = self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], 1)
        return self._forward(torch.tensor(tokens, device=self._mask.device)[:, None])

    def release(self, row: PaddedRow) -> None:
        """The row has ended: the next `extend` leaves it out."""

    def _forward(self, ids: Tensor) -> Tensor:
        visible = None if bool(self._mask.all()) else self._mask
        output = self._model(
            input_ids=ids, attention_mask=visible, position_ids=self._positions, past_key_values=self._cache, use_cache=True,
            **self._last_only,
        )  # fmt: skip
        return output.logits[:, -1].to(torch.float32)


def takes_padding(model: PreTrainedModel) -> bool:
    """Whether a batch may be padded on the left: positions come from outside, and only keys and values are carried on."""
    wanted = {"position_ids", "past_key_values", "attention_mask"}
    return wanted <= inspect.signature(model.forward).parameters.keys() and not carries_state(model)


def _padded_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, both (B, longest) int64; what stands left of a prompt has id 0 and mask 0."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return ids.to(device), mask.to(device)


class _Chosen(LogitsProcessor):
    """Leaves one token: the one that `choose` takes, or `end` where it takes none."""

    def __init__(self, choose: Callable[[Tensor], int | None], end: int):
        self._choose, self._end = choose, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._choose(scores[0].to(torch.float32))
        only = torch.full_like(scores, -torch.inf)
        only[0, self._end if token is None else token] = 0
        return only


def generate_alone(model: Any, prompt: Sequence[int], room: int, choose: Callable[[Tensor], int | None]) -> None:
    """One prompt through Transformers' own generation, for families with a memory of their own kind.

    choose(logits (vocabulary,)) gives each next token and keeps it, None to end; it is called at most `room` times.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    own_settings = model.generation_config
    vocabulary = model.config.get_text_config().vocab_size
    end = vocabulary - 1
    ended = False

    def next_token(logits: Tensor) -> int | None:
        nonlocal ended
        token = choose(logits)
        ended = token is None
        return token

    def is_ended(_ids: Tensor, _scores: Tensor, **_unused: object) -> Tensor:
        return torch.tensor([ended], device=model.device)

    # What a model's own settings would do to the logits, such as a repetition penalty, is for `choose` to decide.
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    try:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False, num_beams=1,
            logits_processor=LogitsProcessorList([_Chosen(next_token, end)]), stopping_criteria=[is_ended],
        )  # fmt: skip
    finally:
        model.generation_config = own_settings
