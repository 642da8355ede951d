"""Where a model comes from: a folder, a GGUF file, an id of the Hugging Face hub, or the alias of the default model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.errors import ConfigError, LuthierError, nearest, one_line
from luthier.models import hub
from luthier.models.checkpoint import SINGLE_FILE
from luthier.models.gguf_file import MAGIC
from luthier.models.skeleton import CONFIG_FILE
from luthier.models.smollm2 import ALIAS, GGUF_SHA256, HUB_NAME, find_smollm2
from luthier.progress import Progress

MAX_LISTED_NEIGHBOURS = 5


@dataclass(frozen=True)
class ModelSource:
    """A model that stands on this machine.

    name: as it was asked for; path: its folder or `.gguf` file; identity: what it is, whatever the name: a path, an
    `org/name@revision` of the hub, or a sha256; note: what a person should know of where it came from, or "".
    """

    name: str
    kind: Literal["folder", "gguf", "hub", "alias"]
    path: Path
    identity: str
    note: str = ""


def resolve(model: str, *, offline: bool = False, progress: Progress | None = None) -> ModelSource:
    """Find a model by name, fetching it if need be.

    The alias goes first (./smollm2-135m names a folder of that name), then a path that exists, then the hub.
    offline, or HF_HUB_OFFLINE: no socket is opened and only caches are looked at.
    progress(stage, done, total) is called with bytes during a download.
    Raises ConfigError, naming what is near, for a name that leads nowhere; ModelError where fetching fails.
    """
    offline = offline or hub.is_offline()
    if model == ALIAS:
        return _alias(offline, progress)
    if not model.strip() or "\0" in model:
        raise ConfigError(
            f"a model is named by a folder, a .gguf file, a hub id or {ALIAS}; got {model!r}. Try --model {ALIAS}."
        )
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return ModelSource(model, "folder", path.resolve(), str(path.resolve()))
        if path.is_file():
            return _file(model, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of a person this machine does not know
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"a model's name must lead to something readable; {model[:200]!r}: {reason}.") from error
    if not hub.looks_like_name(model):
        raise ConfigError(f"no model is called {model!r}.{_near(model, path)}")
    try:
        folder = hub.snapshot(model, offline=offline, progress=progress)
    except LuthierError as error:
        raise type(error)(f"{error} No folder or file is called {model!r} either.{_near(model, path)}") from error
    return ModelSource(model, "hub", folder, f"{model}@{folder.name}")


def _alias(offline: bool, progress: Progress | None) -> ModelSource:
    path, note = find_smollm2(offline=offline, progress=progress)
    identity = f"{HUB_NAME}@{path.name}" if path.is_dir() else f"sha256:{GGUF_SHA256}"
    return ModelSource(ALIAS, "alias", path, identity, note)


def _file(model: str, path: Path) -> ModelSource:
    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    if path.suffix.lower() != ".gguf" and not is_gguf:
        hint = f" Give its folder, {path.parent}." if path.name.endswith((".safetensors", ".json")) else ""
        raise ConfigError(f"a model file must be a .gguf file; {model} is not.{hint}")
    return ModelSource(model, "gguf", path.resolve(), str(path.resolve()))


def _near(model: str, path: Path) -> str:
    """What a person may have meant: the closest name, and the models that stand beside the path."""
    beside = _models_in(path.parent)
    listed = f" Beside it: {', '.join(beside[:MAX_LISTED_NEIGHBOURS])}." if beside else ""
    known = f" Known: a model folder, a .gguf file, a hub id such as {HUB_NAME}, or the alias {ALIAS}."
    return f"{nearest(model, [ALIAS, *beside])}{listed}{known}"


def _models_in(folder: Path) -> list[str]:
    """The model folders and GGUF files of `folder`, as paths to give."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [str(entry) for entry in entries if entry.suffix.lower() == ".gguf" or _is_model_folder(entry)]


def _is_model_folder(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() or (path / SINGLE_FILE).is_file()
