"""The same tiny model twice, once loaded here and once by Transformers, and adapters with random weights on either."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tiny import write_tiny
from torch import nn
from transformers import AutoModelForCausalLM

import luthier

IDS = torch.arange(3, 40)[None]


def write_model(folder: Path, family: str, tied: bool | None = None) -> Path:
    return write_tiny(folder, family, tied)


def ours(folder: Path) -> nn.Module:
    model, _ = luthier.load(str(folder))
    return model


def plain(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_peft(folder: Path, adapter: Path) -> nn.Module:
    """The Transformers model with a saved adapter, opened by PEFT; anything PEFT has to say about its keys is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected).*")
        return PeftModel.from_pretrained(plain(folder), adapter).eval()


def made_by_peft(folder: Path, adapter: Path, **settings) -> torch.Tensor:
    """Save an adapter that PEFT made, every tensor random, and return the logits it gives."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(plain(folder), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        randomize([parameter for parameter in model.parameters() if parameter.requires_grad])
        expected = logits(model)
        model.save_pretrained(adapter)
    return expected


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def randomize(parameters) -> None:
    """Move every parameter by something of its own size, the same for the same list of shapes."""
    generator = torch.Generator().manual_seed(7)
    for parameter in parameters:
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        parameter += noise * (0.1 if parameter.ndim == 1 else 0.05)


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())
