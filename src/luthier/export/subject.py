"""What a person points at for export: a run, an adapter folder of PEFT or mlx-lm, or a model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from luthier.adapters import load_adapter
from luthier.adapters.base_record import BASE_FILE
from luthier.adapters.peft_config import CONFIG_FILE
from luthier.adapters.peft_format import WEIGHTS_FILE
from luthier.adapters.targets import low_rank_layers
from luthier.config import NF4Options, RunConfig, make_config
from luthier.data import Example, Renderer, RowCache, load_examples
from luthier.errors import AdapterError, ConfigError, DataError
from luthier.export.forms import DENSE
from luthier.export.mlx import MLX_WEIGHTS, is_mlx, mlx_base_name, to_peft_folder
from luthier.matrices import NF4Matrix
from luthier.models.load import Loaded, load, open_weights
from luthier.models.skeleton import CONFIG_FILE as MODEL_CONFIG
from luthier.models.skeleton import build_skeleton
from luthier.models.smollm2 import ALIAS, HUB_NAME
from luthier.models.source import ModelSource, resolve
from luthier.models.stored import linear_names
from luthier.progress import Progress
from luthier.training import rundir

DEFAULT_MAX_LENGTH = 1024


@dataclass
class Subject:
    """A model as it was trained, adapter attached, in evaluation mode.

    source: where its weights come from; name: what to call the result; adapter: the adapter's folder, None for a model
    without one; run_dir and config: of the run, None for anything else; base: what the model was loaded from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    name: str
    base: str
    adapter: Path | None = None
    run_dir: Path | None = None
    config: RunConfig | None = None
    offline: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def is_full(self) -> bool:
        """Whether every weight was trained: there is no base below it, nor an adapter."""
        return self.config is not None and self.config.method == "full"

    @property
    def is_as_stored(self) -> bool:
        """Whether the matrices stand in memory as in the base's own file, neither quantised nor decoded."""
        stored = self.config is None or self.config.storage in (None, "asis")
        return stored and not any(_is_nf4(module) for module in self.model.modules())

    @property
    def base_note(self) -> str | None:
        """What a program must load below the adapter to compute what was trained, where the base is not in plain weights."""
        matrices = [layer.matrix for layer in low_rank_layers(self.model).values()]
        kinds = {matrix.kind for matrix in matrices} - set(DENSE)
        double = next((matrix.double_quant for matrix in matrices if isinstance(matrix, NF4Matrix)), None)
        if double is not None:
            return (
                "The adapter was trained on the base in NF4; on other weights it computes something else. In Transformers: "
                f"BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant={double})."
            )
        if not kinds:
            return None
        if self.adapter is not None and self.run_dir is None and not (self.adapter / BASE_FILE).is_file():
            return (
                f"The base here is stored in blocks ({', '.join(sorted(kinds))}). What the adapter was trained on is not "
                "recorded; on weights that differ from those it computes something else."
            )
        return (
            f"The adapter was trained on the blocks of {self.source.path.name} ({', '.join(sorted(kinds))}); on weights of the "
            "base that differ from these it computes something else. Merged, or in llama.cpp on that file, it does not."
        )

    @property
    def base_name(self) -> str:
        """What others know the base by: its name on the hub, or the path of a local model."""
        base = self.config.model if self.config is not None else self.base
        return HUB_NAME if base == ALIAS else base

    @property
    def public_base_name(self) -> str:
        """The base's name on the hub, or of a local model the last part of its path: where it stands is nobody's affair."""
        path = Path(self.base_name).expanduser()
        return path.name if path.exists() else self.base_name


def open_subject(
    target: str, *, base_model: str | None = None, offline: bool = False, progress: Progress | None = None
) -> Subject:
    """Load a finished run, an adapter on its base, or a model, stored as it was trained on.

    base_model: the base of an adapter folder, in place of the one it names. Raises ConfigError for a run that is not
    finished, an adapter whose base is not known, or a base_model where there is no adapter folder; and what `load` and
    `load_adapter` raise.
    """
    try:
        path = Path(target).expanduser()
        if path.name == rundir.ADAPTER and (path.parent / rundir.CONFIG).is_file():
            path = path.parent
        is_run, is_adapter = (path / rundir.CONFIG).is_file(), (path / CONFIG_FILE).is_file()
        if not is_run and not is_adapter:
            _refuse_bare_weights(path)
    except (OSError, RuntimeError):  # no path, then: `load` says what is wrong with the name
        path, is_run, is_adapter = Path(), False, False
    if base_model is not None and (is_run or not is_adapter):
        what = "a run knows its base" if is_run else "a model is its own base"
        raise ConfigError(f"--model names the base of an adapter folder; {target} is none: {what}. Leave --model out.")
    if is_run:
        return _open_run(path, offline, progress)
    if is_adapter:
        return _open_adapter(path, base_model, offline, progress)
    loaded = load(target, offline=offline, progress=progress)
    return Subject(loaded.model, loaded.tokenizer, loaded.source, _stem(target), target, offline=offline, notes=loaded.notes)


def _refuse_bare_weights(path: Path) -> None:
    """Raise AdapterError for the weights of an adapter without their settings, which would be taken for a broken model."""
    weights = next((name for name in (WEIGHTS_FILE, MLX_WEIGHTS) if (path / name).is_file()), None)
    if weights is not None and not (path / MODEL_CONFIG).is_file():
        raise AdapterError(
            f"an adapter is a folder with {CONFIG_FILE} beside its weights; {path} has {weights} alone. Copy it whole."
        )


