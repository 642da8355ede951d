"""What answers may be, read from the files that a person names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.errors import ConfigError
from luthier.evaluation.labels import read_labels
from luthier.generation import Constraint, LabelConstraint
from luthier.generation.schema import SchemaConstraint, require_library
from luthier.strict_json import read_json


def read_constraint(
    tokenizer: PreTrainedTokenizerBase, *, labels: str | None = None, json_schema: str | None = None
) -> Constraint | None:
    """The constraint to the labels in a file (`read_labels`), or to the JSON Schema in one; None without either.

    Raises ConfigError as `check_files` does, and for a schema or a tokenizer that `SchemaConstraint` refuses.
    """
    if labels is not None:
        return LabelConstraint.of_texts(tokenizer, read_labels(labels))
    return None if json_schema is None else SchemaConstraint(tokenizer, read_schema(json_schema))


def check_files(*, labels: str | None = None, json_schema: str | None = None) -> None:
    """Raise ConfigError for what can be said before a model is loaded: unreadable files, a library that is missing."""
    if labels is not None:
        read_labels(labels)
    if json_schema is not None:
        require_library()
        read_schema(json_schema)


def read_schema(path: str) -> dict[str, Any]:
    """The JSON Schema in a file. Raises ConfigError for a file that cannot be read, or holds no JSON object."""
    try:
        content = read_json(Path(path))
    except OSError as error:
        raise ConfigError(f"--json-schema needs a file that can be read; {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"--json-schema needs a JSON Schema; {path} holds none: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--json-schema needs a JSON object; {path} holds another value.")
    return content
