"""Token ids to text, piece by piece as they come."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"


class PieceDecoder:
    """Gives the text of each token as soon as it is certain. The pieces joined are the text of all ids decoded at once.

    A character may be spread over several tokens, which decode to U+FFFD until the last of them is there; such an end
    is held back. Special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        # The ids decoded again each time: those of the last whole piece, whose text a tokenizer may need to place
        # spaces right, then those not given out whole yet.
        self._context: list[int] = []
        self._open: list[int] = []
        self._given = 0

    def add(self, token: int) -> str:
        """The text that has become certain with `token`; may be empty."""
        self._open.append(token)
        text = self._text()
        certain = text.rstrip(INCOMPLETE)
        piece = certain[self._given :]
        if certain == text and text:
            self._context, self._open = self._open, []
            self._given = 0
        else:
            self._given = max(self._given, len(certain))
        return piece

    def finish(self) -> str:
        """What was held back: replacement characters for bytes that never became a character."""
        rest = self._text()[self._given :]
        self._context, self._open, self._given = [], [], 0
        return rest

    def _text(self) -> str:
        before = text_of(self._tokenizer, self._context)
        return text_of(self._tokenizer, self._context + self._open)[len(before) :]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The ids as text: special tokens left out, and no space touched."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
