"""`luthier eval`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

from luthier.cli import flags
from luthier.errors import ConfigError, nearest

if TYPE_CHECKING:
    from luthier.config import Storage
    from luthier.data import Dataset, Renderer
    from luthier.evaluation.evaluate import EvalResult
    from luthier.training.load_run import Target as LoadedTarget

METRICS = ("loss", "exact")
MAX_LENGTH = 1024
ON_LONG = ("error", "drop", "truncate")
OnLong = Literal["error", "drop", "truncate"]

Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory, or any model.", show_default=False)]
Adapter = Annotated[str | None, typer.Option("--adapter", metavar="DIR", help="Adapter in PEFT layout.", show_default=False)]


def parse_metrics(text: str) -> tuple[str, ...]:
    """`loss,exact` as a tuple. Raises ConfigError for a metric that is not known, and for none at all."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"--metrics takes {', '.join(METRICS)}; got {name!r}.{nearest(name, METRICS)}")
    if not names:
        raise ConfigError(f"--metrics needs at least one of {', '.join(METRICS)}; got {text!r}.")
    return names


def parse_storage(text: str | None) -> Storage | None:
    """The value of --base. Raises ConfigError for a storage that is not known."""
    from luthier.config import Storage

    known = get_args(Storage)
    if text is not None and text not in known:
        raise ConfigError(f"--base takes {', '.join(known)}; got {text!r}.{nearest(text, known)}")
    return cast("Storage | None", text)


def parse_on_long(text: str) -> OnLong:
    """The value of --on-long. Raises ConfigError for anything else than its three words."""
    if text not in ON_LONG:
        raise ConfigError(f"--on-long takes {', '.join(ON_LONG)}; got {text!r}.{nearest(text, ON_LONG)}")
    return cast("OnLong", text)


def evaluate(
    target: Target,
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Rows to evaluate on.", show_default=False)],
    adapter: Adapter = None,
    metrics: Annotated[str, typer.Option("--metrics", help="Any of loss, exact, separated by commas.")] = "loss,exact",
    vs_base: Annotated[bool, typer.Option("--vs-base", help="Evaluate the model before tuning too.")] = False,
    base: flags.Base = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=8, help="Longest row in tokens.", show_default=f"the run's, else {MAX_LENGTH}"),
    ] = None,
    on_long: Annotated[
        str, typer.Option("--on-long", metavar="error|drop|truncate", help="What happens to longer rows.")
    ] = "error",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest generated answer.")] = 128,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Use only the first N rows.", show_default=False)] = None,
    offline: flags.Offline = False,
    as_json: flags.Json = False,
) -> None:
    """Measure loss, perplexity and exact match on held-out rows."""
    wanted = parse_metrics(metrics)
    storage, for_long = parse_storage(base), parse_on_long(on_long)

    from luthier.cli.display import progress_display
    from luthier.cli.quiet import quiet_libraries

    quiet_libraries()
    with progress_display() as progress:
        from luthier.adapters import disabled
        from luthier.evaluation.evaluate import evaluate as evaluate_model
        from luthier.training.load_run import load_base, load_target

        loaded = load_target(target, adapter=adapter, base=storage, offline=offline, progress=progress)
        if vs_base and loaded.adapter is None and loaded.run_dir is None:
            raise ConfigError(f"--vs-base compares a tuned model with its base; {target} is not tuned. Add --adapter DIR.")
        renderer, dataset = _load_rows(data, loaded, max_length, for_long, offline)

        def measure(measured: LoadedTarget, label: str) -> EvalResult:
            return evaluate_model(
                measured.model, measured.tokenizer, dataset, renderer, metrics=wanted, max_new_tokens=max_new_tokens,
                rows=rows, progress=lambda stage, done, total: progress(f"{label}, {stage}", done, total),
            )  # fmt: skip

        result, base_result = measure(loaded, "model"), None
        if vs_base and loaded.adapter is not None:
            with disabled(loaded.model):
                base_result = measure(loaded, "base")
        elif vs_base:
            loaded = load_base(loaded, base=storage, offline=offline, progress=progress)
            base_result = measure(loaded, "base")
    for note in result.notes:
        typer.echo(f"note: {note}.", err=True)
    if as_json:
        typer.echo(json.dumps(_as_json(result, base_result)))
        return
    from luthier.cli.tables import print_eval

    print_eval(result, base_result)


def _load_rows(
    data: str, loaded: LoadedTarget, max_length: int | None, on_long: OnLong, offline: bool
) -> tuple[Renderer, Dataset]:
    """The rows as the model saw them in training: with its run's length, supervision and --offline, where it is of a run."""
    from luthier.config import make_config
    from luthier.data import Renderer, load_examples
    from luthier.training.rundir import read_config

    config = None if loaded.run_dir is None else make_config(read_config(loaded.run_dir))
    longest = max_length or (config.max_length if config else MAX_LENGTH)
    renderer = Renderer(loaded.tokenizer, max_length=longest, loss_on=config.loss_on if config else "assistant")
    offline = offline or (config is not None and config.offline)
    return renderer, load_examples(data, renderer, on_long=on_long, offline=offline)


def _as_json(result: EvalResult, base: EvalResult | None) -> dict[str, Any]:
    if base is None:
        return {"metrics": result.metrics, "rows": result.rows}
    return {"base": base.metrics, "tuned": result.metrics, "rows": result.rows}
