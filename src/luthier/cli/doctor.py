"""`luthier doctor`: what this machine has, and whether the main job would run on it."""

from __future__ import annotations

import contextlib
import importlib
import json
from typing import Any

import typer

from luthier.cli import flags


def doctor(as_json: flags.Json = False) -> None:
    """Show versions, processor, memory, disk, cache and whether the default model is here."""
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    from luthier.training.environment import describe_cache, describe_environment, preflight_problems

    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("luthier.kernels")
    facts: dict[str, Any] = {**describe_environment(), "cache": describe_cache()}
    facts["problems"] = preflight_problems(facts)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        from luthier.cli.tables import print_facts

        print_facts(facts)
    if facts["problems"]:
        from luthier.errors import PreflightError, bulleted

        raise PreflightError("this machine is not ready:\n" + bulleted(facts["problems"]))
