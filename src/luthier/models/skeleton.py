"""The Transformers model of a configuration, without its weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from luthier.adapters.peft_config import CONFIG_FILE as ADAPTER_CONFIG_FILE
from luthier.errors import ModelError, nearest, one_line
from luthier.models.compressed_description import DESCRIPTION_FILE
from luthier.models.nf4_checkpoint import COMPRESSED_METHOD, check_quantization
from luthier.strict_json import read_json

CONFIG_FILE = "config.json"
RUN_FILE = "config.resolved.yaml"  # what makes a folder a run's
CONFIG_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StrictDataclassError)
BUILD_ERRORS = (*CONFIG_ERRORS, RuntimeError, AssertionError, ImportError, MemoryError)
MAX_LAYERS = 1024
MAX_SIZE = 1 << 24
MAX_POSITIONS = 1 << 31
MAX_LAYERS_TIMES_SIZE = 1 << 24  # a model of 405 billion parameters has 126 layers of 53,248 features: 6.7 million
MAX_BUFFER_BYTES = 1 << 30
# Which code computes is never the checkpoint's affair: these may name code on the hub that Transformers would fetch and run.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation", "use_kernels", "kernel_config")


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`/config.json. Code named by `auto_map` is never run.

    Raises ModelError if the file is not JSON, its model_type is unknown, or it is of a kind that is not supported.
    """
    require_config(folder)
    path = folder / CONFIG_FILE
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} must be readable JSON; {one_line(error)}. Download the model again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold one JSON object; it holds a {type(content).__name__}. Download the model again.")
    settings = content.get("quantization_config")
    named = isinstance(settings, dict) and settings.get("quant_method") == COMPRESSED_METHOD
    if named and not (folder / DESCRIPTION_FILE).is_file():
        raise ModelError(f"a compressed model has {DESCRIPTION_FILE} beside its weights; {folder} has none. Copy it again.")
    return make_config(content, str(path))


def require_config(folder: Path) -> None:
    """Raise ModelError, saying what to give instead, where a folder has no config.json and so is no model's."""
    if not os.path.lexists(folder / CONFIG_FILE):
        raise ModelError(f"a model folder holds {CONFIG_FILE}; {folder} does not. {_what_to_give(folder)}")


def _what_to_give(folder: Path) -> str:
    """What a person who named a folder that holds no model may have meant."""
    if (folder / RUN_FILE).is_file():
        return f"It is a run: give what `luthier export {folder} --to merged --out NEW` writes."
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return "It is an adapter: give the model that it was trained on, or what `luthier export RUN --to merged` writes."
    inside = sorted(str(path) for path in folder.iterdir() if path.suffix == ".gguf" or (path / CONFIG_FILE).is_file())
    return f"In it there are {', '.join(inside[:3])}." if inside else "Check the path, or download the model again."


def make_config(content: dict[str, Any], where: str) -> PretrainedConfig:
    """A Transformers configuration from its keys, `model_type` among them. `where` names the file in errors.

    A quantization_config is checked and left out: how weights are stored is the matrices' affair.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        hint = nearest(str(kind), list(CONFIG_MAPPING.keys())) if kind else " Every Transformers model has one."
        code = " It asks to run its own code (auto_map), which is never done." if "auto_map" in content else ""
        raise ModelError(f"{where}: model_type must be one Transformers knows; got {kind!r}.{code}{hint}")
    check_quantization(content, where)
    keys = _without_implementations(content, ("auto_map", "quantization_config"))
    try:
        config = CONFIG_MAPPING[kind].from_dict(keys)
    except CONFIG_ERRORS as error:
        raise ModelError(f"{where} is not a valid {kind} configuration; {_named(error)}. Download the model again.") from error
    _check_kind(config, kind, where)
    _check_sizes(config, where)
    return config


def _without_implementations(content: dict[str, Any], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a configuration, and of those inside it, that describe the model."""
    return {
        key: _without_implementations(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in left_out and not str(key).lstrip("_").startswith(IMPLEMENTATIONS)
    }


def _check_kind(config: PretrainedConfig, kind: str, where: str) -> None:
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and "vision_config" not in config.sub_configs:
        return
    if "text_config" in config.sub_configs:
        raise ModelError(
            f"{where}: the model must be of text alone; {kind} also takes images or sound. Use a text-only model of "
            "that family."
        )
    raise ModelError(f"{where}: the model must be one that continues text (a causal language model); {kind} is not.")


def _check_sizes(config: PretrainedConfig, where: str) -> None:
    """Refuse sizes that no model has before anything is built from them."""
    limits = {"num_hidden_layers": MAX_LAYERS, "hidden_size": MAX_SIZE, "vocab_size": MAX_SIZE, "num_attention_heads": MAX_SIZE}
    limits |= {"intermediate_size": MAX_SIZE, "num_key_value_heads": MAX_SIZE, "head_dim": MAX_SIZE}
    limits |= {"max_position_embeddings": MAX_POSITIONS}
    for key, limit in limits.items():
        size = getattr(config, key, None)
        if size is not None and (not isinstance(size, int) or not 1 <= size <= limit):
            raise ModelError(f"{where}: {key} must be between 1 and {limit}; got {size!r}. Download the model again.")
        # Norms and biases are made in earnest, in every layer.
        layers = getattr(config, "num_hidden_layers", None) or 1
        once = key in ("num_hidden_layers", "vocab_size", "max_position_embeddings")
        if size is not None and not once and size * layers > MAX_LAYERS_TIMES_SIZE:
            raise ModelError(f"{where}: {layers} layers of {key} {size} are more than any model has. Download the model again.")
    for share in _rotary_shares(getattr(config, "rope_parameters", None)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ModelError(f"{where}: partial_rotary_factor must be above 0 and at most 1; got {share!r}.")


def _rotary_shares(parameters: Any) -> Iterator[Any]:
    """Every partial_rotary_factor in rotary settings, which some families have for each kind of layer."""
    for key, value in parameters.items() if isinstance(parameters, dict) else ():
        if isinstance(value, dict):
            yield from _rotary_shares(value)
        elif key == "partial_rotary_factor":
            yield value


class _EmptyOnMeta(TorchFunctionMode):
    """Makes torch.empty allocate nothing. Modules make their weights with it; computed buffers are made otherwise.

    Raises ValueError for a buffer of more than MAX_BUFFER_BYTES, before it is made.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        elif func in (torch.ones, torch.zeros, torch.full, torch.arange):
            size_bytes = func(*args, **(kwargs | {"device": "meta"})).nbytes
            if size_bytes > MAX_BUFFER_BYTES:
                raise ValueError(f"it asks for a computed buffer of {size_bytes} bytes, more than any model has")
        return func(*args, **kwargs)


def build_skeleton(config: PretrainedConfig, where: str) -> PreTrainedModel:
    """The causal language model of `config`: weights on the meta device, buffers such as rotary frequencies real.

    Takes no random numbers and no memory to speak of. Raises ModelError where the configuration contradicts itself.
    """
    config.dtype = torch.float32
    try:
        with _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise ModelError(f"{where}: no model can be built from this configuration; {_named(error)}.") from error
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ModelError(f"{where}: {config.model_type} models are not supported; buffer {name} has no value.")
    return model.eval()


def _named(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")
