"""Flags against the schema they feed."""

from __future__ import annotations

import inspect
import re
import typing

import pytest

from luthier.cli import train
from luthier.cli.flags import build_config, parse_targets
from luthier.config import RunConfig

FIELD_OF_FLAG = {"lr": "learning_rate"}


def _defaults_in_help() -> list[tuple[str, str]]:
    found = []
    for name, annotation in typing.get_type_hints(train.train, include_extras=True).items():
        option = typing.get_args(annotation)[1] if typing.get_args(annotation) else None
        stated = re.search(r"\[default: ([^\]]+)\]", getattr(option, "help", None) or "")
        if stated and not re.match(r"(as|from|ten|five|runs/)", stated[1]):
            found.append((FIELD_OF_FLAG.get(name, name), stated[1]))
    return found


@pytest.mark.parametrize(("field", "stated"), _defaults_in_help())
def test_help_states_the_schema_default(field: str, stated: str) -> None:
    default = RunConfig.model_fields[field].default
    if field == "epochs":
        assert default is None
        assert stated == "1"
    else:
        assert stated == (str(default) if isinstance(default, str) else f"{default:g}")


def test_most_defaults_are_stated() -> None:
    assert len(_defaults_in_help()) >= 12


def test_every_flag_is_a_key_of_the_schema() -> None:
    own = {"config", "assignments", "as_json", "overwrite"}
    names = {FIELD_OF_FLAG.get(name, name) for name in inspect.signature(train.train).parameters} - own
    assert names <= set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, self_attn.v_proj", ["q_proj", "self_attn.v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_targets(text: str | None, expected: object) -> None:
    assert parse_targets(text) == expected


def test_flags_win_over_set_and_file(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: a.jsonl\nrank: 1\nalpha: 1\ndropout: 0.5\nepochs: 3\n")
    config = build_config(file, ["rank=2", "alpha=2"], {"rank": 3, "steps": 7, "model": None, "offline": False})
    assert (config.rank, config.alpha, config.dropout, config.steps, config.epochs) == (3, 2, 0.5, 7, None)
