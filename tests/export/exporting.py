"""What the tests of exports share: adapters with random weights on tiny models, and comparing logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft_pair import logits, randomize, relative
from tiny import write_tiny

import luthier
from luthier.adapters import AdapterSpec, attach, load_adapter, save_adapter, trainable_parameters

__all__ = ["adapted", "logits", "ours", "relative", "row_file"]

ROWS = ("paint the wall red", "paint the door blue", "open the lamp", "close a cup")


def adapted(tmp_path: Path, family: str = "llama", *, tied: bool | None = None, model: Path | None = None, **spec: Any) -> Path:
    """An adapter folder with random weights on a tiny model beside it, which its config names."""
    folder = model or write_tiny(tmp_path / "model", family, tied)
    loaded, _ = luthier.load(str(folder))
    attach(loaded, AdapterSpec(rank=4, alpha=8, **spec), seed=1)
    with torch.no_grad():
        randomize([parameter for _, parameter in trainable_parameters(loaded)])
    return save_adapter(loaded, tmp_path / "adapter", base_name=str(folder))


def ours(tmp_path: Path, adapter: Path | None = None) -> Any:
    """The tiny model with the adapter on it, as it was trained."""
    model, _ = luthier.load(str(tmp_path / "model"))
    load_adapter(model, adapter or tmp_path / "adapter")
    return model


def row_file(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{row}", "completion": "{row[::-1]}"}}\n' for row in ROWS))
    return str(path)
