"""The configuration of a run: one strict schema, every default stated once.

Precedence: defaults < config file < flags. An unknown key is an error that names the nearest known key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from luthier.errors import ConfigError, bulleted, nearest
from luthier.units import parse_size

DEFAULT_MODEL = "smollm2-135m"
Storage = Literal["f32", "bf16", "f16", "nf4", "asis"]
Variant = Literal["lora", "rslora", "dora"]
Init = Literal["default", "pissa", "eva", "loftq", "qera"]
ADAPTER_KEYS = (
    *("base", "variant", "init", "init_tokens", "rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern"),
    "modules_to_save",
)
REPAIRS, MEASURED_INITS = ("loftq", "qera"), ("eva", "qera")
NF4_KEYS = ("double_quant", "skip_modules", "cache_quantized")
EVALUATION_KEYS = ("eval_every", "eval_rows", "samples", "max_new_tokens")


@dataclass(frozen=True)
class NF4Options:
    """How weights go to NF4: scales in 8 bits or in 32, which linear layers stay out, and whether the result is kept.

    skip_modules: names of modules, whole or their end after a dot; the head stays out always. cache: keep the quantised
    weights in the cache and map them from there the next time.
    """

    double_quant: bool = True
    skip_modules: tuple[str, ...] = ()
    cache: bool = False


class RunConfig(BaseModel):
    """Everything that decides what a training run does.

    Raises pydantic's ValidationError on direct construction; `make_config` turns that into one ConfigError.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # what goes in and where it goes
    data: str
    eval_data: str | None = None
    model: str = DEFAULT_MODEL
    base: Storage | None = Field(
        None, description="how the frozen weights are stored; default: as the checkpoint has them, or nf4 with method qlora"
    )
    double_quant: bool = Field(True, description="nf4: scales in 8 bits instead of 32")
    skip_modules: list[str] = Field(
        default_factory=list, description="nf4: linear layers that stay as they are, as the head does"
    )
    cache_quantized: bool = Field(False, description="nf4: keep the quantised weights in the cache for the next run")
    out: str | None = Field(None, description="run directory; default: runs/<date>-<time>-<data>")
    offline: bool = False
    memory: str | None = Field(None, description="what the process may hold, such as 6GB; default: 80 % of what is free")

    # the adapter
    method: Literal["lora", "qlora", "full"] = "lora"
    variant: Variant = "lora"
    init: Init = Field(
        "default",
        description="what terms begin with. default: A random, B = 0; pissa: the weights' principal part; eva: the main "
        "directions of the layers' inputs; loftq, qera: a repair of what nf4 took away, qera measured on the inputs",
    )
    init_tokens: int = Field(16384, ge=1, description="eva, qera: tokens of training rows that inputs are measured on")
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of the low-rank terms")
    targets: str | list[str] = Field(
        "all-linear", description="'all-linear', a list of module names, or one regular expression"
    )
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    modules_to_save: list[str] = Field(default_factory=list, description="modules trained whole, beside the low-rank terms")

    # the data
    max_length: int = Field(1024, ge=8, description="tokens in one row, template included")
    on_long: Literal["error", "drop", "truncate"] = "error"
    loss_on: Literal["assistant", "all"] = "assistant"
    data_cache: bool = Field(True, description="keep rendered rows in the cache, so that the same data is tokenized once")

    # the optimisation
    learning_rate: float | None = Field(
        None, gt=0, description="default: from the hidden size and the steps, see training/schedule.py"
    )
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1, description="examples in one optimiser step")
    micro_batch_tokens: int | None = Field(
        None, ge=8, description="tokens in one forward pass, at most; a longer row goes alone; default: what fits, up to 2048"
    )
    recompute_layers: int | None = Field(
        None, ge=0, description="layers whose activations are computed again in backward; default: as many as memory asks for"
    )
    cache_frozen: bool = Field(
        False, description="keep what goes into the lowest trained layer on disk, so that the layers below it run once a row"
    )
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    optimizer: Literal["adamw", "paged_adamw"] = Field("adamw", description="paged_adamw: bitsandbytes' own, on CUDA")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    seed: int = Field(0, ge=0, lt=2**63)

    # evaluation, checkpoints
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: five times a run")
    eval_rows: int | None = Field(None, ge=1, description="rows of eval_data that are evaluated; default: all")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; default: ten times a run")
    keep_checkpoints: int = Field(2, ge=1)
    samples: int = Field(3, ge=0, description="eval rows answered before and after, for the report")
    max_new_tokens: int = Field(128, ge=1, description="longest generated answer in evaluation")

    @field_validator("alpha", "learning_rate", "epochs")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise ValueError("must be a finite number")
        return value

    @field_validator("memory")
    @classmethod
    def _a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_positive(cls, value: dict[str, int]) -> dict[str, int]:
        for pattern, rank in value.items():
            if rank < 1:
                raise ValueError(f"rank for {pattern!r} must be at least 1")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas_positive(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, alpha in value.items():
            if not alpha > 0:
                raise ValueError(f"alpha for {pattern!r} must be above 0")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    @model_validator(mode="after")
    def _qlora_in_few_bits(self) -> RunConfig:
        if self.method == "qlora" and self.base not in (None, "nf4", "asis"):
            raise ValueError(
                f"method qlora trains on a base in 4 bits, nf4 or asis (a quantized model as it is); base is {self.base}. "
                "Leave base out, or use method lora"
            )
        return self

    @model_validator(mode="after")
    def _init_has_what_it_needs(self) -> RunConfig:
        if self.init in REPAIRS and self.storage != "nf4":
            raise ValueError(
                f"init {self.init} repairs what quantizing takes away; the base is not quantized while loading. "
                "Use method qlora without base, or another init"
            )
        if self.init == "pissa" and self.variant == "dora":
            raise ValueError(
                "init pissa takes the terms' start off the weights again, and the lengths of dora's rows are those of weights "
                "with the term alone. Use variant lora or rslora, or another init"
            )
        if self.init not in MEASURED_INITS and (changed := self._changed(("init_tokens",))):
            raise ValueError(f"init {self.init} measures no inputs; {changed} would do nothing. Leave it out")
        return self

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> RunConfig:
        """Refuse a setting that the method or the lack of evaluation data would leave without effect."""
        if self.method == "full" and (changed := self._changed(ADAPTER_KEYS)):
            raise ValueError(
                f"method full trains every weight in float32, without an adapter; {changed} would do nothing. Leave it out"
            )
        if self.method == "full" and self.cache_frozen:
            raise ValueError("method full trains every layer; cache_frozen would keep nothing. Leave it out")
        if self.storage != "nf4" and (changed := self._changed(NF4_KEYS)):
            raise ValueError(
                f"only a base in nf4 is quantized while loading; {changed} would do nothing. Use method qlora or leave it out"
            )
        if self.eval_data is None and (changed := self._changed(EVALUATION_KEYS)):
            raise ValueError(
                f"without eval_data nothing is evaluated; {changed} would do nothing. Give eval_data or leave it out"
            )
        return self

    @property
    def storage(self) -> Storage | None:
        """How the frozen weights are to be stored, the method's own choice included; None: as the checkpoint has them."""
        return "nf4" if self.method == "qlora" and self.base is None else self.base

    @property
    def nf4_options(self) -> NF4Options:
        """The keys that say how weights go to NF4."""
        return NF4Options(self.double_quant, tuple(self.skip_modules), self.cache_quantized)

    def _changed(self, keys: tuple[str, ...]) -> str:
        """Those of `keys` that differ from their defaults, separated by commas."""
        fields = type(self).model_fields
        return ", ".join(key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True))


