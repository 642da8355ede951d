"""A chat template rendered in a process that is killed when it takes too long or too much memory."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from luthier.errors import DataError, one_line

_WORKER = Path(__file__).with_name("template_worker.py")
# Where the worker finds jinja2, and markupsafe, which jinja2 needs.
_LIBRARIES = sorted({str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)})
_MEMORY_BYTES = 2**30
_SECONDS = 20.0
_PORTION_CHARACTERS = 2**20
_MESSAGE_CHARACTERS = 40  # of a message without its content

Messages = list[dict[str, str]]
Job = tuple[Messages, bool]


class TemplateSandbox:
    """One chat template, compiled in a worker process of its own.

    `seconds` bounds the answer to one call of `render`; the worker's address space is bounded by `memory_bytes` where
    the system can do that. A worker that breaks a bound is killed.
    """

    def __init__(
        self, template: str, variables: dict[str, str], *, seconds: float = _SECONDS, memory_bytes: int = _MEMORY_BYTES
    ):
        self._seconds = seconds
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-Wignore", str(_WORKER), str(memory_bytes), str(seconds + 5), *_LIBRARIES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            # Ctrl-C is for us; the worker is needed afterwards, and ends when its standard input does.
            start_new_session=True,
        )
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read_answers, args=(self._process.stdout, self._answers), daemon=True).start()
        self._finalizer = weakref.finalize(self, _end, self._process)
        error = self._ask({"template": template, "variables": variables})["error"]
        if error:
            self.close()
            raise DataError(
                f"the chat template must be valid Jinja; this one is not: {error}. Check the model's chat template."
            )

    def render(self, jobs: list[Job]) -> list[tuple[str | None, str | None]]:
        """(text, None) or (None, what the template said) for each of `jobs`: messages, and the generation prompt or not.

        Raises DataError if the template takes too long or too much memory.
        """
        return [(text, error) for text, error in self._ask({"jobs": jobs})["results"]]

    def render_all(self, jobs: Iterable[Job]) -> Iterator[tuple[str | None, str | None]]:
        """`render` in portions of bounded size, each with the time of one call; one portion is held at a time."""
        portion, size = list[Job](), 0
        for job in jobs:
            portion.append(job)
            size += sum(_MESSAGE_CHARACTERS + len(message["content"]) for message in job[0])
            if size >= _PORTION_CHARACTERS:
                yield from self.render(portion)
                portion, size = [], 0
        if portion:
            yield from self.render(portion)

    def close(self) -> None:
        """End the worker. Called by itself when the object goes or Python ends."""
        self._finalizer()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self._seconds)
        except queue.Empty:
            self.close()
            raise DataError(
                f"a chat template must render within {self._seconds:g} seconds; this one was stopped. "
                "Check the model's chat template."
            ) from None
        except (OSError, ValueError):
            line = ""
        if not line:
            raise DataError(self._why_it_ended())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why_it_ended(self) -> str:
        """Close the sandbox, and say what ended its worker."""
        self._process.kill()
        self._process.wait()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().strip().split("\n")
        self.close()
        said = one_line(lines[-1])
        if said:
            return (
                f"chat templates are rendered in a process of their own; it ended with: {said}. "
                "Check the model's chat template and the installation of jinja2."
            )
        return "the chat template ended the process that renders it, as too much memory does. Check the model's chat template."


def _read_answers(stream: Any, answers: queue.Queue[str]) -> None:
    """Put every line of `stream` into the queue, and '' at its end."""
    for line in stream:
        answers.put(line)
    answers.put("")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
    if process.stdin is not None:
        try:
            process.stdin.close()
        except OSError:  # what was still in the buffer has nowhere to go
            return
