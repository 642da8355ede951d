"""Fills the templates of pages: one file that opens anywhere, loads nothing and runs no script but ours.

What a page shows may come from strangers: data, model names, answers. All of it passes through the template's escaping,
with control and direction characters written out, and the page's own policy allows no other script.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from luthier.units import visible

ASSETS = Path(__file__).with_name("assets")


@dataclass(frozen=True)
class Fact:
    label: str
    value: str
    changed: bool = False


@dataclass(frozen=True)
class Tile:
    """One headline figure, with the value it had before, where there was one."""

    label: str
    value: str
    before: str = ""
    note: str = ""
    big: bool = False


def render_page(template: Path, values: dict[str, Any], *, script: Path | None = None) -> str:
    """The page that `template`, a file that extends base.html, makes of `values`.

    values hold at least name, eyebrow and lead, the headings of the page, and the sentences below them: notices, which stand
    out, and notes.
    script: a file of ours that the page runs.
    """
    code = script.read_text(encoding="utf-8") if script else ""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, ASSETS]),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(
        **values,
        version=version("luthier"),
        style=Markup((ASSETS / "page.css").read_text(encoding="utf-8")),
        script=Markup(code),
        script_hash=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    )
    # A lone surrogate, which JSON can carry, has no place in UTF-8.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(value: Any) -> Any:
    """What goes into the page as text, with control and direction characters written out; our own markup as it is."""
    return visible(value, lines=True) if type(value) is str else value
