"""Ollama's Modelfile for a GGUF file: where the weights are, how a conversation is written, where an answer ends.

Ollama's templates are Go's, so the chat template cannot be handed over. What it writes around each turn is found by
rendering short conversations, and a Go template is made of that; where that does not give the same text, there is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from luthier.data.sandbox import TemplateSandbox

SYSTEM, FIRST, ANSWER, SECOND = "the-system-text", "the-first-question", "the-answer", "the-second-question"


@dataclass(frozen=True)
class TurnTexts:
    """What a chat template writes: before and after a system text (None where it takes none), at the beginning without
    one, before a user's text, after that when an answer is asked for, what more before an answer, and after it."""

    system: tuple[str, str] | None
    without_system: str
    before_user: str
    asking: str
    before_answer: str
    after_answer: str


def modelfile(
    weights: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], *, adapter: str | None = None
) -> tuple[str, str | None]:
    """The text of a Modelfile, and a note where Ollama has to find out the template by itself.

    weights, adapter: GGUF files beside it; stops: the texts of the tokens that end an answer.
    """
    lines = [f"FROM ./{weights}"]
    if adapter is not None:
        lines = ["# The base that the adapter was trained on stands beside this file.", *lines, f"ADAPTER ./{adapter}"]
    template = go_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in stops]
    lines.append("PARAMETER temperature 0")
    note = None
    if template is None and tokenizer.chat_template:
        note = "The chat template cannot be said in Ollama's language; Ollama will look for one that fits the file's."
    return "\n".join(lines) + "\n", note


def go_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template in Go's language, None where there is none or it writes more than texts around turns."""
    texts = turn_texts(tokenizer)
    if texts is None:
        return None
    begins = tokenizer.bos_token or ""
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    strip = begins if adds_bos else ""
    opening = texts.without_system.removeprefix(strip)
    if texts.system is not None:
        before, after = texts.system
        opening = (
            f"{{{{ if .System }}}}{before.removeprefix(strip)}{{{{ .System }}}}{after}{{{{ else }}}}{opening}{{{{ end }}}}"
        )
    user = f'{{{{ if eq .Role "user" }}}}{texts.before_user}{{{{ .Content }}}}{texts.asking}'
    answer = f'{{{{ else if eq .Role "assistant" }}}}{texts.before_answer}{{{{ .Content }}}}{texts.after_answer}{{{{ end }}}}'
    return f"{opening}{{{{ range .Messages }}}}{user}{answer}{{{{ end }}}}"


def turn_texts(tokenizer: PreTrainedTokenizerBase) -> TurnTexts | None:
    """What the chat template writes around turns, if that is the same for each of them; else None."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return None
    variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    sandbox = TemplateSandbox(template, variables)
    user, answer, second = _turn("user", FIRST), _turn("assistant", ANSWER), _turn("user", SECOND)
    jobs = [([user, answer], False), ([user, answer, second], True), ([_turn("system", SYSTEM), user], True)]
    try:
        (ended, _), (dialogue, _), (instructed, _) = sandbox.render(jobs)
    finally:
        sandbox.close()
    if ended is None or dialogue is None:
        return None
    parts, tail = _split(dialogue, FIRST, ANSWER, SECOND), _split(ended, FIRST, ANSWER)
    if parts is None or tail is None:
        return None
    start, answering, between, asked = parts
    cut = _end_of_answer(start, between, tail[2], list(tokenizer.get_added_vocab()))
    if cut is None or not answering.startswith(asked):
        return None
    before_user = between[cut:]
    texts = TurnTexts(
        _around_system(instructed, before_user, asked), start[: len(start) - len(before_user)], before_user, asked,
        answering.removeprefix(asked), between[:cut],
    )  # fmt: skip
    pieces = (*(texts.system or ()), texts.without_system, before_user, answering, texts.after_answer)
    return None if any("{{" in piece or '"""' in piece or "\\" in piece for piece in pieces) else texts


def _end_of_answer(start: str, between: str, tail: str, tokens: Sequence[str]) -> int | None:
    """How much of what stands between an answer and the next question belongs to the answer: as much as stands behind the
    last answer too, no token cut, so that the rest stands before the first question as well."""
    longest = next((n for n in range(min(len(between), len(tail))) if between[n] != tail[n]), min(len(between), len(tail)))
    inside = {
        found.start() + n for token in tokens for found in re.finditer(re.escape(token), between) for n in range(1, len(token))
    }
    return next((n for n in range(longest, -1, -1) if n not in inside and start.endswith(between[n:])), None)


def _around_system(text: str | None, before_user: str, asking: str) -> tuple[str, str] | None:
    parts = _split(text, SYSTEM, FIRST) if text is not None else None
    if parts is None or not parts[1].endswith(before_user) or parts[2] != asking:
        return None
    return parts[0], parts[1].removesuffix(before_user)


def _split(text: str, *marks: str) -> list[str] | None:
    """`text` cut at the marks, each of which must stand in it once and in this order; None if they do not."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
