"""Text to token ids with a mask, control tokens only where a template wrote them.

A tokenizer turns `<|im_end|>` into its control token wherever it stands, in what a user typed too. Here the control
tokens of a copy of the tokenizer are renamed to strings that no row may hold, and only what the template wrote is
renamed with them. What people typed is tokenized as the plain text it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from luthier.errors import DataError

# Noncharacters, refused in rows (forms.py). QUOTED and CONTROL are followed by one character that says which token.
QUOTED, CONTROL, BOUNDARY = "\ufdd2", "\ufdd3", "\ufdd4"
_FIRST_INDEX = 0x100000

Span = tuple[int, int]


@dataclass
class Encoded:
    """ids, and for each span of the text the range of tokens [first, last) that touch it."""

    ids: list[int]
    ranges: list[Span]


class Encoder:
    """The tokenizer of a model, made safe for text of strangers. sha256: of what it makes of any text.

    Raises DataError if the tokenizer is not a fast one, which alone know where in the text a token stands.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(
                "training needs a fast tokenizer (tokenizer.json); this model has none. Save it with AutoTokenizer first."
            )
        state = json.loads(backend.to_str())
        self.sha256 = _sha256_of(state)
        special = set(tokenizer.all_special_tokens) | {token["content"] for token in state["added_tokens"] if token["special"]}
        self.control_tokens = sorted(special, key=len, reverse=True)
        self._index = {token: chr(_FIRST_INDEX + number) for number, token in enumerate(self.control_tokens)}
        pattern = "|".join(map(re.escape, self.control_tokens)) or "(?!)"
        self._control = re.compile(pattern)
        self._convert = re.compile(f"{QUOTED}(?P<quoted>.)|{pattern}", re.DOTALL)
        self._tokenizer, self._ids = _renamed(state, self._index)
        self._control_ids = {tokenizer.convert_tokens_to_ids(token): token for token in self.control_tokens}
        self._boundary_id = self._tokenizer.token_to_id(BOUNDARY)
        self.splits = self._splits_cleanly()
        self.start_ids = _start_ids(tokenizer)
        self.end_id: int | None = tokenizer.eos_token_id
        self.end_token: str = str(tokenizer.eos_token or "")
        self.longest_token = max(map(len, backend.get_vocab()))

    def quote(self, text: str) -> str:
        """`text` with the control tokens in it marked as typed by someone; `plain` gives the text back."""
        return self._control.sub(lambda match: QUOTED + self._index[match[0]], text)

    def plain(self, text: str) -> str:
        """The text behind `quote`."""
        return self._convert.sub(lambda match: self._unquoted(match["quoted"]) if match["quoted"] else match[0], text)

    def spoken(self, text: str) -> str:
        """The text behind `quote` without the control tokens that a template wrote, as a tokenizer decodes it."""
        return self._convert.sub(lambda match: self._unquoted(match["quoted"]) if match["quoted"] else "", text)

    def find_control(self, text: str) -> re.Match[str] | None:
        """The first control token in `text` that is not quoted."""
        return next((match for match in self._convert.finditer(text) if match["quoted"] is None), None)

    def encode(self, texts: list[str], spans: list[list[Span]]) -> list[Encoded]:
        """Token ids of quoted `texts`, no token added, and the token ranges of the spans of each.

        A token never joins what stands before a span with what stands in it, unless the tokenizer would write a space
        there: the prompt of a row and its answer then give the same tokens apart as together.
        """
        prepared = [self._prepare(text, row_spans) for text, row_spans in zip(texts, spans, strict=True)]
        encodings = self._tokenizer.encode_batch([text for text, _ in prepared], add_special_tokens=False)
        return [
            self._collect(encoding.ids, encoding.offsets, row) for encoding, (_, row) in zip(encodings, prepared, strict=True)
        ]

    def typed_control(self, encoded: Encoded, quoted_text: str) -> str | None:
        """A control token that the tokenizer makes of plain text too, where the text quotes one; else None."""
        if QUOTED not in quoted_text:
            return None
        names = {self._unquoted(match["quoted"]) for match in self._convert.finditer(quoted_text) if match["quoted"]}
        written = [match[0] for match in self._convert.finditer(quoted_text) if match["quoted"] is None]
        made = [self._control_ids[token] for token in encoded.ids if token in self._control_ids]
        return next((name for name in sorted(names) if made.count(name) > written.count(name)), None)

    def _unquoted(self, index: str) -> str:
        return self.control_tokens[ord(index) - _FIRST_INDEX]

    def _prepare(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """The text with control tokens renamed, quoted ones restored and boundaries put in, and the spans moved along."""
        pieces: list[str] = []
        moved: list[Span] = []
        length = position = 0
        for start, end in spans:
            before = self._converted(text[position:start]) + (BOUNDARY if self.splits and start else "")
            inside = self._converted(text[start:end])
            moved.append((length + len(before), length + len(before) + len(inside)))
            pieces += [before, inside]
            length, position = moved[-1][1], end
        pieces.append(self._converted(text[position:]))
        return "".join(pieces), moved

    def _converted(self, text: str) -> str:
        return self._convert.sub(
            lambda match: self._unquoted(match["quoted"]) if match["quoted"] else CONTROL + self._index[match[0]], text
        )

    def _collect(self, ids: list[int], offsets: list[Span], spans: list[Span]) -> Encoded:
        kept = [
            (self._ids.get(token, token), offset)
            for token, offset in zip(ids, offsets, strict=True)
            if token != self._boundary_id
        ]
        ranges, position = [], 0
        for start, end in spans:
            # An empty token, such as a space the tokenizer writes by itself, belongs to what it stands before.
            while position < len(kept) and kept[position][1][1] <= start and kept[position][1][0] < start:
                position += 1
            first = position
            while position < len(kept) and kept[position][1][0] < end:
                position += 1
            ranges.append((first, position))
        return Encoded([token for token, _ in kept], ranges)

    def _splits_cleanly(self) -> bool:
        """Whether text after a boundary gives the tokens it gives in running text; old Llama tokenizers write a space there."""
        joined = self._tokenizer.encode("\nx", add_special_tokens=False).ids
        apart = self._tokenizer.encode(f"\n{BOUNDARY}x", add_special_tokens=False).ids
        return [token for token in apart if token != self._boundary_id] == joined


def _sha256_of(state: dict) -> str:
    """Of everything in tokenizer.json that decides the tokens of a text; padding and truncation are set by callers."""
    lasting = state | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def _renamed(state: dict, index: dict[str, str]) -> tuple[Tokenizer, dict[int, int]]:
    """A tokenizer like that of `state` whose control tokens are CONTROL + index, and the map from its ids to the true ones."""
    names = {}
    for token in state["added_tokens"]:
        name = token["content"]
        if name in index:
            token |= {"content": CONTROL + index[name], "normalized": False, "special": True}
        names[token["content"]] = token["id"]
    boundary = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"].append({"id": 1 + max(names.values(), default=0), "content": BOUNDARY, **boundary})
    # What a post-processor adds, the caller adds; padding and truncation are not wanted.
    state |= {"post_processor": None, "truncation": None, "padding": None}
    renamed = Tokenizer.from_str(json.dumps(state))
    ids = {renamed.token_to_id(name): true for name, true in names.items()}
    return renamed, {token: true for token, true in ids.items() if token is not None}


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before plain text: a begin-of-text token, or nothing."""
    with_start = tokenizer("a").input_ids
    without = tokenizer("a", add_special_tokens=False).input_ids
    if with_start == without:
        return []
    for first in range(len(with_start) - len(without) + 1):
        if with_start[first : first + len(without)] == without:
            return list(with_start[:first])
    return []
