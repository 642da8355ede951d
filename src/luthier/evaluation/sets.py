"""What a model is evaluated on: named files of rows, with the references and the options that training has no use for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.data import Dataset, Example, Renderer, RowCache, load_examples
from luthier.data.forms import RowError
from luthier.data.load import Lengths, OnLong, length_problems
from luthier.data.problems import Problems
from luthier.data.read import Source, open_source, read_rows
from luthier.errors import ConfigError, DataError
from luthier.evaluation.choice import Choice, is_choice_row, render_choice
from luthier.evaluation.guard import Guard, parse_bound
from luthier.evaluation.labels import Labels

_NAME = re.compile(r"[\w.-]+")
MOST_REFERENCES = 100


@dataclass(frozen=True)
class NamedFile:
    """One --data or --guard: what to call the set, its file or hub name, and for a guard its bound."""

    name: str
    path: str
    guard: Guard | None = None


@dataclass
class Extras:
    """What rows hold beside prompt and answer, each for the rows of a Dataset in their order.

    references: the answers that count as right, where any row has several. choices: the options, where rows have them.
    labels: the answers to choose from, where a file of them was given. schema: the JSON Schema that written answers are held
    to, where one was given.
    """

    references: list[list[str]] | None = None
    choices: list[Choice] | None = None
    labels: Labels | None = None
    schema: dict[str, Any] | None = None


@dataclass
class EvalSet:
    """Rows ready to measure, in the tokens of one model."""

    name: str
    dataset: Dataset
    extras: Extras = field(default_factory=Extras)
    guard: Guard | None = None


def parse_files(data: Sequence[str], guards: Sequence[str]) -> list[NamedFile]:
    """`[NAME=]FILE` of each --data, then `[NAME=]FILE[:BOUND]` of each --guard; without a name a file is called by its own.

    Raises ConfigError for a name that is no plain word or stands there twice, a file left out, and a bound that is none.
    """
    files = [NamedFile(*_split_name(text, "--data")) for text in data]
    for text in guards:
        name, rest = _split_name(text, "--guard")
        path, guard = parse_bound(rest)
        files.append(NamedFile(name or _name_of(path), path, guard))
    files = [NamedFile(one.name or _name_of(one.path), one.path, one.guard) for one in files]
    names = [one.name for one in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        paths = " and ".join(one.path for one in files if one.name == twice)
        raise ConfigError(f"every set needs a name of its own; {paths} are both called {twice!r}. Write --data NAME=FILE.")
    return files


def load_set(
    file: NamedFile, renderer: Renderer, *, on_long: OnLong, offline: bool = False, cache: RowCache | None = None
) -> EvalSet:
    """Read and render one file of any form that training takes, or of rows with choices.

    A row may have `references`, a list of texts: the answers that BLEU, chrF and ROUGE compare with, in place of the one
    it is trained on. cache: as for `load_examples`; rows with choices are always rendered.
    Raises DataError listing all that is wrong with the file.
    """
    source = open_source(file.path, offline=offline)
    if has_choices(source):
        return _load_choices(file, renderer, on_long, offline)
    dataset = load_examples(file.path, renderer, on_long=on_long, offline=offline, cache=cache)
    references = _references(file.path, dataset, offline)
    if references is not None:
        dataset.manifest["notes"] = [note for note in dataset.manifest["notes"] if not _is_about_references(note)]
    return EvalSet(file.name, dataset, Extras(references), file.guard)


def _split_name(text: str, flag: str) -> tuple[str, str]:
    """("", text) where no name is given. A file that exists is taken whole, an = in its name or not."""
    name, equals, path = text.partition("=")
    # The = of a guard's FILE:FIGURE=BOUND names no set.
    if not equals or Path(text).is_file() or (flag == "--guard" and ":" in name):
        name, path = "", text
    elif not _NAME.fullmatch(name):
        raise ConfigError(f"{flag} takes NAME=FILE, the name of letters, digits, . _ and -; got {text!r}.")
    if not path.strip():
        raise ConfigError(f"{flag} takes NAME=FILE; got {text!r}, which names no file.")
    return name, path


def _name_of(path: str) -> str:
    return Path(path).stem or path


def _load_choices(file: NamedFile, renderer: Renderer, on_long: OnLong, offline: bool) -> EvalSet:
    source = open_source(file.path, offline=offline)
    problems, lengths = Problems(), Lengths()
    examples, choices = [], []
    for example, choice in choice_rows(source, renderer, problems, lengths):
        length = choice.longest_answer(example)
        lengths.longest = max(lengths.longest, length)
        if length > renderer.max_length:
            lengths.long += 1
            lengths.first_long = lengths.first_long or example.where
            continue
        examples.append(example)
        choices.append(choice)
    # Half an option is another option: rows with choices are whole or left out.
    rule: OnLong = "drop" if on_long == "drop" else "error"
    damaged = problems.count > 0
    for problem in length_problems(file.path, lengths, renderer.max_length, rule, kept=len(examples), damaged=damaged):
        problems.add("", problem)
    problems.raise_any(file.path)
    manifest: dict[str, Any] = {"path": file.path, "sha256": source.sha256(), "form": "choices", "rows": lengths.rows}
    manifest |= {"kept": len(examples), "dropped": lengths.long, "longest": lengths.longest, "notes": problems.notes()}
    return EvalSet(file.name, Dataset(examples, manifest), Extras(choices=choices), file.guard)


def choice_rows(source: Source, renderer: Renderer, problems: Problems, lengths: Lengths) -> Iterator[tuple[Example, Choice]]:
    """The rows with choices, as `render_choice` gives them, one by one; what is wrong with others goes to `problems`."""
    for where, value in read_rows(source, problems):
        lengths.rows += 1
        try:
            if not is_choice_row(value):
                raise RowError("all rows of a file must have one form; this has no choices, the first row has.")
            rendered = render_choice(value, where, renderer)
        except RowError as error:
            problems.add(where, str(error))
        except DataError as error:
            problems.add("", str(error))
        else:
            yield rendered


def has_choices(source: Source) -> bool:
    """Whether the first row of a file has choices, and so all are to."""
    return is_choice_row(next((value for _, value in read_rows(source, Problems())), None))


def _references(path: str, dataset: Dataset, offline: bool) -> list[list[str]] | None:
    """The references of each kept row, its answer where it has none; None where no row has any."""
    source = open_source(path, offline=offline)
    # What else is wrong with the rows was said when they were rendered.
    problems, ignored = Problems(), Problems()
    found: dict[str, list[str]] = {}
    for where, value in read_rows(source, ignored):
        if isinstance(value, dict) and value.get("references") is not None:
            try:
                found[where] = parse_references(value["references"])
            except RowError as error:
                problems.add(where, str(error))
    problems.raise_any(path)
    if not found:
        return None
    return [found.get(example.where, [example.completion or ""]) for example in dataset.examples]


def parse_references(value: Any) -> list[str]:
    """Texts that are not empty. Raises RowError for anything else."""
    texts = isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)
    if not texts or not 1 <= len(value) <= MOST_REFERENCES:
        raise RowError(
            f"references must be a list of 1 to {MOST_REFERENCES} texts that are not empty; got {str(value)[:80]!r}."
        )
    return list(value)


def _is_about_references(note: str) -> bool:
    return note.startswith("keys that are not used: 'references' ")
