"""The tokenizer of a Transformers folder, or of a GGUF file, converted once and cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from luthier.errors import ModelError
from luthier.models.cache import cache_folder, discard, is_whole, publish, seal
from luthier.models.gguf_file import GGUFFile
from luthier.models.gguf_tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

# Part of the cache's key; raised when build_tokenizer makes something else of the same metadata, or of its folder.
CONVERSION = 2


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, its own code never run, padding on the right; without a padding token, with eos as it.

    Raises ModelError if its files are missing or damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare Exception for a damaged tokenizer.json.
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(
            f"the folder must hold a whole tokenizer (tokenizer.json, tokenizer_config.json); {folder}: {reason}. "
            "Download the model again."
        ) from error
    return _finished(tokenizer)


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file. The first call converts it and keeps it in the cache, under a hash of the metadata.

    One that is damaged there is removed and converted again, which the log says.
    Raises ModelError if the metadata holds no whole tokenizer, PreflightError if the cache cannot be written to.
    """
    folder = cache_folder("tokenizers") / _key(file)
    if os.path.lexists(folder):
        if is_whole(folder):
            try:
                return read_tokenizer(folder)
            except ModelError:  # a seal over something that was never written here
                pass
        logger.warning("The tokenizer kept in %s was damaged; it is removed and converted again.", folder)
        discard(folder)
    try:
        tokenizer = build_tokenizer(file)
    except ModelError:
        raise
    except Exception as error:
        # The tokenizers library raises bare Exception, or PanicException's base, for lists it cannot use.
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ModelError(f"{file.path} does not hold a tokenizer that can be used: {reason}. Download it again.") from error
    with publish(folder) as stage:
        tokenizer.save_pretrained(stage)
        seal(stage)
    return read_tokenizer(folder)


def _key(file: GGUFFile) -> str:
    """sha256 of everything that decides the tokenizer."""
    embedding = file.tensors.get("token_embd.weight")
    content = {
        key: value for key, value in file.metadata.items() if key.startswith("tokenizer.") or key == "general.architecture"
    }
    content |= {"conversion": CONVERSION, "rows": embedding.shape[0] if embedding else None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finished(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
