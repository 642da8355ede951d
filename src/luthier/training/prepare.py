"""From a configuration to everything a run needs: data and model read and checked, the adapter attached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from luthier.adapters import AdapterSpec, Start, attach, train_everything, trainable_parameters
from luthier.config import DEFAULT_MODEL, RunConfig
from luthier.data import Dataset, Renderer, RowCache, load_examples, overlap
from luthier.data.read import open_source
from luthier.errors import ConfigError, PreflightError
from luthier.linear import LowRankTerm, count_numbers
from luthier.matrices import GGUFMatrix, NF4Matrix
from luthier.models.load import Loaded, check_finite, fingerprint, load, load_tokenizer
from luthier.models.smollm2 import HUB_NAME
from luthier.models.source import ModelSource
from luthier.training.depth import frozen_layers, refuse_cache, refuse_entry
from luthier.training.events import Listener
from luthier.training.initial import make_start
from luthier.training.optimizer import device_of
from luthier.training.schedule import (
    CHECKPOINTS_A_RUN,
    DEFAULT_EPOCHS,
    EVALUATIONS_A_RUN,
    Schedule,
    default_interval,
    default_learning_rate,
    make_schedule,
    total_examples,
    total_steps,
)
from luthier.training.state import Identity


@dataclass
class RunData:
    """The rows of a run, rendered with the model's tokenizer."""

    renderer: Renderer
    train: Dataset
    held_out: Dataset | None

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held-out rows included."""
        sets = [self.train, *([self.held_out] if self.held_out else [])]
        return max(len(example.ids) for dataset in sets for example in dataset.examples)

    def manifest(self) -> dict[str, Any]:
        """What data_manifest.json holds."""
        return {"train": self.train.manifest, "eval": self.held_out.manifest if self.held_out else None}


@dataclass
class RunModel:
    """The model with what is to be trained on it, and the configuration with every default resolved.

    start: what its terms start from, until that is kept in the run's folder; initial_sha256: of it, empty without one.
    """

    model: Any
    tokenizer: Any
    config: RunConfig
    schedule: Schedule
    base_name: str
    fingerprint: str
    start: Start | None = None
    initial_sha256: str = ""
    trainable: list[tuple[str, nn.Parameter]] = field(default_factory=list)

    @property
    def trainable_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.trainable)

    @property
    def frozen_layers(self) -> int:
        """The decoder layers, from the first one, that no gradient has to reach."""
        return frozen_layers(self.model, [name for name, _ in self.trainable])

    @property
    def total_parameters(self) -> int:
        """Numbers in the model, shared ones once, what was attached included."""
        return count_numbers(self.model)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with local data and model paths made absolute, so that a run can go on from any folder."""
    changed = {}
    for key in ("data", "eval_data", "model"):
        name = getattr(config, key)
        if name is not None and not (key == "model" and name == DEFAULT_MODEL) and Path(name).expanduser().exists():
            changed[key] = str(Path(name).expanduser().resolve())
    return config.model_copy(update=changed)


def check_data_is_there(config: RunConfig) -> None:
    """Raise DataError, before anything is loaded, if the data is not there or is of a kind that cannot be read."""
    for name in (config.data, config.eval_data):
        if name is not None:
            open_source(name, offline=config.offline)


def read_data(config: RunConfig, listener: Listener) -> RunData:
    """Read and render the rows of `config.data` and `config.eval_data`, or take them from the cache as they were rendered
    before. Needs the tokenizer, not the model.

    Raises DataError for rows that cannot be used; says how many held-out rows are also trained on.
    """
    tokenizer = load_tokenizer(config.model, offline=config.offline, progress=listener.stage)
    renderer = Renderer(tokenizer, max_length=config.max_length, loss_on=config.loss_on)
    listener.stage("reading the data", 0, 0)
    cache = RowCache(listener.note) if config.data_cache else None
    train = load_examples(config.data, renderer, on_long=config.on_long, offline=config.offline, cache=cache)
    held_out = None
    if config.eval_data:
        held_out = load_examples(config.eval_data, renderer, on_long=config.on_long, offline=config.offline, cache=cache)
    for dataset in (train, held_out):
        for note in dataset.manifest.get("notes", ()) if dataset else ():
            listener.note(note)
    if held_out is not None and (shared := overlap(train, held_out)):
        listener.note(
            f"{shared} of {len(held_out.examples)} held-out rows are also in the training data: their score says how well the "
            "model remembers, not how well it generalises."
        )
    return RunData(renderer, train, held_out)


