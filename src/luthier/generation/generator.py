"""Answers to many prompts at once, or one token by token: the loop around the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from luthier.errors import ConfigError, DataError, NumericError, bulleted
from luthier.generation.constraint import Constraint
from luthier.generation.native_session import NativeSession
from luthier.generation.sampling import Sampler, Sampling
from luthier.generation.stack import stack_obstacle
from luthier.generation.transformers_session import TransformersSession, generate_alone, takes_padding
from luthier.models.blocks import choice
from luthier.models.modes import evaluation_mode
from luthier.models.prefix_tree import sharing_order

MAX_ROWS = 32
PROMPT_TOKENS_AT_ONCE = 4096
CACHE_BYTES_AT_ONCE = 512 << 20

Done = Callable[[int, list[int]], None]


def position_limit(model: PreTrainedModel) -> int | None:
    """How many positions the model has, or None where its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def generation_obstacle(model: PreTrainedModel) -> str | None:
    """Why the model generates through Transformers' modules and not through the native decoder, or None."""
    with torch.no_grad(), evaluation_mode(model):
        return stack_obstacle(model)


def check_prompts(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Raise DataError naming every prompt that is empty or leaves no position for an answer."""
    problems = [f"prompt {number} is empty" for number, prompt in enumerate(prompts, 1) if not prompt]
    if limit is not None:
        long = [(number, len(prompt)) for number, prompt in enumerate(prompts, 1) if len(prompt) >= limit]
        problems += [f"prompt {number} has {length} tokens" for number, length in long]
    if problems:
        room = "at least one token" if limit is None else f"1 to {limit - 1} tokens, the model having {limit} positions"
        raise DataError(f"a prompt to answer needs {room}; got:\n{bulleted(problems)}\nShorten these rows or leave them out.")


class AnswerRow:
    """One answer in the making: what it may still become, and the tokens chosen so far, end tokens left out.

    Raises ConfigError where `room` is too small for the constraint's longest answer.
    """

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        room: int,
        stops: frozenset[int],
        sampling: Sampling,
        constraint: Constraint | None,
    ):
        self.number, self.prompt = number, list(prompt)
        self.answer: list[int] = []
        self.has_ended = False
        if constraint is not None and constraint.longest is not None and room < constraint.longest:
            raise ConfigError(
                f"an answer must have room for its longest label of {constraint.longest} tokens; prompt {number + 1} leaves "
                f"{room}. Allow more new tokens, or shorten the prompt."
            )
        self.room, self._stops = room, stops
        self._sampler = None if sampling.is_plain else Sampler(sampling, number, prompt)
        self._walk = None if constraint is None else constraint.begin(stops)

    @property
    def longest(self) -> int:
        """The most tokens that prompt and answer can have together."""
        return len(self.prompt) + self.room

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self._sampler is None and self._walk is None

    def choose(self, logits: Tensor) -> int | None:
        """The next token out of logits (vocabulary,) float32, kept in the answer; None where the answer ends without one.

        Raises NumericError for logits of which the largest is not finite.
        """
        check_finite(float(logits.max()))
        if self._sampler is not None:
            logits = self._sampler.penalized(logits)
        if self._walk is not None:
            logits = self._walk.restrict(logits)
        return self.take(int(logits.argmax()) if self._sampler is None else self._sampler.choose(logits))

    def take(self, token: int) -> int | None:
        """Keep a token that was chosen. What must follow it by the constraint is kept too, as far as there is room."""
        if token in self._stops:
            self.has_ended = True
            return None
        self.answer.append(token)
        if self._walk is not None:
            self._walk.take(token)
            forced = self._walk.rest()
            if forced is not None:
                self.answer += forced[: self.room - len(self.answer)]
                self.has_ended = True
        self.has_ended = self.has_ended or len(self.answer) >= self.room
        return token


class Generator:
    """Answers of one model to prompts of token ids.

    Models whose family has blocks run through the native decoder: rows of any length side by side without padding, keys
    and values in pages that rows share where they begin alike, rows that have ended leave and others take their place.
    Other models run through Transformers' own modules, padded, or one prompt after the other where a row carries a state
    of another kind; which is said once in the log. Other rows change an answer only by rounding.
    stops: tokens that end an answer. max_rows: rows side by side. Raises ConfigError for max_rows below 1.
    """

    def __init__(self, model: PreTrainedModel, *, stops: frozenset[int] = frozenset(), max_rows: int = MAX_ROWS):
        if max_rows < 1:
            raise ConfigError(f"max_rows must be at least 1; got {max_rows}.")
        self._model, self._stops, self._max_rows = model, stops, max_rows

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
        done: Done | None = None,
    ) -> list[list[int]]:
        """The ids of each prompt's answer, without the token that ended it.

        An answer ends before a stop, after `max_new_tokens`, where the model's positions end, and where its constraint is
        fulfilled. done(prompt's number from 0, answer) as each one ends. The model's modes are left as they were found.
        Raises DataError naming every prompt that is empty or leaves no position for an answer; ConfigError for
        max_new_tokens below 1, or too few for the constraint's longest answer; NumericError where logits are not finite.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        limit = position_limit(self._model)
        check_prompts(prompts, limit)
        rows = [
            AnswerRow(
                number, prompt, max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)), self._stops,
                sampling or Sampling(), constraint,
            )
            for number, prompt in enumerate(prompts)
        ]  # fmt: skip
        with evaluation_mode(self._model):
            self._run(rows, done or (lambda _number, _answer: None))
        return [row.answer for row in rows]

    def _run(self, rows: list[AnswerRow], done: Done) -> None:
        if not rows:
            return
        obstacle = stack_obstacle(self._model)
        if obstacle is None:
            return _run_session(NativeSession(self._model), rows, self._max_rows, done)
        choice.say_once(self._model, f"text is generated by Transformers' modules: {obstacle}.")
        if takes_padding(self._model):
            return _run_session(TransformersSession(self._model), rows, self._max_rows, done)
        for row in rows:
            generate_alone(self._model, row.prompt, row.room, row.choose)
            done(row.number, row.answer)
        return None


