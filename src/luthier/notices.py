"""What code deep inside has to say to a person: a line in the log, and a note to whoever listens, such as a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import WeakKeyDictionary

logger = logging.getLogger(__name__)

_listening: ContextVar[Callable[[str], None] | None] = ContextVar("listening", default=None)
_logged: WeakKeyDictionary[object, set[str]] = WeakKeyDictionary()


@contextmanager
def heard_by(hear: Callable[[str], None]) -> Iterator[None]:
    """Within the block, hear(text) is called for all that `say_once` is told, also for what is told again and again."""
    token = _listening.set(hear)
    try:
        yield
    finally:
        _listening.reset(token)


def say_once(subject: object, text: str, level: int = logging.INFO) -> None:
    """Tell who listens one sentence about `subject`, and write it to the log the first time it is true of that subject."""
    hear = _listening.get()
    if hear is not None:
        hear(text)
    said = _logged.setdefault(subject, set())
    if text not in said:
        said.add(text)
        logger.log(level, "%s", text)
