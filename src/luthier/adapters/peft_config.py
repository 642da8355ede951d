"""adapter_config.json: PEFT's description of an adapter, read and written.

Field names and matching rules are those of PEFT 0.18 and later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from luthier.adapters.registry import Attached
from luthier.adapters.spec import ALL_LINEAR, AdapterSpec, matches, regex_error
from luthier.adapters.targets import all_linear, is_inside, low_rank_layers, module_names, named_by, shortest_names, tied_to
from luthier.errors import AdapterError, bulleted, one_line
from luthier.linear import LowRankEmbedding
from luthier.strict_json import read_json

CONFIG_FILE = "adapter_config.json"
WRITTEN_FOR_PEFT = "0.18.0"

# Fields that change what the adapter computes in ways that W + s B A, a magnitude and trained modules do not express.
REFUSED = {
    "layer_replication": "it repeats layers of the base model",
    "trainable_token_indices": "it trains single rows of the embedding (trainable tokens)",
    "target_parameters": "it adapts bare parameters, not layers",
    "alora_invocation_tokens": "it starts only after certain tokens (aLoRA)",
    "use_qalora": "it pools its inputs (QA-LoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it chooses among adapters by itself (Arrow)",
    "kasa_config": "it changes the base weights (KaSA)",
    "monteclora_config": "it samples its weights (MonteCLoRA)",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What the fields that are used must be, by field.
NUMBER, FLAG, MAPPING = "a number", "true or false", "a mapping"
NAMES, NAMES_OR_REGEX = "a list of names", "a list of names or a regular expression"
FIELD_KINDS = {
    "r": "a whole number",
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "use_rslora": FLAG,
    "use_dora": FLAG,
    "lora_bias": FLAG,
    "ensure_weight_tying": FLAG,
    "target_modules": NAMES_OR_REGEX,
    "exclude_modules": NAMES_OR_REGEX,
    "modules_to_save": NAMES,
    "layers_pattern": "a list of names or a name",
    "layers_to_transform": "a list of layer numbers or one",
    "rank_pattern": MAPPING,
    "alpha_pattern": MAPPING,
}
CHECKED = ("peft_type", "bias", "init_lora_weights")
WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_version", "revision", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size"),
    *("runtime_config", "velora_config"),
)
KNOWN = {*FIELD_KINDS, *CHECKED, *WITHOUT_EFFECT, *REFUSED}


@dataclass(frozen=True)
class PeftConfig:
    """The fields of adapter_config.json that decide what an adapter computes, and notes on those that do nothing."""

    spec: AdapterSpec
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_patterns: tuple[str, ...]
    lora_bias: bool
    base_name: str | None
    notes: list[str]


def read_config(folder: Path) -> PeftConfig:
    """Read and check `folder`/adapter_config.json.

    Raises AdapterError if it is missing or malformed, if the adapter is not a LoRA, or naming every field that asks for
    something that cannot be expressed here.
    """
    path = folder / CONFIG_FILE
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} must be readable JSON; {one_line(error)}. Copy the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} must hold one JSON object; it holds a {type(content).__name__}. Copy the adapter again.")
    problems = [*_unsupported(content), *_wrong_types(content)]
    if problems:
        raise AdapterError(f"the adapter must be a LoRA of linear layers and embeddings; {path}:\n{bulleted(problems)}")
    try:
        return _from_fields(content)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def _unsupported(content: dict[str, Any]) -> list[str]:
    kind = content.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {kind!r}; only 'LORA' is supported"]
    problems = [f"{field} is set: {reason}" for field, reason in REFUSED.items() if content.get(field)]
    if _field(content, "bias", "none") != "none":
        problems.append(f"bias is {content['bias']!r}: it trains biases of the base model")
    start = content.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        problems.append(f"init_lora_weights is {start!r}: it changed the base weights. Convert it to plain LoRA in PEFT first")
    return problems


def _wrong_types(content: dict[str, Any]) -> list[str]:
    problems = []
    for field, kind in FIELD_KINDS.items():
        value = content.get(field)
        if value is not None and not _is_kind(value, kind):
            problems.append(f"{field} must be {kind}; got {value!r}")
    patterns = content.get("layers_pattern") or []
    for pattern in [content.get("exclude_modules"), *(patterns if isinstance(patterns, list) else [patterns])]:
        if isinstance(pattern, str) and (error := regex_error(pattern) or regex_error(_layer_number_regex(pattern))):
            problems.append(f"{pattern!r} must be a regular expression; {error}")
    if content.get("target_modules") is None:
        problems.append("target_modules must be a list of names or a regular expression; it is missing")
    return problems


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "a whole number":
        return _is_whole(value)
    if kind == NUMBER:
        return _is_whole(value) or isinstance(value, float)
    if kind == FLAG:
        return isinstance(value, bool)
    if kind == MAPPING:
        return isinstance(value, dict)
    if kind == "a list of layer numbers or one":
        return _is_whole(value) or (isinstance(value, list) and all(_is_whole(item) for item in value))
    names = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return names or (kind != NAMES and isinstance(value, str))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _from_fields(content: dict[str, Any]) -> PeftConfig:
    variant = ("rs" if content.get("use_rslora") else "") + ("dora" if content.get("use_dora") else "lora")
    spec = AdapterSpec(
        rank=_field(content, "r", 8),
        alpha=_field(content, "lora_alpha", 8),
        dropout=_field(content, "lora_dropout", 0.0),
        variant=variant,
        targets=content["target_modules"],
        rank_pattern=_field(content, "rank_pattern", {}),
        alpha_pattern=_field(content, "alpha_pattern", {}),
        modules_to_save=_field(content, "modules_to_save", []),
        ensure_weight_tying=_field(content, "ensure_weight_tying", False),
    )
    layers = _field(content, "layers_to_transform", [])
    patterns = _field(content, "layers_pattern", [])
    exclude = _field(content, "exclude_modules", [])
    unknown = [field for field, value in content.items() if field not in KNOWN and value]
    base_name = content.get("base_model_name_or_path")
    return PeftConfig(
        spec=spec,
        exclude=exclude if isinstance(exclude, str) else tuple(exclude),
        layers=tuple(layers) if isinstance(layers, list) else (layers,),
        layers_patterns=tuple(patterns) if isinstance(patterns, list) else (patterns,),
        lora_bias=_field(content, "lora_bias", False),
        base_name=base_name if isinstance(base_name, str) and base_name else None,
        notes=[f"{CONFIG_FILE}: the field {field!r} is not known here and has no effect." for field in unknown],
    )


def _field(content: dict[str, Any], name: str, default: Any) -> Any:
    value = content.get(name)
    return default if value is None else value


def find_saved(model: nn.Module, config: PeftConfig) -> list[str]:
    """The modules that the adapter holds whole. PEFT takes the bare end of a name, and adds tied partners on request.

    Raises AdapterError if an entry matches nothing.
    """
    names = module_names(model)
    missing = [entry for entry in config.spec.modules_to_save if not any(name.endswith(entry) for name in names)]
    if missing:
        raise AdapterError(
            f"every entry of modules_to_save must match a module; nothing matches {', '.join(map(repr, missing))}."
        )
    found = [name for name in names if any(name.endswith(entry) for entry in config.spec.modules_to_save)]
    if config.spec.ensure_weight_tying:
        found += [other for name in found for other in tied_to(model).get(name, []) if other not in found]
    return [name for name in found if not is_inside(name, [other for other in found if other != name])]


def find_targets(model: nn.Module, config: PeftConfig, saved: Sequence[str]) -> list[str]:
    """The layers that carry a term, by PEFT's rules: exclusions first, then names or one expression, then layer numbers.

    Raises AdapterError if an entry of target_modules matches nothing.
    """
    layers = low_rank_layers(model)
    targets = config.spec.targets
    if targets == ALL_LINEAR:
        matching, missing = all_linear(model), []
    elif isinstance(targets, str):
        matching = [name for name in layers if matches(targets, name, whole=True)]
        missing = [] if matching else [targets]
    else:
        matching = [name for name in layers if named_by(name, targets)]
        missing = [entry for entry in targets if not any(named_by(name, [entry]) for name in layers)]
    if missing:
        raise AdapterError(
            f"every entry of target_modules must match a layer; nothing matches {', '.join(map(repr, missing))}. "
            "The adapter was made for another kind of model."
        )
    found = [
        name
        for name in matching
        if not _excluded(name, config.exclude) and not is_inside(name, saved) and _in_layers(name, config)
    ]
    if config.spec.ensure_weight_tying and not saved:
        found += [
            other for name in found if isinstance(layers[name], LowRankEmbedding) for other in tied_to(model).get(name, [])
        ]
    wanted = set(found)
    return [name for name in layers if name in wanted]


def _excluded(name: str, exclude: str | tuple[str, ...]) -> bool:
    return matches(exclude, name, whole=True) if isinstance(exclude, str) else named_by(name, exclude)


def _in_layers(name: str, config: PeftConfig) -> bool:
    """Whether the first layer number in the name is one of those asked for; whole names in target_modules always count."""
    if not config.layers or isinstance(config.spec.targets, str) or name in config.spec.targets:
        return True
    patterns = [_layer_number_regex(pattern) for pattern in config.layers_patterns] or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    match = next((found for pattern in patterns if (found := re.match(pattern, name))), None)
    return match is not None and int(match["layer"]) in config.layers


def _layer_number_regex(container: str) -> str:
    """What finds the number of a layer in a module's name, from the name of the list that holds the layers."""
    return rf"(?:^|.*?\.){container}\.(?P<layer>\d+)\."


def config_fields(
    model: nn.Module, adapter: Attached, base_name: str | None, *, transposed: bool, lora_bias: bool
) -> dict[str, Any]:
    """The content of adapter_config.json for an attached adapter; names are resolved, so that PEFT matches the same modules."""
    spec = adapter.spec
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": _whole(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": shortest_names(model, adapter.targets, list(adapter.saved)),
        "exclude_modules": None,
        "modules_to_save": list(adapter.saved) or None,
        "bias": "none",
        "lora_bias": lora_bias,
        "fan_in_fan_out": transposed,
        "use_rslora": spec.rank_stabilized,
        "use_dora": spec.has_magnitude,
        "init_lora_weights": True,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in spec.alpha_pattern.items()},
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        "trainable_token_indices": None,
        "target_parameters": None,
        "ensure_weight_tying": spec.ensure_weight_tying,
        "auto_mapping": None,
        "peft_version": WRITTEN_FOR_PEFT,
    }


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)
