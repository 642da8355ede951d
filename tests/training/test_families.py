"""What can be trained with --method lora can be trained with --method qlora: every family, one step each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, write_tiny
from tiny_runs import tiny_config

from luthier.adapters import AdapterSpec, attach
from luthier.matrices import NF4Matrix
from luthier.models.load import load
from luthier.training.load_run import load_target
from luthier.training.run import train

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.mark.parametrize("family", FAMILIES)
def test_qlora_trains_what_lora_trains(tmp_path: Path, family: str) -> None:
    """The same layers get terms, all of them and no others stand on 4-bit matrices, and a step moves every term."""
    model = write_tiny(tmp_path / "model", family, dtype=torch.bfloat16)
    targets = attach(load(str(model)).model, AdapterSpec(rank=4), seed=0).targets
    train(tiny_config(model, tmp_path, method="qlora", steps=1))
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in saved} == set(targets)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert all(tensor.any() for key, tensor in saved.items() if "lora_B" in key)
    tuned = load_target(str(tmp_path / "run")).model
    quantized = {name.removesuffix(".matrix") for name, module in tuned.named_modules() if isinstance(module, NF4Matrix)}
    assert quantized == set(targets)
