"""The flags that several commands share. Their values stay None when not given, so that a config file can set them.

Defaults named in the help are those of `luthier.config.RunConfig`; a test compares them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from luthier.config import RunConfig


def _option(*names: str, text: str, show: str | None = None) -> Any:
    return typer.Option(*names, help=text, show_default=False, metavar=show)


Model = Annotated[str | None, _option("--model", show="M", text="Folder, hub id, .gguf file or alias. [default: smollm2-135m]")]
Base = Annotated[
    str | None,
    _option(
        "--base",
        show="f32|bf16|f16|nf4|asis",
        text="Storage of the frozen weights. [default: as the model has it; nf4 with --method qlora]",
    ),
]
SkipModules = Annotated[
    str | None, _option("--skip-modules", show="NAMES", text="nf4: linear layers to leave as they are, with commas between.")
]
NoDataCache = Annotated[bool, _option("--no-data-cache", text="Render the rows anew and keep nothing of them.")]
Offline = Annotated[bool, _option("--offline", text="Open no connection; use what is here.")]
Json = Annotated[bool, _option("--json", text="Print one JSON object as the last line of stdout.")]


@dataclass(frozen=True)
class RunFlags:
    """The flags that describe a run, named as the keys of the configuration that they set; None and False are not given.

    All are keys of `RunConfig` but no_data_cache, and the last two, which are where further keys come from.
    """

    data: Annotated[
        str | None, typer.Argument(help="JSONL, JSON, CSV or Parquet file, or a `datasets` name.", show_default=False)
    ] = None
    model: Model = None
    method: Annotated[
        str | None,
        _option(
            "--method",
            show="lora|qlora|full",
            text="Low-rank terms, the same on a 4-bit base, or every weight. [default: lora]",
        ),
    ] = None
    base: Base = None
    skip_modules: SkipModules = None
    variant: Annotated[str | None, _option("--variant", show="lora|rslora|dora", text="Kind of terms. [default: lora]")] = None
    init: Annotated[
        str | None,
        _option("--init", show="default|pissa|eva|loftq|qera", text="What the terms begin with. [default: default]"),
    ] = None
    rank: Annotated[int | None, _option("--rank", show="N", text="Rank of the terms. [default: 16]")] = None
    alpha: Annotated[float | None, _option("--alpha", show="N", text="Scale of the terms is alpha/rank. [default: 32]")] = None
    dropout: Annotated[float | None, _option("--dropout", show="P", text="Dropout on the terms' input. [default: 0]")] = None
    targets: Annotated[
        str | None,
        _option("--targets", show="T", text="all-linear, names with commas between, or one regex. [default: all-linear]"),
    ] = None
    learning_rate: Annotated[
        float | None, _option("--lr", show="X", text="Peak learning rate. [default: from the hidden size and the steps]")
    ] = None
    epochs: Annotated[float | None, _option("--epochs", show="N", text="Passes over the data. [default: 1]")] = None
    steps: Annotated[int | None, _option("--steps", show="N", text="Optimiser steps, instead of epochs.")] = None
    batch_size: Annotated[int | None, _option("--batch-size", show="N", text="Examples in one step. [default: 8]")] = None
    max_length: Annotated[int | None, _option("--max-length", show="N", text="Longest row in tokens. [default: 1024]")] = None
    on_long: Annotated[
        str | None, _option("--on-long", show="error|drop|truncate", text="What happens to longer rows. [default: error]")
    ] = None
    loss_on: Annotated[
        str | None, _option("--loss-on", show="assistant|all", text="Which tokens carry loss. [default: assistant]")
    ] = None
    no_data_cache: NoDataCache = False
    cache_frozen: Annotated[
        bool,
        _option("--cache-frozen", text="Keep what goes into the lowest trained layer on disk: layers below run once a row."),
    ] = False
    eval_data: Annotated[
        str | None, _option("--eval-data", show="FILE", text="Held-out rows, evaluated before, during and after.")
    ] = None
    eval_every: Annotated[
        int | None, _option("--eval-every", show="STEPS", text="Steps between evaluations. [default: five]")
    ] = None
    save_every: Annotated[
        int | None, _option("--save-every", show="STEPS", text="Steps between checkpoints. [default: ten]")
    ] = None
    optimizer: Annotated[
        str | None,
        _option("--optimizer", show="adamw|paged_adamw", text="paged_adamw: on a GPU, with bitsandbytes. [default: adamw]"),
    ] = None
    memory: Annotated[
        str | None,
        _option(
            "--memory", show="SIZE", text="What the process may hold, such as 6GB. [default: as much as 80 % of what is free]"
        ),
    ] = None
    seed: Annotated[int | None, _option("--seed", show="N", text="Fixes initialisation, order and dropout. [default: 0]")] = (
        None
    )
    out: Annotated[str | None, _option("--out", show="DIR", text="Run directory. [default: runs/<date>-<time>-<data>]")] = None
    offline: Offline = False
    config_file: Annotated[
        Path | None, _option("--config", show="FILE.yaml", text="Keys of the configuration; flags win over it.")
    ] = None
    assignments: Annotated[
        list[str] | None, _option("--set", show="KEY=VALUE", text="Set any key of the configuration; may be repeated.")
    ] = None

    def run_config(self) -> RunConfig:
        """Defaults < config file < --set < flags, checked as a whole. Raises ConfigError."""
        from luthier.config import make_config, parse_assignment, read_config_file

        assigned = dict(parse_assignment(text) for text in self.assignments or [])
        from_file = read_config_file(self.config_file) if self.config_file else {}
        given = self._given()
        # A length given on the command line replaces the other kind of length in the file.
        if {"epochs", "steps"} & (given.keys() | assigned.keys()):
            from_file = {key: value for key, value in from_file.items() if key not in ("epochs", "steps")}
        return make_config(from_file, assigned, given)

    def _given(self) -> dict[str, Any]:
        """The flags on the command line, as keys of the configuration."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {key: value for key, value in values.items() if value is not None and value is not False}
        for source in ("config_file", "assignments"):
            given.pop(source, None)
        if given.pop("no_data_cache", False):
            given["data_cache"] = False
        if self.targets is not None:
            given["targets"] = parse_targets(self.targets)
        if self.skip_modules is not None:
            given["skip_modules"] = split_names(self.skip_modules)
        return given


@functools.cache
def _flag_types() -> dict[str, Any]:
    """The types of RunFlags with what typer is to know of each, made once for all commands."""
    return get_type_hints(RunFlags, include_extras=True)


def takes_run_flags(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose first parameter is a RunFlags, in the form that typer reads: with a parameter for each flag instead."""
    hints, own_hints = _flag_types(), get_type_hints(command, include_extras=True)
    _first, *own = inspect.signature(command).parameters.values()
    parameters = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(RunFlags)
    ]
    parameters += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own_hints[one.name]) for one in own]

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        run = RunFlags(**{field.name: values.pop(field.name) for field in fields(RunFlags)})
        command(run, **values)

    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_flags


def parse_targets(text: str | None) -> str | list[str] | None:
    """`all-linear` and regular expressions stay text; `q_proj,v_proj` and plain names become a list."""
    if text is None or text == "all-linear":
        return text
    names = [name.strip() for name in text.split(",")]
    plain = all(name and name.replace("_", "").replace(".", "").isalnum() for name in names)
    return names if plain else text


def split_names(text: str | None) -> list[str]:
    """`q_proj, v_proj` -> [`q_proj`, `v_proj`]"""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
