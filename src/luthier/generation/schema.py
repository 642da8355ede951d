"""Answers that are JSON of a given schema, by the masks of llguidance (the extra `constrain`)."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier.errors import ConfigError
from luthier.generation.constraint import Walk, restricted

WORD_BITS = 32
# Between the parts of a value: one space, or a new line and its indent. Without a bound a model may never come to the point.
WHITE_SPACE = r"(\n[ ]{0,24}|[ ])?"


def require_library() -> Any:
    """llguidance. Raises ConfigError with the command that installs it where it is missing."""
    try:
        return importlib.import_module("llguidance")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"answers of a JSON schema need a library that is not installed: llguidance ({error.name} is missing). "
            "Install it with: pip install 'luthier[constrain]'"
        ) from error


class SchemaConstraint:
    """The answer is a JSON value that the schema allows; what it cannot express is refused here, not ignored.

    schema: a JSON Schema as a dictionary. An answer that is cut off by its longest length is no whole value; `longest` is
    None, since texts and lists have no bound of tokens.
    Raises ConfigError without llguidance, for a tokenizer that is not one of the tokenizers library, and for a schema that
    llguidance cannot follow, with its reason.
    """

    longest: int | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any]):
        llguidance = require_library()
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError(f"a JSON schema needs a tokenizer of the tokenizers library; got {type(tokenizer).__name__}.")
        self._library: Any = llguidance
        self._tokenizer = importlib.import_module("llguidance.hf").from_tokenizer(tokenizer)
        try:
            self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": WHITE_SPACE}
            )
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be followed: {error}") from error
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(self._grammar, self._tokenizer)
        if failed:
            raise ConfigError(f"the JSON schema cannot be followed: {messages[0]}")

    def begin(self, stops: frozenset[int]) -> Walk:
        matcher = self._library.LLMatcher(self._tokenizer, self._grammar, log_level=0)
        return _SchemaWalk(matcher, self._tokenizer.vocab_size, frozenset(self._tokenizer.eos_tokens), stops)


class _SchemaWalk:
    def __init__(self, matcher: Any, vocabulary: int, ends: frozenset[int], stops: frozenset[int]):
        self._matcher, self._stops = matcher, stops
        # The library knows one end of its own; where it may come, all of ours may.
        self._closing = [token for token in ends | stops if token < vocabulary]
        self._mask = torch.zeros(-(-vocabulary // WORD_BITS), dtype=torch.int32)

    def restrict(self, logits: Tensor) -> Tensor:
        self._matcher.unsafe_compute_mask_ptr(self._mask.data_ptr(), self._mask.numel() * 4)
        self._check()
        bits = np.unpackbits(self._mask.numpy().view(np.uint8), bitorder="little")
        bits[self._closing] = 0
        allowed = np.flatnonzero(bits)
        if self._matcher.is_accepting():
            allowed = np.append(allowed, sorted(self._stops))
        return restricted(logits, torch.from_numpy(allowed).to(logits.device))

    def take(self, token: int) -> None:
        if token not in self._stops:
            self._matcher.consume_token(token)
            self._check()

    def rest(self) -> list[int] | None:
        """Complete where nothing but an end may follow, or where nothing could say that the answer ends."""
        return [] if self._matcher.is_stopped() or (not self._stops and self._matcher.is_accepting()) else None

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be followed: {self._matcher.get_error()}")
