"""A conversation with a model, its answers given piece by piece as they are made."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from luthier.data import Renderer
from luthier.data.forms import without_refused
from luthier.errors import ConfigError, DataError
from luthier.evaluation.pieces import PieceDecoder
from luthier.evaluation.stops import end_tokens, position_limit
from luthier.models.modes import evaluation_mode

WITHOUT_LIMIT = 1 << 20
PROMPT_TOKENS_AT_ONCE = 2048


class Conversation:
    """Turns of a user and a model. Keys and values of what was said are kept, so each turn costs only what is new in it.

    temperature 0 takes the likeliest token each time; otherwise tokens are drawn from softmax(logits / temperature), of
    which only the likeliest are kept that together have a probability of `top_p`. `seed` fixes what is drawn.
    A tokenizer without a chat template can tell no turns apart: every message is then answered by itself, `remembers`
    is False, and no system message can be given.
    Raises ConfigError for a value out of its range, and for a model that keeps no keys and values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
    ):
        _check_values(temperature, top_p, max_new_tokens)
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise ConfigError(f"a conversation needs a model with a key-value cache; {model.config.model_type} has none.")
        self._model, self._tokenizer = model, tokenizer
        self._temperature, self._top_p, self._max_new_tokens = temperature, top_p, max_new_tokens
        self._limit = position_limit(model)
        self._renderer = Renderer(tokenizer, max_length=self._limit or WITHOUT_LIMIT)
        self._stops = end_tokens(model, tokenizer, self._renderer)
        self.remembers = self._renderer.template is not None
        if system is not None and not self.remembers:
            raise ConfigError("a system message needs a chat template, and this model's tokenizer has none. Leave it out.")
        self._beginning = [{"role": "system", "content": system}] if system is not None else []
        self._generator = torch.Generator(device=model.device).manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Forget everything said, the system message excepted."""
        self.turns: list[dict[str, str]] = list(self._beginning)
        self._forget_cache()

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text`, which joined are the whole answer.

        Leaving the iterator early, by `close` or an exception such as KeyboardInterrupt, keeps the question and what was
        answered so far. An answer without text leaves no turn behind.
        Raises DataError for text that cannot be a message, and for a conversation longer than the model's positions.
        """
        prompt = self._prompt(text)
        if self._limit is not None and len(prompt) >= self._limit:
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
            self._forget_cache()
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
        pieces = PieceDecoder(self._tokenizer)
        with torch.no_grad(), evaluation_mode(self._model):
            logits = self._read(prompt)
        for count in range(1, room + 1):
            token = self._choose(logits)
            if token in self._stops:
                break
            piece = pieces.add(token)
            if piece:
                yield piece
            if count < room:
                with torch.no_grad(), evaluation_mode(self._model):
                    logits = self._forward([token])
        rest = pieces.finish()
        if rest:
            yield rest

    def _read(self, prompt: list[int]) -> Tensor:
        """Logits behind the prompt. What is cached is used if the prompt begins with it, and dropped otherwise."""
        if len(self._cached) >= len(prompt) or prompt[: len(self._cached)] != self._cached:
            self._forget_cache()
        new = prompt[len(self._cached) :]
        for first in range(0, len(new), PROMPT_TOKENS_AT_ONCE):
            logits = self._forward(new[first : first + PROMPT_TOKENS_AT_ONCE])
        return logits

    def _forward(self, ids: list[int]) -> Tensor:
        """Logits (vocabulary,) float32 behind the last of `ids`, which are added to the cache."""
        last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        output = self._model(
            input_ids=torch.tensor([ids], device=self._model.device), past_key_values=self._cache, use_cache=True, **last_only
        )
        self._cached += ids
        return output.logits[0, -1].to(torch.float32)

    def _choose(self, logits: Tensor) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / self._temperature, 0)
        if self._top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            # A token is kept if those likelier than it do not reach top_p yet; the likeliest always is.
            probabilities[order[ordered.cumsum(0) - ordered >= self._top_p]] = 0
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _forget_cache(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._cached: list[int] = []


def _check_values(temperature: float, top_p: float, max_new_tokens: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or a finite number above it; got {temperature}. Try 0.7.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1; got {top_p}. Try 0.9.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