def read_model(
    config: RunConfig,
    data: RunData,
    listener: Listener,
    *,
    moments_bytes: int = 0,
    refuse_base: Callable[[str], None] | None = None,
    start: Start | None = None,
) -> RunModel:
    """Load the model, check it against the data, and make ready what is to be trained.

    moments_bytes: what measuring the layers' inputs may hold, where the init does. refuse_base(fingerprint) may raise where
    the run goes on and this is not its base model; start: what its terms started from then, None where that is made anew.
    Raises ModelError, AdapterError, PreflightError.
    """
    loaded = _load_checked(config, data, listener)
    model, base = loaded.model, fingerprint(loaded.model)
    if refuse_base is not None:
        refuse_base(base)
    config = _resolved(config, model, len(data.train.examples))
    schedule = _schedule(config, len(data.train.examples))
    if start is None and config.init != "default":
        start = make_start(model, loaded.source.path, config, adapter_spec(config), data.train, moments_bytes, listener)
    prepared = RunModel(model, loaded.tokenizer, config, schedule, _base_name(loaded.source), base, start)
    prepared.initial_sha256 = "" if start is None else start.sha256()
    for note in _make_trainable(model, config, start):
        listener.note(note)
    nn.Module.to(model, device_of(config))  # what the adapter begins with was drawn on the CPU, and is the same everywhere
    prepared.trainable = trainable_parameters(model)
    if config.cache_frozen:
        rows = len(data.train.examples)
        refuse_cache(prepared.frozen_layers, total_examples(config, rows), rows)
        refuse_entry(model)
    return prepared


def _load_checked(config: RunConfig, data: RunData, listener: Listener) -> Loaded:
    """The base model as the configuration stores it, every number finite, its vocabulary and positions enough for the rows."""
    loaded = load(config.model, base=config.storage, nf4=config.nf4_options, offline=config.offline, progress=listener.stage)
    for note in loaded.notes:
        listener.note(note)
    check_finite(loaded.model)
    _check_method_fits(config, loaded.model)
    check_rows_fit(loaded.model, data)
    return loaded


def identity_of(prepared: RunModel, data: RunData) -> Identity:
    """What a checkpoint of this run says of itself."""
    held_out = data.held_out.manifest["sha256"] if data.held_out else None
    config = prepared.config.model_dump(mode="json")
    return Identity(config, data.train.manifest["sha256"], held_out, prepared.fingerprint, prepared.initial_sha256)


def set_training_mode(model: nn.Module) -> None:
    """Only the low-rank terms are in training mode, which is what switches their dropout on; a base model's own dropout
    stays off, as in evaluation."""
    model.eval()
    for module in model.modules():
        if isinstance(module, LowRankTerm):
            module.train()


def _check_method_fits(config: RunConfig, model: nn.Module) -> None:
    """Raise ConfigError if method qlora was to train on blocks as they are and the model has none."""
    if config.method == "qlora" and not any(isinstance(module, (NF4Matrix, GGUFMatrix)) for module in model.modules()):
        raise ConfigError(
            f"--method qlora --base asis trains on a model that is quantized already; {config.model} is not. "
            "Leave --base out, and it is quantized while loading."
        )


def _base_name(source: ModelSource) -> str:
    """What an adapter calls its base, so that PEFT finds it: the hub's name, or the path of a local model."""
    if source.kind == "alias":
        return HUB_NAME
    return source.name if source.kind == "hub" else str(source.path)


def _make_trainable(model: nn.Module, config: RunConfig, start: Start | None) -> list[str]:
    """Attach the adapter, or make every weight trainable; returns what the person should know."""
    if config.method == "full":
        train_everything(model)
        return []
    return attach(model, adapter_spec(config), seed=config.seed, start=start).notes


def adapter_spec(config: RunConfig) -> AdapterSpec:
    """The adapter that the configuration describes."""
    return AdapterSpec(
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        variant=config.variant,
        targets=config.targets,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        modules_to_save=tuple(config.modules_to_save),
    )


def _resolved(config: RunConfig, model: Any, rows: int) -> RunConfig:
    """Every key that was left to a rule, filled in."""
    steps = total_steps(config, rows)
    filled: dict[str, Any] = {}
    if config.learning_rate is None:
        filled["learning_rate"] = default_learning_rate(int(model.config.hidden_size), config.method, steps)
    if config.epochs is None and config.steps is None:
        filled["epochs"] = DEFAULT_EPOCHS
    if config.save_every is None:
        filled["save_every"] = default_interval(steps, CHECKPOINTS_A_RUN)
    if config.eval_every is None and config.eval_data is not None:
        filled["eval_every"] = default_interval(steps, EVALUATIONS_A_RUN)
    return config.model_copy(update=filled)


def _schedule(config: RunConfig, rows: int) -> Schedule:
    assert config.learning_rate is not None
    return make_schedule(config, config.learning_rate, total_steps(config, rows))


def check_rows_fit(model: Any, data: RunData) -> None:
    """Raise PreflightError if a token or a position of the data does not exist in the model."""
    vocabulary = model.get_input_embeddings().num_embeddings
    sets = [data.train, *([data.held_out] if data.held_out else [])]
    for example in (example for dataset in sets for example in dataset.examples):
        largest = max(*example.ids, *example.prompt_ids, 0)
        if largest >= vocabulary:
            raise PreflightError(
                f"token ids must be below the model's vocabulary of {vocabulary}; {example.where} has {largest}. "
                "The tokenizer does not belong to this model; use the folder they came in."
            )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and data.longest > positions:
        raise PreflightError(
            f"rows must fit the model's {positions} positions; the longest has {data.longest} tokens. "
            f"Try --max-length {positions} --on-long truncate."
        )
