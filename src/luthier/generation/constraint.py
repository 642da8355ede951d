"""What an answer may be: any text, one of a list of labels, or whatever else walks along beside the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from luthier.errors import ConfigError, DataError


class Walk(Protocol):
    """The way of one answer through a constraint."""

    def restrict(self, logits: Tensor) -> Tensor:
        """The logits (vocabulary,) with -Inf for every token that may not come next."""

    def take(self, token: int) -> None:
        """A token that `restrict` left, or one that ends the answer, has come."""

    def rest(self) -> list[int] | None:
        """The tokens that must follow until the answer is complete; None while there is a choice."""


class Constraint(Protocol):
    @property
    def longest(self) -> int | None:
        """Tokens in the longest answer, the one that ends it not counted; None where there is no bound."""

    def begin(self, stops: frozenset[int]) -> Walk:
        """The walk of a new answer, which any token of `stops` ends where it may end."""


class LabelConstraint:
    """The answer is one of `labels`, each a list of tokens; a trie of them says which token may come next.

    Raises DataError for no labels, for an empty one and for one that stands there twice.
    """

    def __init__(self, labels: Sequence[Sequence[int]]):
        self._root: dict[int, dict] = {}
        self._tokens = frozenset(token for label in labels for token in label)
        self.longest = max(map(len, labels), default=0)
        if not labels:
            raise DataError("an answer constrained to labels needs at least one; there is none.")
        for number, label in enumerate(labels, 1):
            if not label:
                raise DataError(f"labels must have a token at least; label {number} is empty.")
            node = self._root
            for token in label:
                node = node.setdefault(token, {})
            if _END in node:
                raise DataError(f"labels must differ; label {number} has the tokens of one before it.")
            node[_END] = {}

    @classmethod
    def of_texts(cls, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> LabelConstraint:
        """Labels as the tokenizer writes them. Raises DataError as the class does, and for labels that it cannot write, such
        as one with a control token in it."""
        ids = [tokenizer(label, add_special_tokens=False).input_ids for label in labels]
        texts = [str(tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for own in ids]
        lost = [repr(label) for label, text in zip(labels, texts, strict=True) if text.strip() != label.strip()]
        if lost:
            raise DataError(f"labels must be texts that the model's tokenizer can write; it changes {', '.join(lost[:5])}.")
        return cls(ids)

    def begin(self, stops: frozenset[int]) -> Walk:
        """Raises DataError where a token of `stops` stands in a label, which could never be written whole."""
        if found := self._tokens & stops:
            raise DataError(f"labels must not hold a token that ends an answer; one holds token {min(found)}.")
        return _LabelWalk(self._root, stops)


_END = -1  # the key in a node where a label ends


class _LabelWalk:
    def __init__(self, root: dict[int, dict], stops: frozenset[int]):
        self._node, self._stops = root, stops

    def restrict(self, logits: Tensor) -> Tensor:
        allowed = [token for token in self._node if token != _END]
        if _END in self._node:
            allowed += self._stops
        return restricted(logits, torch.tensor(allowed, device=logits.device))

    def take(self, token: int) -> None:
        self._node = {_END: {}} if token in self._stops else self._node[token]

    def rest(self) -> list[int] | None:
        forced: list[int] = []
        node = self._node
        while len(node) == 1:
            (token,) = node
            if token == _END:
                return forced
            forced.append(token)
            node = node[token]
        return None if _can_go_on(node, self._stops) else forced


def _can_go_on(node: dict[int, dict], stops: frozenset[int]) -> bool:
    """Whether it is open how the label goes on. Without a token that ends an answer, the longest label is taken."""
    return bool(stops) or len(node) - (_END in node) > 0


def restricted(logits: Tensor, allowed: Tensor) -> Tensor:
    """The logits (V,), -Inf but for the ids `allowed` (N,). Raises ConfigError for none, and for ids that the model has not."""
    if not len(allowed):
        raise ConfigError("a constraint leaves no token that may come next. Use one that the tokenizer can write.")
    if int(allowed.max()) >= len(logits):
        raise ConfigError(
            f"a constraint needs tokens of the model's vocabulary of {len(logits)}; got {int(allowed.max())}. "
            "Use the tokenizer that came with the model."
        )
    return torch.full_like(logits, -torch.inf).index_copy(0, allowed, logits[allowed])