def _open_run(path: Path, offline: bool, progress: Progress | None) -> Subject:
    config = make_config(rundir.read_config(path))
    if not rundir.is_finished(path):
        raise ConfigError(f"the run must be finished; {path} is not. Finish it with `luthier resume {path}`.")
    offline = offline or config.offline
    adapter = None if config.method == "full" else path / rundir.ADAPTER
    base = str(path / rundir.MODEL) if adapter is None else config.model
    storage = None if adapter is None else config.storage
    loaded = load(base, base=storage, nf4=config.nf4_options, offline=offline, progress=progress)
    notes = [*loaded.notes, *(load_adapter(loaded.model, adapter).notes if adapter else [])]
    loaded.model.eval()
    name = path.resolve().name
    return Subject(loaded.model, loaded.tokenizer, loaded.source, name, base, adapter, path, config, offline, notes)


def _open_adapter(path: Path, base_model: str | None, offline: bool, progress: Progress | None) -> Subject:
    """An adapter folder on its base; one of mlx-lm is turned into PEFT's layout first."""
    mlx = is_mlx(path)
    base = base_model or (mlx_base_name(path) if mlx else _peft_base_name(path))
    if not base:
        raise ConfigError(f"an adapter is exported together with its base; {path} does not name one. Give it with --model.")
    base = ALIAS if base == HUB_NAME else base  # which also looks for the copy that needs no hub
    loaded, notes = _load_base_of(path, base, offline, progress)
    with TemporaryDirectory() as scratch:
        folder = to_peft_folder(path, loaded.model, Path(scratch) / "adapter") if mlx else path
        notes += load_adapter(loaded.model, folder).notes
    loaded.model.eval()
    name = path.resolve().name
    return Subject(loaded.model, loaded.tokenizer, loaded.source, name, base, path, offline=offline, notes=notes)


def _load_base_of(path: Path, base: str, offline: bool, progress: Progress | None) -> tuple[Loaded, list[str]]:
    """The base in NF4 where the adapter's record says that it was trained on that, otherwise as it is."""
    kinds = _recorded_kinds(path)
    if "nf4" not in kinds.values():
        loaded = load(base, offline=offline, progress=progress)
        return loaded, list(loaded.notes)
    skeleton = build_skeleton(open_weights(resolve(base, offline=offline, progress=progress).path)[0], base)
    linear = (name for name in linear_names(skeleton) if skeleton.get_submodule(name) is not skeleton.get_output_embeddings())
    options = NF4Options(skip_modules=tuple(name for name in linear if kinds.get(name, "nf4") != "nf4"))
    loaded = load(base, base="nf4", nf4=options, offline=offline, progress=progress)
    return loaded, [*loaded.notes, "The base is loaded in nf4, on which the adapter was trained."]


def _recorded_kinds(path: Path) -> dict[str, str]:
    """How each matrix was stored when the adapter was trained, empty where that is not recorded."""
    try:
        matrices = json.loads((path / BASE_FILE).read_text(encoding="utf-8"))["matrices"]
        return {str(name): str(entry["kind"]) for name, entry in matrices.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path / BASE_FILE} must be as it was saved; {error}. Copy the adapter again.") from error


def _peft_base_name(path: Path) -> str | None:
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path / CONFIG_FILE} must be readable JSON; {error}. Copy the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path / CONFIG_FILE} must hold one JSON object. Copy the adapter again.")
    name = content.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def load_original(subject: Subject, progress: Progress | None = None) -> Loaded | None:
    """The base with the weights it was published with, where the run trained on quantised copies of them, else None."""
    if subject.adapter is None or not any(_is_nf4(module) for module in subject.model.modules()):
        return None
    loaded = load(subject.base, offline=subject.offline, progress=progress)
    return None if any(_is_nf4(module) for module in loaded.model.modules()) else loaded


def _is_nf4(module: Any) -> bool:
    return getattr(module, "kind", None) == "nf4"


def rows_of(subject: Subject, data: str | None, count: int) -> list[Example]:
    """The first `count` rows of `data`, or of the run's held-out or training rows, rendered as the run rendered them.

    An empty list, with a note on the subject, where there are no rows to be had. Raises DataError for a `data` that
    cannot be read.
    """
    config = subject.config
    wanted = data or (None if config is None else config.eval_data or config.data)
    if wanted is None:
        subject.notes.append("There are no rows to compare on: an adapter or a model has no data of its own. Give --data.")
        return []
    length = config.max_length if config is not None else DEFAULT_MAX_LENGTH
    renderer = Renderer(subject.tokenizer, max_length=length, loss_on=config.loss_on if config is not None else "assistant")
    on_long = config.on_long if config is not None else "drop"
    # The run's rows were rendered and kept when it was trained.
    cache = RowCache(subject.notes.append) if data is None and config is not None and config.data_cache else None
    try:
        dataset = load_examples(wanted, renderer, on_long=on_long, offline=subject.offline, cache=cache)
    except DataError as error:
        if data is not None:
            raise
        subject.notes.append(f"The run's rows cannot be read any more, so nothing is compared on them: {error}")
        return []
    return dataset.examples[:count]


def _stem(target: str) -> str:
    path = Path(target).expanduser()
    return path.stem if path.suffix.lower() == ".gguf" else path.name or "model"
