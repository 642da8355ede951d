"""Luthier fine-tunes, compresses and ships language models on the machine you have.

    import luthier

    model, tokenizer = luthier.load("smollm2-135m")
    luthier.attach(model, luthier.AdapterSpec(rank=16))
    ...                                       # any training loop, HF Trainer and TRL included
    luthier.save_adapter(model, "adapter")    # opens in PEFT

    luthier.train(luthier.RunConfig(data="train.jsonl"))    # or the whole run in one call

The names below are imported at their first use, so that `import luthier` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.adapters import AdapterSpec, attach, detach, disabled, load_adapter, save_adapter
    from luthier.config import RunConfig
    from luthier.errors import LuthierError
    from luthier.models.load import load
    from luthier.training.run import resume, train

__version__ = "0.1.0"

__all__ = [
    "AdapterSpec",
    "LuthierError",
    "RunConfig",
    "__version__",
    "attach",
    "detach",
    "disabled",
    "load",
    "load_adapter",
    "resume",
    "save_adapter",
    "train",
]

_HOME = {
    "AdapterSpec": "luthier.adapters",
    "LuthierError": "luthier.errors",
    "RunConfig": "luthier.config",
    "attach": "luthier.adapters",
    "detach": "luthier.adapters",
    "disabled": "luthier.adapters",
    "load": "luthier.models.load",
    "load_adapter": "luthier.adapters",
    "resume": "luthier.training.run",
    "save_adapter": "luthier.adapters",
    "train": "luthier.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
