"""Helpers that every message is made with."""

from __future__ import annotations

from luthier.errors import one_line


def test_one_line() -> None:
    assert one_line(ValueError("a\n  b\tc.\n")) == "a b c"
    assert one_line("x" * 400) == "x" * 300
    assert one_line("ab. cd", 3) == "ab"
    assert one_line(ValueError()) == ""
