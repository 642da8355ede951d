"""Adapters: low-rank terms on a loaded model, attached, trained, saved and loaded in PEFT's layout."""

from luthier.adapters.attachment import attach, detach, disabled
from luthier.adapters.full import save_full, train_everything
from luthier.adapters.peft_format import load_adapter, save_adapter
from luthier.adapters.registry import AttachReport
from luthier.adapters.spec import AdapterSpec
from luthier.adapters.start import Start
from luthier.adapters.state import adapter_state, set_adapter_state, trainable_parameters

__all__ = [
    "AdapterSpec",
    "AttachReport",
    "Start",
    "adapter_state",
    "attach",
    "detach",
    "disabled",
    "load_adapter",
    "save_adapter",
    "save_full",
    "set_adapter_state",
    "train_everything",
    "trainable_parameters",
]
