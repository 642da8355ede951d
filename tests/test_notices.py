"""Sentences from deep inside: to the log once, to who listens each time."""

from __future__ import annotations

import logging

import pytest

from luthier.notices import heard_by, say_once


class Subject:
    pass


def test_logged_once_a_subject_and_heard_while_someone_listens(caplog: pytest.LogCaptureFixture) -> None:
    one, other = Subject(), Subject()
    heard: list[str] = []
    with caplog.at_level(logging.INFO, logger="luthier"):
        say_once(one, "slow")
        with heard_by(heard.append):
            say_once(one, "slow")
            say_once(other, "slow")
        say_once(one, "slow")
        say_once(one, "slower", logging.WARNING)
    assert heard == ["slow", "slow"]
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "slow"),
        ("INFO", "slow"),
        ("WARNING", "slower"),
    ]
