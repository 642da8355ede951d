"""A conversation with a model, its answers given piece by piece as they are made."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Renderer
from luthier.data.forms import without_refused
from luthier.errors import ConfigError, DataError
from luthier.evaluation.pieces import PieceDecoder
from luthier.evaluation.stops import end_tokens
from luthier.generation import Constraint, Sampling
from luthier.generation.generator import AnswerRow, position_limit
from luthier.generation.text import GrowingText

WITHOUT_LIMIT = 1 << 20


class Conversation:
    """Turns of a user and a model. Keys and values of what was said are kept, so each turn costs only what is new in it.

    sampling: how tokens are chosen, the likeliest where it is not given; each answer draws numbers of its own. constraint:
    what every answer may be.
    A tokenizer without a chat template can tell no turns apart: every message is then answered by itself, `remembers`
    is False, and no system message can be given.
    Raises ConfigError for max_new_tokens below 1 or below the constraint's longest answer, and for a model that keeps no keys
    and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
        max_new_tokens: int = 512,
    ):
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        self._least_room = (None if constraint is None else constraint.longest) or 1
        if max_new_tokens < self._least_room:
            raise ConfigError(
                f"an answer must have room for its longest label of {self._least_room} tokens; max_new_tokens is "
                f"{max_new_tokens}. Allow more."
            )
        self._text = GrowingText(model)
        self._tokenizer = tokenizer
        self._sampling, self._constraint, self._max_new_tokens = sampling or Sampling(), constraint, max_new_tokens
        self._answers = 0
        self._limit = position_limit(model)
        self._renderer = Renderer(tokenizer, max_length=self._limit or WITHOUT_LIMIT)
        self._stops = end_tokens(model, tokenizer, self._renderer)
        self.remembers = self._renderer.template is not None
        if system is not None and not self.remembers:
            raise ConfigError("a system message needs a chat template, and this model's tokenizer has none. Leave it out.")
        self._beginning = [{"role": "system", "content": system}] if system is not None else []
        self.reset()

    def reset(self) -> None:
        """Forget everything said, the system message excepted."""
        self.turns: list[dict[str, str]] = list(self._beginning)
        self._text.forget()

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text`, which joined are the whole answer.

        Leaving the iterator early, by `close` or an exception such as KeyboardInterrupt, keeps the question and what was
        answered so far. An answer without text leaves no turn behind.
        Raises DataError for text that cannot be a message, and for a conversation longer than the model's positions.
        """
        prompt = self._prompt(text)
        if self._limit is not None and len(prompt) + self._least_room > self._limit:
            raise DataError(
                f"a conversation must stay below the model's {self._limit} positions; "
                f"with this message it has {len(prompt)} tokens. Use /reset, or a shorter message."
            )
        answer: list[str] = []
        try:
            for piece in self._answer(prompt):
                answer.append(piece)
                yield piece
        except BaseException:
            # A forward pass may have been cut in the middle, some layers ahead of others.
            self._text.forget()
            raise
        finally:
            # What a model writes may hold characters that no turn may; with one, every later message would be refused.
            said = without_refused("".join(answer))
            if self.remembers and said.strip():
                self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]

    def _prompt(self, text: str) -> list[int]:
        """The ids of all turns, the new message and the generation prompt."""
        if not self.remembers:
            return self._renderer.render({"prompt": text, "completion": "-"}, "the message").prompt_ids
        turns = [*self.turns, {"role": "user", "content": text}, {"role": "assistant", "content": "-"}]
        return self._renderer.render({"messages": turns}, "the message").prompt_ids

    def _answer(self, prompt: list[int]) -> Iterator[str]:
        room = self._max_new_tokens if self._limit is None else min(self._max_new_tokens, self._limit - len(prompt))
        row = AnswerRow(self._answers, prompt, room, self._stops, self._sampling, self._constraint)
        self._answers += 1
        pieces = PieceDecoder(self._tokenizer)
        logits = self._text.read(prompt)
        given = 0
        while not row.has_ended:
            row.choose(logits)
            for token in row.answer[given:]:
                if piece := pieces.add(token):
                    yield piece
            given = len(row.answer)
            if not row.has_ended:
                logits = self._text.add(row.answer[-1])
        rest = pieces.finish()
        if rest:
            yield rest
