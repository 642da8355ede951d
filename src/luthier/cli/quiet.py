"""Keeps the chatter of libraries out of a person's terminal; errors still arrive as exceptions."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence progress bars and advice of the libraries below; call before they are first imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which PEFT imports: kernels that it would like to have
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
