"""Pages: escaped, self-contained, and with a policy that allows no script but the one given."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2
import pytest

from luthier.pages.page import Fact, Tile, render_page

TEMPLATE = """{% extends "base.html" %}
{% from "parts.html" import facts, sample, tiles %}
{% block content %}{{ tiles(headline) }}{{ facts(rows) }}{{ sample(one) }}{% endblock %}
"""
BAD = "<b>&\x1b[2J\u202e\ud800"


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "one.html").write_text(TEMPLATE)
    return tmp_path / "one.html"


def values(text: str) -> dict:
    answers = [{"kind": "after", "label": text, "text": text, "mark": "exact"}]
    return {
        "name": text, "eyebrow": text, "lead": text, "notices": [text], "notes": [text],
        "headline": [Tile(text, text, text, text)], "rows": [Fact(text, text, changed=True)],
        "one": {"title": text, "prompt": text, "answers": answers},
    }  # fmt: skip


def test_all_text_is_escaped_and_shown(template: Path) -> None:
    page = render_page(template, values(BAD))
    page.encode("utf-8")
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;\\x1b[2J\\u202e\\ud800") == 16
    assert "<script" not in page
    assert "script-src" not in page
    assert "var(--paper)" in page


def test_a_script_of_ours_is_allowed_by_its_hash(template: Path, tmp_path: Path) -> None:
    (tmp_path / "one.js").write_text("const a = 1 < 2;")
    page = render_page(template, values("x"), script=tmp_path / "one.js")
    digest = base64.b64encode(hashlib.sha256(b"const a = 1 < 2;").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "<script>const a = 1 < 2;</script>" in page


def test_a_value_that_is_missing_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError):
        render_page(template, {**values("x"), "headline": [{"value": 1}]})
