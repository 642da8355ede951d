"""`luthier doctor`: what this machine has, and whether the main job would run on it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from luthier.cli import flags


def doctor(
    bench: Annotated[bool, typer.Option("--bench", help="Time each kernel against what the machine can do.")] = False,
    as_json: flags.Json = False,
) -> None:
    """Show versions, processor, memory, disk, cache and whether the default model is here."""
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    from luthier.training.environment import describe_cache, describe_environment, preflight_problems

    facts: dict[str, Any] = {**describe_environment(), "cache": describe_cache()}
    facts["problems"] = preflight_problems(facts)
    if bench:
        facts["bench"] = _bench()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        from luthier.cli.tables import print_facts

        print_facts({key: value for key, value in facts.items() if key != "bench"})
        if bench:
            from luthier.kernels.bench import as_text

            typer.echo(as_text(facts["bench"]))
    if facts["problems"]:
        from luthier.errors import PreflightError, bulleted

        raise PreflightError("this machine is not ready:\n" + bulleted(facts["problems"]))


def _bench() -> dict[str, Any]:
    from luthier.cli.display import progress_display
    from luthier.kernels.bench import quick_bench

    with progress_display() as progress:
        return quick_bench(progress)
