"""Training every weight, the reference that adapters are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from luthier.adapters.files import staged_folder
from luthier.adapters.registry import attached, mark_trains_everything
from luthier.adapters.state import check_finite_tensors, full_state, trainable_parameters
from luthier.adapters.widen import Widener
from luthier.errors import AdapterError
from luthier.matrices import NF4Matrix

# What Transformers and its tokenizers write into a model folder.
MODEL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "vocab.json",
        "merges.txt",
    }
)


def train_everything(model: nn.Module) -> int:
    """Make every weight a float32 parameter that trains, and return how many numbers that is.

    Stored matrices are replaced by float32 copies one at a time; layers that shared a matrix share its copy.
    `trainable_parameters`, `adapter_state` and `set_adapter_state` then mean all weights. Blocks of a GGUF file are
    widened like any other storage. Raises AdapterError if an adapter is attached, or weights are in NF4.
    """
    if attached(model):
        raise AdapterError(
            f"a model trains everything or adapters, not both; attached: {', '.join(attached(model))}. Detach first."
        )
    _refuse_nf4(model)
    Widener().widen(model)
    mark_trains_everything(model)
    return sum(parameter.numel() for _, parameter in trainable_parameters(model))


def _refuse_nf4(model: nn.Module) -> None:
    """Weights were put into NF4 so as to stay frozen: to train them all, their unquantised originals are the start."""
    names = [name.removesuffix(".matrix") for name, module in model.named_modules() if isinstance(module, NF4Matrix)]
    if names:
        raise AdapterError(
            f"training every weight starts from weights as they were trained; {len(names)} matrices are stored in nf4, "
            f"{names[0]} the first. Load the original model, or train an adapter: --method qlora."
        )


def save_full(model: Any, folder: str | Path, tokenizer: Any = None) -> Path:
    """Write all weights as a Transformers folder in safetensors, with the tokenizer if given, and return the folder.

    Names, layouts and tied weights are the checkpoint's, so that plain Transformers opens it with equal logits.
    Raises AdapterError if an adapter is attached, NumericError if a weight holds NaN or Inf.
    """
    if attached(model):
        raise AdapterError(
            f"a model is saved in full without adapters; attached: {', '.join(attached(model))}. Use save_adapter, or detach."
        )
    check_finite_tensors(full_state(model), "a model that is saved")
    target = Path(folder)
    with staged_folder(target, MODEL_FILES) as stage:
        model.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
    return target