KNOWN_KEYS = tuple(RunConfig.model_fields)


def read_config_file(path: Path) -> dict[str, Any]:
    """The keys of a YAML config file. Raises ConfigError if it is missing or is not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the config file must be readable UTF-8; {path}: {error}. Check the path given to --config."
        ) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file must be valid YAML; {path}: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"a config file holds `key: value` lines; {path} holds a {type(content).__name__}.")
    return {str(key): value for key, value in content.items()}


def parse_assignment(text: str) -> tuple[str, Any]:
    """`key=value` of --set, the value read as YAML: `rank=8`, `targets=[q_proj, v_proj]`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value; got {text!r}. Try --set rank=8.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key.strip()}: the value must be valid YAML; got {value!r}.") from error


def make_config(*layers: Mapping[str, Any]) -> RunConfig:
    """Merge layers of keys, later ones winning, and check the whole. Raises one ConfigError naming every problem."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
    try:
        return RunConfig(**merged)
    except ValidationError as error:
        problems = [_describe(item) for item in error.errors()]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    raise ConfigError("the configuration has problems:\n" + bulleted(problems))


def _describe(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}.{nearest(key, KNOWN_KEYS)} `luthier train --help` lists them all."
    if item["type"] == "missing":
        return f"{key} is needed."
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    prefix = f"{key} must be " if item["type"] != "value_error" else (f"{key}: " if key else "")
    return f"{prefix}{message}" + (f"; got {item['input']!r}." if key and "; got " not in message else ".")
