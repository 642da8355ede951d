"""The flags that several commands share. Their values stay None when not given, so that a config file can set them.

Defaults named in the help are those of `luthier.config.RunConfig`; a test compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from luthier.config import RunConfig


def _option(*names: str, text: str, show: str | None = None, panel: str | None = None) -> Any:
    return typer.Option(*names, help=text, show_default=False, metavar=show)


Data = Annotated[str | None, typer.Argument(help="JSONL, JSON, CSV or Parquet file, or a `datasets` name.", show_default=False)]
Model = Annotated[str | None, _option("--model", show="M", text="Folder, hub id, .gguf file or alias. [default: smollm2-135m]")]
Method = Annotated[
    str | None,
    _option(
        "--method", show="lora|qlora|full", text="Low-rank terms, the same on a 4-bit base, or every weight. [default: lora]"
    ),
]
Base = Annotated[
    str | None,
    _option(
        "--base",
        show="f32|bf16|f16|nf4|asis",
        text="Storage of the frozen weights. [default: as the model has it; nf4 with --method qlora]",
    ),
]
VariantFlag = Annotated[str | None, _option("--variant", show="lora|rslora|dora", text="Kind of terms. [default: lora]")]
SkipModules = Annotated[
    str | None, _option("--skip-modules", show="NAMES", text="nf4: linear layers to leave as they are, with commas between.")
]
OptimizerFlag = Annotated[
    str | None,
    _option("--optimizer", show="adamw|paged_adamw", text="paged_adamw needs CUDA and bitsandbytes. [default: adamw]"),
]
Rank = Annotated[int | None, _option("--rank", show="N", text="Rank of the terms. [default: 16]")]
Alpha = Annotated[float | None, _option("--alpha", show="N", text="Scale of the terms is alpha/rank. [default: 32]")]
Dropout = Annotated[float | None, _option("--dropout", show="P", text="Dropout on the terms' input. [default: 0]")]
Targets = Annotated[
    str | None,
    _option("--targets", show="T", text="all-linear, names with commas between, or one regex. [default: all-linear]"),
]
LearningRate = Annotated[float | None, _option("--lr", show="X", text="Peak learning rate. [default: from the hidden size]")]
Epochs = Annotated[float | None, _option("--epochs", show="N", text="Passes over the data. [default: 1]")]
Steps = Annotated[int | None, _option("--steps", show="N", text="Optimiser steps, instead of epochs.")]
BatchSize = Annotated[int | None, _option("--batch-size", show="N", text="Examples in one step. [default: 8]")]
MaxLength = Annotated[int | None, _option("--max-length", show="N", text="Longest row in tokens. [default: 1024]")]
OnLong = Annotated[
    str | None, _option("--on-long", show="error|drop|truncate", text="What happens to longer rows. [default: error]")
]
LossOn = Annotated[str | None, _option("--loss-on", show="assistant|all", text="Which tokens carry loss. [default: assistant]")]
EvalData = Annotated[str | None, _option("--eval-data", show="FILE", text="Held-out rows, evaluated before, during and after.")]
Memory = Annotated[
    str | None,
    _option("--memory", show="SIZE", text="What the process may hold, such as 6GB. [default: as much as 80 % of what is free]"),
]
Seed = Annotated[int | None, _option("--seed", show="N", text="Fixes initialisation, order and dropout. [default: 0]")]
SaveEvery = Annotated[int | None, _option("--save-every", show="STEPS", text="Steps between checkpoints. [default: ten]")]
EvalEvery = Annotated[int | None, _option("--eval-every", show="STEPS", text="Steps between evaluations. [default: five]")]
Out = Annotated[str | None, _option("--out", show="DIR", text="Run directory. [default: runs/<date>-<time>-<data>]")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that --out already holds.", show_default=False)]
Config = Annotated[Path | None, _option("--config", show="FILE.yaml", text="Keys of the configuration; flags win over it.")]
Assignments = Annotated[
    list[str] | None, _option("--set", show="KEY=VALUE", text="Set any key of the configuration; may be repeated.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Open no connection; use what is here.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.", show_default=False)]


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


def build_config(config: Path | None, assignments: list[str] | None, flags: dict[str, Any]) -> RunConfig:
    """Defaults < config file < --set < flags, checked as a whole. Raises ConfigError."""
    from luthier.config import make_config, parse_assignment, read_config_file

    given = {key: value for key, value in flags.items() if value is not None and value is not False}
    if "targets" in given:
        given["targets"] = parse_targets(given["targets"])
    if "skip_modules" in given:
        given["skip_modules"] = split_names(given["skip_modules"])
    assigned = dict(parse_assignment(text) for text in assignments or [])
    # A length given on the command line replaces the other kind of length in the file.
    from_file = read_config_file(config) if config else {}
    if {"epochs", "steps"} & (given.keys() | assigned.keys()):
        from_file = {key: value for key, value in from_file.items() if key not in ("epochs", "steps")}
    return make_config(from_file, assigned, given)
