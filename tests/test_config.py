"""The configuration schema: precedence, ranges, and messages that name the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.config import RunConfig, make_config, parse_assignment, read_config_file
from luthier.errors import ConfigError


def test_later_layers_win() -> None:
    config = make_config({"data": "a.jsonl", "rank": 4, "alpha": 8}, {"rank": 8})
    assert (config.rank, config.alpha, config.batch_size) == (8, 8, RunConfig.model_fields["batch_size"].default)


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'learning_rat'. Did you mean 'learning_rate'\?"):
        make_config({"data": "a", "learning_rat": 1e-3})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rank", 0, "rank must be greater than or equal to 1; got 0."),
        ("rank", "many", "rank must be a valid integer, unable to parse string as an integer; got 'many'."),
        ("learning_rate", -1.0, "learning_rate must be greater than 0; got -1.0."),
        ("learning_rate", float("nan"), "learning_rate must be a finite number; got nan."),
        ("dropout", 1.0, "dropout must be less than 1; got 1.0."),
        ("method", "prefix", "method must be 'lora', 'qlora' or 'full'; got 'prefix'."),
        ("alpha_pattern", {"q_proj": 0}, "alpha_pattern: alpha for 'q_proj' must be above 0; got {'q_proj': 0}."),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern: rank for 'q_proj' must be at least 1; got {'q_proj': 0}."),
    ],
)
def test_one_bad_value_gives_one_message(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"data": "a", key: value})
    assert str(caught.value) == message


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"rank": 0, "batch_size": 0})
    assert [line.split()[1] for line in str(caught.value).splitlines()[1:]] == ["data", "rank", "batch_size"]


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give epochs or steps, not both"):
        make_config({"data": "a", "epochs": 1, "steps": 10})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"method": "full", "rank": 8, "base": "bf16"}, "base, rank would do nothing. Leave it out."),
        ({"eval_rows": 8}, "eval_rows would do nothing. Give eval_data or leave it out."),
    ],
)
def test_settings_without_effect_are_refused(keys: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"data": "a", **keys})
    assert str(caught.value).endswith(named)


def test_defaults_written_out_are_no_settings() -> None:
    """A resolved configuration names every key; those at their defaults may stand beside any method."""
    config = make_config({"data": "a", "method": "full"})
    assert make_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("text", "expected"), [("rank=8", ("rank", 8)), ("targets=[q_proj, v_proj]", ("targets", ["q_proj", "v_proj"]))]
)
def test_assignments_are_yaml(text: str, expected: tuple[str, object]) -> None:
    assert parse_assignment(text) == expected


def test_assignment_without_equals_is_refused() -> None:
    with pytest.raises(ConfigError, match="--set takes key=value; got 'rank'"):
        parse_assignment("rank")


def test_config_file_problems(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match="must be readable"):
        read_config_file(file)
    file.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds `key: value` lines"):
        read_config_file(file)
    file.write_text("rank: [unclosed\n")
    with pytest.raises(ConfigError, match="must be valid YAML"):
        read_config_file(file)
    file.write_text("")
    assert read_config_file(file) == {}
