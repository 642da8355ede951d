"""Renders chat templates in a process of its own, started by `sandbox.py`; a template is a stranger's program.

Run as a script with its memory cap in bytes, the seconds after which it ends itself while at work, should the process
that started it be gone, and the folders where jinja2 and what it needs are. Reads one JSON object a line from standard
input and answers with one a line. The first is {"template", "variables"}; it is answered by {"error": text or null}. Each
following one is {"jobs": [[messages, generation prompt], ...]}, answered by {"results": [[text, error], ...]}.

It imports nothing of the package, so that it starts in a fraction of a second and holds no model.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

if __name__ == "__main__":
    # Isolated Python leaves out the folders of PYTHONPATH and of the user, and jinja2 may be in one.
    sys.path += sys.argv[3:]

import jinja2
import jinja2.ext
import jinja2.sandbox

MAX_OUTPUT_CHARACTERS = 128 * 2**20
# A template is a program, and these are what a faulty program can raise; SecurityError and TemplateError are TemplateErrors.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    SyntaxError,  # of the Python that Jinja makes, where loops are nested deeper than Python allows
)
# Llama 3's own date where the clock is not at hand: the same data gives the same tokens on any day.
_DATE = "26 Jul 2024"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which some templates use as a marker, renders what is inside."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own protocol)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.strptime(_DATE, "%d %b %Y").strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.Environment:
    """What templates expect: Transformers' whitespace rules, loop controls, tojson, raise_exception, strftime_now."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _render(template: jinja2.Template, variables: dict[str, Any], messages: list[dict[str, str]], prompt: bool) -> str:
    pieces, length = [], 0
    for piece in template.generate(messages=messages, add_generation_prompt=prompt, tools=None, documents=None, **variables):
        length += len(piece)
        if length > MAX_OUTPUT_CHARACTERS:
            raise ValueError(f"it wrote more than {MAX_OUTPUT_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _answer(request: dict[str, Any], template: jinja2.Template, variables: dict[str, Any]) -> dict[str, Any]:
    results: list[list[str | None]] = []
    for messages, prompt in request["jobs"]:
        try:
            results.append([_render(template, variables, messages, prompt), None])
        except _TEMPLATE_FAULTS as error:
            results.append([None, _described(error)])
    return {"results": results}


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return text if isinstance(error, jinja2.TemplateError) and text else f"{type(error).__name__}: {text}"


def _limit_memory(size_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # no such limit on Windows; the time limit of the parent still holds
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    caps = [size_bytes, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (min(caps), hard))
    except (ValueError, OSError):  # macOS does not take this limit
        return


def _end_after(seconds: float) -> None:
    """End the process after `seconds`, by a signal that no template can hold up; 0 takes that back."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    _limit_memory(int(sys.argv[1]))
    seconds = float(sys.argv[2])
    setup = json.loads(sys.stdin.readline())
    _end_after(seconds)
    try:
        template = make_environment().from_string(setup["template"])
    except _TEMPLATE_FAULTS as error:
        _write({"error": _described(error)})
        return
    _write({"error": None})
    _end_after(0)
    for line in sys.stdin:
        _end_after(seconds)
        _write(_answer(json.loads(line), template, setup["variables"]))
        _end_after(0)


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