def _run_session(session: Any, rows: list[AnswerRow], max_rows: int, done: Done) -> None:
    """All rows through a session: waiting ones start where there is room, running ones get a token a turn."""
    order, shared = sharing_order([row.prompt for row in rows])
    waiting = [(rows[place], common) for place, common in zip(order, shared, strict=True)]
    if not session.joins:
        waiting.sort(key=lambda item: -len(item[0].prompt))
    running: list[tuple[AnswerRow, Any]] = []
    while waiting or running:
        may_start = waiting and (not running or (session.joins and len(running) <= max_rows // 2))
        group = _group(session, waiting, running, max_rows) if may_start else []
        if group:
            del waiting[: len(group)]
            states, logits = session.start([row.prompt for row in group])
            _choose(group, logits)
            running += zip(group, states, strict=True)
        else:
            states, last = [state for _, state in running], [row.answer[-1] for row, _ in running]
            _choose([row for row, _ in running], session.extend(states, last))
        ended = [(row, state) for row, state in running if row.has_ended]
        running = [(row, state) for row, state in running if not row.has_ended]
        for row, state in ended:
            session.release(state)
            done(row.number, row.answer)


def _group(session: Any, waiting: list[tuple[AnswerRow, int]], running: list, max_rows: int) -> list[AnswerRow]:
    """The next rows to start: as many as fit beside the running ones, in rows, tokens and cached bytes; one where none runs.

    waiting: each with the tokens of its beginning that it shares with the one before it; rows that start together store
    and compute them once.
    """
    used = session.committed_bytes([(state, row.longest) for row, state in running])
    longest = tokens = 0
    group: list[AnswerRow] = []
    for row, common in waiting[: max_rows - len(running)]:
        shared = common if group and session.joins else 0
        used += session.cache_bytes(row.longest, shared)
        longest = max(longest, len(row.prompt))
        tokens = tokens + len(row.prompt) - shared if session.joins else longest * (len(group) + 1)
        if (group or running) and (tokens > PROMPT_TOKENS_AT_ONCE or used > CACHE_BYTES_AT_ONCE):
            break
        group.append(row)
    return group


def _choose(rows: list[AnswerRow], logits: Tensor) -> None:
    """Give each row its next token out of logits (rows, vocabulary)."""
    largest, likeliest = logits.max(1)
    for row, value, token, own in zip(rows, largest.tolist(), likeliest.tolist(), logits, strict=True):
        if row.is_plain:
            check_finite(value)
            row.take(token)
        else:
            row.choose(own)


def check_finite(largest: float) -> None:
    """Raise NumericError where the largest logit of a token is NaN or infinite."""
    if not math.isfinite(largest):
        raise NumericError(f"logits must be finite; the largest is {largest}. The model's weights are damaged.")
