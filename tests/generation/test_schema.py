"""Answers of a JSON schema: a random model, drawing hotly, writes nothing but valid values."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field
from tiny import tiny_model, tiny_tokenizer

from luthier.errors import ConfigError
from luthier.generation import Generator, Sampling
from luthier.generation.schema import SchemaConstraint, require_library

pytest.importorskip("llguidance")

STOPS = frozenset({2})


class Slots(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    year: int = Field(ge=0, le=2100)
    explicit: bool


class Request(BaseModel):
    """An independent judge of the answers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    intent: Literal["play", "book"]
    artist: str = Field(max_length=6)
    slots: Slots
    tags: list[Literal["a", "b"]] = Field(max_length=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def constraint(tokenizer) -> SchemaConstraint:
    return SchemaConstraint(tokenizer, Request.model_json_schema())


def answers(tokenizer, constraint, count: int, sampling: Sampling | None = None, stops: frozenset[int] = STOPS) -> list[str]:
    model = tiny_model("llama", seed=2)
    prompts = [tokenizer(f"question {number}").input_ids for number in range(count)]
    found = Generator(model, stops=stops).generate(prompts, 400, sampling=sampling, constraint=constraint)
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0), Sampling(temperature=8.0, top_p=0.95, seed=3)])
def test_every_answer_is_valid(tokenizer, constraint, sampling) -> None:
    texts = answers(tokenizer, constraint, 8, sampling)
    for text in texts:
        Request.model_validate_json(text)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("stops", [frozenset({2}), frozenset({0, 2}), frozenset()])
@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["yes", "no", 3, None]},
        {"type": "integer", "minimum": 5, "maximum": 1000},
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    ],
)
def test_values_that_could_go_on_end_as_valid_ones(tokenizer, schema: dict[str, Any], stops) -> None:
    for text in answers(tokenizer, SchemaConstraint(tokenizer, schema), 6, Sampling(temperature=6.0), stops):
        value = json.loads(text)
        if "enum" in schema:
            assert value in schema["enum"]
        elif schema["type"] == "integer":
            assert type(value) is int
            assert 5 <= value <= 1000
        else:
            assert 2 <= len(value) <= 4
            assert all(type(item) is bool for item in value)


def test_an_answer_without_room_is_cut(tokenizer, constraint) -> None:
    (ids,) = Generator(tiny_model("llama", seed=2), stops=STOPS).generate([[5, 6]], 4, constraint=constraint)
    assert len(ids) == 4
    assert tokenizer.decode(ids).startswith("{")


def test_what_cannot_be_followed_is_said(tokenizer) -> None:
    with pytest.raises(ConfigError, match="the JSON schema cannot be followed"):
        SchemaConstraint(tokenizer, {"type": "nothing"})
    with pytest.raises(ConfigError, match="the JSON schema cannot be followed"):
        SchemaConstraint(tokenizer, {"type": "object", "patternProperties": {"(?=a)b": {}}})
    with pytest.raises(ConfigError, match="needs a tokenizer of the tokenizers library; got object"):
        SchemaConstraint(object(), {"type": "integer"})


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r"llguidance is missing\)\. Install it with: pip install 'luthier\[constrain\]'"):
        require_library()
