"""Flags against the schema they feed."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

import pytest

from luthier.cli import plan, train
from luthier.cli.flags import RunFlags, parse_targets
from luthier.config import RunConfig

# Flags that are no key of the configuration.
OWN = {"config_file", "assignments", "no_data_cache"}


def _defaults_in_help() -> list[tuple[str, str]]:
    found = []
    for name, annotation in typing.get_type_hints(train.train, include_extras=True).items():
        option = typing.get_args(annotation)[1] if typing.get_args(annotation) else None
        stated = re.search(r"\[default: ([^\]]+)\]", getattr(option, "help", None) or "")
        if stated and not re.match(r"(as|from|ten|five|runs/)", stated[1]):
            found.append((name, stated[1]))
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
    names = {field.name for field in dataclasses.fields(RunFlags)}
    assert names - OWN <= set(RunConfig.model_fields)
    assert names >= OWN


def test_train_and_plan_take_the_same_flags() -> None:
    """In the same order; train has --overwrite besides."""
    flags = [field.name for field in dataclasses.fields(RunFlags)]
    assert list(inspect.signature(plan.plan).parameters) == [*flags, "as_json"]
    assert list(inspect.signature(train.train).parameters) == [*flags, "overwrite", "as_json"]


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
    flags = RunFlags(config_file=file, assignments=["rank=2", "alpha=2"], rank=3, steps=7)
    config = flags.run_config()
    assert (config.rank, config.alpha, config.dropout, config.steps, config.epochs) == (3, 2, 0.5, 7, None)
    assert (config.data_cache, config.offline) == (True, False)
    assert not RunFlags(config_file=file, no_data_cache=True).run_config().data_cache
