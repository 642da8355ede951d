"""Load what a person points at: a run directory with what it trained, or a model, with or without an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.adapters import load_adapter
from luthier.adapters.peft_config import CONFIG_FILE
from luthier.config import NF4Options, RunConfig, Storage, make_config
from luthier.errors import ConfigError
from luthier.models.load import load
from luthier.models.skeleton import CONFIG_FILE as MODEL_CONFIG
from luthier.models.source import resolve
from luthier.progress import Progress
from luthier.training import rundir


@dataclass
class Target:
    """A model in evaluation mode and its tokenizer. adapter: the folder of the adapter attached, None without one;
    run_dir: the run it comes from, None for a plain model; name: what to call it; notes: what a person should be told of
    the model and the adapter."""

    model: Any
    tokenizer: Any
    adapter: str | None
    run_dir: Path | None
    name: str
    notes: list[str] = field(default_factory=list)


def load_target(
    target: str,
    *,
    adapter: str | None = None,
    base: Storage | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Target:
    """Load a run directory's tuned model, or any model; `adapter` is put on it, in place of the run's own.

    base: how matrices are stored; None takes the run's setting, or the model's own. Raises ConfigError for a run that
    is not finished, and what loading a model or an adapter raises.
    """
    run_dir = _run_dir(target)
    model_name, nf4 = target, NF4Options()
    if run_dir is not None:
        config = make_config(rundir.read_config(run_dir))
        model_name, own_adapter = _run_parts(run_dir, config)
        adapter, base, offline = adapter or own_adapter, base or config.storage, offline or config.offline
        nf4 = config.nf4_options
    else:
        _refuse_adapter(target)
    loaded = load(model_name, base=base, nf4=nf4, offline=offline, progress=progress)
    notes = list(loaded.notes)
    if adapter is not None:
        notes += load_adapter(loaded.model, adapter).notes
    loaded.model.eval()
    return Target(loaded.model, loaded.tokenizer, adapter, run_dir, target, notes)


def find_target(target: str, *, offline: bool = False, progress: Progress | None = None) -> None:
    """Raise what `load_target` would of a name that leads nowhere, a run that is not finished and an adapter folder.

    What is not on this machine yet is fetched; nothing is loaded.
    """
    run_dir = _run_dir(target)
    if run_dir is not None:
        config = make_config(rundir.read_config(run_dir))
        target, offline = _run_parts(run_dir, config)[0], offline or config.offline
    else:
        _refuse_adapter(target)
    resolve(target, offline=offline, progress=progress)


def _refuse_adapter(target: str) -> None:
    """Raise ConfigError for an adapter folder, which would be taken for a broken model."""
    try:
        path = Path(target).expanduser()
        is_adapter = (path / CONFIG_FILE).is_file() and not (path / MODEL_CONFIG).is_file()
    except (OSError, RuntimeError):  # no path, then: `load` says what is wrong with the name
        return
    if is_adapter:
        raise ConfigError(f"an adapter needs its base below it; {target} is an adapter folder. Give MODEL --adapter {target}.")


def _run_dir(target: str) -> Path | None:
    """The run directory that `target` names, or None: then it is a model's name, whatever it looks like."""
    try:
        path = Path(target).expanduser()
        return path if (path / rundir.CONFIG).is_file() else None
    except (OSError, RuntimeError):
        return None


def load_base(tuned: Target, *, base: Storage | None = None, offline: bool = False, progress: Progress | None = None) -> Target:
    """The model that a run of `method: full` started from. Drops the tuned model first, so that one at a time is held.

    tuned: what `load_target` gave for that run; it has no model afterwards. Raises ConfigError where it is not of a run.
    """
    if tuned.run_dir is None:
        raise ConfigError(f"only a run knows the model it was tuned from; {tuned.name} is not a run directory.")
    config = make_config(rundir.read_config(tuned.run_dir))
    tuned.model = None
    return load_target(config.model, base=base or config.base, offline=offline or config.offline, progress=progress)


def _run_parts(run_dir: Path, config: RunConfig) -> tuple[str, str | None]:
    """The model to load for a run and the adapter to put on it."""
    if not rundir.is_finished(run_dir):
        raise ConfigError(f"the run must be finished; {run_dir} is not. Finish it with `luthier resume {run_dir}`.")
    if config.method == "full":
        return str(run_dir / rundir.MODEL), None
    return config.model, str(run_dir / rundir.ADAPTER)
