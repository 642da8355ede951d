"""A model's chat template, and where in the text it writes the assistant's turns stand.

Templates mark nothing, so the places are found from outside. Each assistant turn is given two marks, one before and one
after its content, and the conversation is rendered whole. A turn begins where the same conversation, rendered up to that
turn with the generation prompt, ends; it ends after the end-of-turn text that the template writes behind it. The whole
is rendered without marks too: if that differs, the marks changed what the template did, and content is searched instead.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from luthier.data.encoder import Encoder, Span
from luthier.data.forms import Turn
from luthier.data.sandbox import Job, Messages, TemplateSandbox
from luthier.errors import DataError

# Noncharacters, refused in rows (forms.py).
BEFORE, AFTER = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"[{BEFORE}{AFTER}]")
_NO_START = "the chat template rewrites earlier turns, and where an assistant turn begins cannot be told."


@dataclass
class Rendered:
    """A conversation as text with quoted control tokens (encoder.py). spans: every assistant turn with its end of turn.

    completion: what the model should write after the last prompt, as text: control tokens and its end of turn left out.
    """

    text: str
    spans: list[Span]
    completion: str


class ChatTemplate:
    """The chat template of one tokenizer. Raises DataError if it cannot render a plain exchange, saying why."""

    def __init__(self, template: str, variables: dict[str, str], encoder: Encoder):
        self._encoder = encoder
        self._sandbox = TemplateSandbox(template, variables)
        exchange = [Turn("user", "first question"), Turn("assistant", "first answer")]
        more = [*exchange, Turn("user", "second question"), Turn("assistant", "second answer")]
        alone, last = self._probe(exchange, prompt=False), self._probe(more, prompt=False)
        asked = [self._probe(exchange[:1], prompt=prompt) for prompt in (False, True)]
        self._generation_prompt = asked[1].removeprefix(asked[0]) if asked[1].startswith(asked[0]) else ""
        self._end, self.writes_end = self._find_end(alone, last)
        self._end_between = self._find_end_between(last)
        self.takes_system = self._takes_system(exchange)

    def render(self, conversations: list[list[Turn]]) -> list[Rendered | str]:
        """Each conversation rendered, or a sentence that says why it cannot be.

        Contents must be quoted. A system turn is joined to the first user turn where the template takes none.
        """
        turns = [conversation if self.takes_system else fold_system(conversation) for conversation in conversations]
        marked = self._render_all(turns, marks=True)
        plain = self._sandbox.render_all((_messages(row, marks=False), False) for row in turns)
        results: list[Rendered | str] = []
        for row, rendering, (unmarked, _) in zip(turns, marked, plain, strict=True):
            if rendering.text is not None and _MARKS.sub("", rendering.text) != unmarked:
                (rendering,) = self._render_all([row], marks=False)
            results.append(self._locate(row, rendering))
        return results

    def _render_all(self, conversations: list[list[Turn]], *, marks: bool) -> Iterator[_Rendering]:
        """Every conversation, and how far it is to each assistant turn.

        Each beginning is rendered with the generation prompt and dropped again: together they are as long as the
        conversation times its turns.
        """
        answers = self._sandbox.render_all(job for row in conversations for job in _jobs(row, marks))
        for row in conversations:
            text, error = next(answers)
            beginnings = (next(answers)[0] for turn in row if turn.role == "assistant")
            known = [_length_of_start(text, beginning) for beginning in beginnings]
            yield _Rendering(text, error, known, marks)

    def _locate(self, row: list[Turn], rendering: _Rendering) -> Rendered | str:
        """Find the assistant turns in the rendered text."""
        text = rendering.text
        if text is None:
            return f"the chat template refused the conversation; it said: {rendering.error}."
        answers = [turn.content.strip() for turn in row if turn.role == "assistant"]
        spans: list[Span] = []
        for number, (answer, known) in enumerate(zip(answers, rendering.known, strict=True), start=1):
            end_of_turn = self._end if number == len(answers) else self._end_between
            position = spans[-1][1] if spans else 0
            found = self._find_turn(text, answer, position, known, end_of_turn, has_marks=bool(rendering.marks))
            if isinstance(found, str):
                return found
            span, content = found
            spans.append(span)
        start = spans[-1][0]
        if content[0] >= start and not text[start : content[0]].strip(f"{BEFORE} \n\t\r"):
            start = content[0]
        completion = self._encoder.spoken(_MARKS.sub("", text[start : content[1]]))
        if not self.writes_end:
            text = text[: spans[-1][1]] + self._encoder.end_token
            spans[-1] = (spans[-1][0], len(text))
        return Rendered(*_without_marks(text, spans), completion)

    def _find_turn(
        self, text: str, answer: str, position: int, known: int | None, end_of_turn: str, *, has_marks: bool
    ) -> tuple[Span, Span] | str:
        """(an assistant turn with its end, its content in it) behind `position`; a text that says why it cannot be found."""
        if known is None and not has_marks:
            return _NO_START
        content = _find_content(text, answer, max(position, known or 0), None if has_marks else end_of_turn)
        if content is None:
            return "the chat template leaves out or changes an assistant turn, so it cannot be learnt as it stands in the row."
        start = self._turn_start(text, position, known, content)
        if start is None:
            return _NO_START
        ending = re.compile(rf"[\s{AFTER}]*{re.escape(end_of_turn)}").match(text, content[1])
        return (start, ending.end() if ending and end_of_turn else content[1]), content

    def _turn_start(self, text: str, position: int, known: int | None, content: Span) -> int | None:
        """Where an assistant turn begins. known: the length of the beginning rendered apart, if the text begins with it."""
        if known is not None and position <= known <= content[1]:
            gap = text[known : content[0]].strip() if content[0] >= known else ""
            # Without a generation prompt, what stands before the content is a heading, which the model does not write.
            return content[0] if gap and not self._generation_prompt else known
        if content[0] >= position:
            return content[0]
        if self._generation_prompt:
            found = text.rfind(self._generation_prompt, position, content[1])
            return found + len(self._generation_prompt) if found >= 0 else None
        return None

    def _probe(self, turns: list[Turn], *, prompt: bool) -> str:
        text, error = self._sandbox.render([(_messages(turns, marks=True), prompt)])[0]
        if text is None:
            raise DataError(
                f"the chat template must render a user and an assistant turn; it said: {error}. "
                "Check the model's chat template."
            )
        missing = next((turn.content for turn in turns if turn.content not in text), None)
        if missing:
            raise DataError(
                f"the chat template must write every turn; it leaves out {missing!r}. Check the model's chat template."
            )
        return text

    def _find_end(self, alone: str, followed: str) -> tuple[str, bool]:
        """What the template writes at the end of an assistant turn, whatever follows, and if that has a control token.

        Without one a row would not teach to stop, and the tokenizer's end-of-sequence token is put behind it.
        """
        tails = [text.split(AFTER, 1)[1] for text in (alone, followed)]
        common = _common_start(*tails)
        control = self._encoder.find_control(common)
        if control:
            return common[: control.end()].strip(), True
        if not self._encoder.end_token:
            raise DataError(
                "the chat template ends no assistant turn, and the tokenizer has no end-of-sequence token. Set its eos_token."
            )
        return common.strip(), False

    def _find_end_between(self, followed: str) -> str:
        """What the template writes at the end of an assistant turn that another follows.

        It is that of the last turn, or where that has no control token, an end-of-sequence token right behind the content.
        """
        tail = followed.split(AFTER, 1)[1]
        token = self._encoder.end_token
        if self.writes_end or not tail.lstrip().startswith(token):
            return self._end
        return tail[: tail.index(token) + len(token)].strip()

    def _takes_system(self, exchange: list[Turn]) -> bool:
        text, _ = self._sandbox.render([(_messages([Turn("system", "the instructions"), *exchange], marks=False), False)])[0]
        return text is not None and "the instructions" in text


@dataclass
class _Rendering:
    """text or error of a whole conversation, and whether it has marks.

    known: for each assistant turn the length of the conversation rendered up to it, None unless the text begins so.
    """

    text: str | None
    error: str | None
    known: list[int | None]
    marks: bool


def fold_system(turns: list[Turn]) -> list[Turn]:
    """The turns with a leading system turn put before the first user turn, a blank line between.

    For templates that take no system turn: training renders rows so, and whoever asks the model should too.
    """
    if not turns or turns[0].role != "system":
        return turns
    system, first, *rest = turns
    return [Turn(first.role, f"{system.content}\n\n{first.content}".lstrip("\n")), *rest]


def _jobs(row: list[Turn], marks: bool) -> Iterator[Job]:
    """The whole conversation, then its beginnings up to each assistant turn with the generation prompt."""
    messages = _messages(row, marks)
    yield messages, False
    yield from ((messages[:place], True) for place, turn in enumerate(row) if turn.role == "assistant")


def _length_of_start(text: str | None, beginning: str | None) -> int | None:
    return len(beginning) if text is not None and beginning is not None and text.startswith(beginning) else None


def _common_start(one: str, other: str) -> str:
    length = next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
    return one[:length]


def _messages(turns: list[Turn], marks: bool) -> Messages:
    return [
        {"role": turn.role, "content": _marked(turn.content) if marks and turn.role == "assistant" else turn.content}
        for turn in turns
    ]


def _marked(content: str) -> str:
    """Marks inside the white space around the content, which many templates trim."""
    bare = content.strip()
    before, after = content.split(bare, 1)
    return f"{before}{BEFORE}{bare}{AFTER}{after}"


def _find_content(text: str, answer: str, position: int, end_of_turn: str | None) -> Span | None:
    """Start and end of an assistant's content in the text from `position` on; start is -1 where only its end was kept.

    end_of_turn: None for a text with marks; else what must follow the content, so that no heading is taken for it.
    """
    if end_of_turn is not None:
        found = re.compile(rf"({re.escape(answer)})\s*{re.escape(end_of_turn)}").search(text, position)
        return found.span(1) if found else None
    after = text.find(AFTER, position)
    if after < 0:
        return None
    before = text.find(BEFORE, position, after)
    return (before, after)


def _without_marks(text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    places = [match.start() for match in _MARKS.finditer(text)]

    def moved(place: int) -> int:
        return place - bisect_left(places, place)

    return _MARKS.sub("", text), [(moved(start), moved(end)) for start, end in spans]
