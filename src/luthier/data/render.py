"""Rows of any form become token ids with a mask: loss on what the assistant says and on its end of turn, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from luthier.data.chat_template import ChatTemplate, Rendered
from luthier.data.encoder import Encoded, Encoder
from luthier.data.example import Example, text_key
from luthier.data.forms import Row, RowError, Turn, parse_row
from luthier.data.problems import Problems
from luthier.errors import DataError

# Rows rendered and tokenized in one call; bounds the memory of a batch together with the cut of very long rows.
BATCH_ROWS = 256


@dataclass
class _Prepared:
    """A checked row: contents quoted, what identifies it, and whether it was cut."""

    where: str
    turns: list[Turn]
    text: str | None
    prompt: str
    key: str
    cut: bool


class Renderer:
    """Turns rows into examples for one tokenizer.

    max_length: the longest row in tokens that will be used; longer rows are rendered, and left to the caller.
    loss_on: "assistant" supervises the assistant's tokens and its end of turn, "all" every token but the first.

    Dialogue goes through the tokenizer's chat template. Without one, a prompt and its completion are joined as they are,
    and `messages` or `conversations` are refused. Plain text is supervised whole. Control tokens in the text of a row are
    tokenized as plain text, a begin-of-text token comes once, and an end-of-sequence token ends what has no template.
    Raises DataError if the tokenizer or its template cannot be used.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, loss_on: Literal["assistant", "all"] = "assistant"
    ):
        self.max_length = max_length
        self.loss_on = loss_on
        self.encoder = Encoder(tokenizer)
        # Longer contents are certainly longer than max_length tokens, whatever is in them.
        self._max_characters = (max_length + 8) * self.encoder.longest_token
        template = _template_of(tokenizer)
        variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self.template = ChatTemplate(template, variables, self.encoder) if template else None
        # Control tokens come from a set, in another order in each process; it makes no difference to any row.
        control = sorted(self.encoder.control_tokens)
        self._decisive = [template, variables, self.encoder.start_ids, self.encoder.end_id, control]

    def identity(self) -> str:
        """A sha256 of all that decides what becomes of a row: tokenizer, template, settings, and the versions of the code."""
        versions = [version(name) for name in ("luthier", "tokenizers", "transformers", "jinja2")]
        content = [versions, self.encoder.sha256, self._decisive, self.max_length, self.loss_on]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def render(self, row: dict[str, Any], where: str) -> Example:
        """One row of any form. Raises DataError naming `where` if it cannot be used."""
        problems = Problems()
        examples = self.render_many([(where, row)], problems)
        problems.raise_any(where)
        return examples[0]

    def render_many(self, rows: Sequence[tuple[str, Any]], problems: Problems, form: str | None = None) -> list[Example]:
        """The examples of the rows that can be used, in order; what is wrong with the others is added to `problems`.

        form: the form that every row must have; a row of another is a problem.
        """
        prepared: list[_Prepared] = []
        for where, value in rows:
            try:
                row = parse_row(value)
                if form is not None and row.form != form:
                    raise RowError(f"all rows of a file must have one form; this is {row.form}, the first row is {form}.")
                prepared.append(self._prepare(where, row, problems))
            except RowError as error:
                problems.add(where, str(error))
        return self._encode(prepared, problems)

    def _prepare(self, where: str, row: Row, problems: Problems) -> _Prepared:
        if self.template is None and row.form in ("messages", "conversations"):
            raise RowError(
                f"{row.form} need a chat template, and this model's tokenizer has none. "
                "Use an instruction-tuned model, or give prompt and completion, or text."
            )
        for note in row.notes:
            problems.note(note, where)
        kept = self._beginning(row)
        if kept != row:
            problems.note("rows far above the length limit: only their beginning was measured", where)
        if row.text is not None and kept.text is not None:
            return _Prepared(where, [], self._safe(kept.text, where, problems), "", text_key(row.text), kept != row)
        turns = [Turn(turn.role, self._safe(turn.content, where, problems)) for turn in kept.turns]
        key = text_key(*(f"{turn.role} {turn.content}" for turn in row.turns[:-1]))
        return _Prepared(where, turns, None, kept.turns[-2].content, key, kept != row)

    def _beginning(self, row: Row) -> Row:
        """The row, or where it is certainly longer than max_length tokens, as much of it as shows that.

        A conversation ends after the assistant turn with which its contents pass `_max_characters`, since rendering takes
        time with the square of its turns.
        """
        text = None if row.text is None else row.text[: self._max_characters]
        turns: list[Turn] = []
        total = 0
        for turn in row.turns:
            fits = len(turn.content) <= self._max_characters
            turns.append(turn if fits else Turn(turn.role, turn.content.lstrip()[: self._max_characters]))
            total += len(turn.content)
            if total > self._max_characters and turn.role == "assistant":
                break
        return replace(row, turns=turns, text=text)

    def _safe(self, text: str, where: str, problems: Problems) -> str:
        quoted = self.encoder.quote(text)
        if quoted != text:
            problems.note("control tokens of the tokenizer stand in the text: they are kept as plain text", where)
        return quoted

    def _encode(self, rows: list[_Prepared], problems: Problems) -> list[Example]:
        dialogues = [row for row in rows if row.text is None]
        if self.template is None:
            rendered: Iterator[Rendered | str] = (self._without_template(row, problems) for row in dialogues)
        else:
            if not self.template.takes_system and any(row.turns[0].role == "system" for row in dialogues):
                first = next(row for row in dialogues if row.turns[0].role == "system")
                problems.note("the chat template takes no system turn: it is put before the first user turn", first.where)
            rendered = iter(self.template.render([row.turns for row in dialogues]))
        kept: list[tuple[_Prepared, Rendered]] = []
        for row in rows:
            result: Rendered | str
            result = Rendered(row.text, [(0, len(row.text))], "") if row.text is not None else next(rendered)
            if isinstance(result, str):
                problems.add(row.where, result)
            else:
                kept.append((row, result))
        encoded = self.encoder.encode([result.text for _, result in kept], [result.spans for _, result in kept])
        examples = [self._example(row, result, tokens, problems) for (row, result), tokens in zip(kept, encoded, strict=True)]
        return [example for example in examples if example is not None]

    def _without_template(self, row: _Prepared, problems: Problems) -> Rendered:
        *before, answer = [turn.content for turn in row.turns]
        prompt = "\n\n".join(before)
        if prompt and not prompt[-1].isspace() and not answer[0].isspace():
            problems.note("no chat template: a line break is put between prompt and completion", row.where)
            prompt += "\n"
        return Rendered(prompt + answer, [(len(prompt), len(prompt) + len(answer))], self.encoder.plain(answer).strip())

    def _example(self, row: _Prepared, rendered: Rendered, encoded: Encoded, problems: Problems) -> Example | None:
        """Ids, mask and prompt of one row; None and a problem if plain text made a control token, or a cut row fits."""
        made = self.encoder.typed_control(encoded, rendered.text)
        if made is not None:
            problems.add(row.where, f"the text holds {made!r}, which this tokenizer cannot write as plain text. Remove it.")
            return None
        ids, ranges = encoded.ids, encoded.ranges
        if row.text is not None or self.template is None:
            ids, ranges = self._framed(ids, ranges)
        supervised = [self.loss_on == "all"] * len(ids)
        for first, last in ranges:
            supervised[first:last] = [True] * (last - first)
        if supervised:
            supervised[0] = False
        if row.cut and len(ids) <= self.max_length:
            limit = f"{self.max_length} tokens"
            problems.add(row.where, f"the row is too large to render, yet what is written of it fits {limit}. Shorten it.")
            return None
        if row.text is not None:
            return Example(ids, supervised, [], "", None, row.where, row.key)
        return Example(ids, supervised, ids[: ranges[-1][0]], row.prompt, rendered.completion, row.where, row.key)

    def _framed(self, ids: list[int], ranges: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids with the tokenizer's own start before them and its end-of-sequence token, supervised, behind them."""
        if self.encoder.end_id is None:
            raise DataError(
                "rows without a chat template end with an end-of-sequence token, and the tokenizer has none. Set its eos_token."
            )
        start = self.encoder.start_ids
        moved = [(first + len(start), last + len(start)) for first, last in ranges]
        moved[-1] = (moved[-1][0], moved[-1][1] + 1)
        return [*start, *ids, self.encoder.end_id], moved


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
