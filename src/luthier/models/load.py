"""Load a model and its tokenizer from wherever they are, within the memory of one copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier.config import NF4Options, Storage
from luthier.errors import ConfigError, ModelError, PreflightError, bulleted, nearest, one_line
from luthier.matrices import StoredMatrix
from luthier.models.blocks.forward import use_blocks_in_forward
from luthier.models.checkpoint import SafetensorsCheckpoint, WeightSource
from luthier.models.compressed_checkpoint import compressed_checkpoint
from luthier.models.compressed_description import is_compressed
from luthier.models.fill import Filler
from luthier.models.gguf_checkpoint import GGUFCheckpoint
from luthier.models.gguf_config import config_content
from luthier.models.gguf_file import read_gguf
from luthier.models.nf4_cache import cached_folder, open_cached, write_cached
from luthier.models.nf4_checkpoint import holds_nf4, nf4_checkpoint
from luthier.models.skeleton import build_skeleton, make_config, read_config, require_config
from luthier.models.source import ModelSource, resolve
from luthier.models.tokenizer import gguf_tokenizer, read_tokenizer
from luthier.progress import Progress
from luthier.strict_json import read_json

DEFAULT_NF4 = NF4Options()
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model"),
)
MAX_TOKENIZER_BYTES = 256 << 20  # the largest in use, for vocabularies of 260,000 tokens, have 35 MB


@dataclass
class Loaded:
    """A model in evaluation mode, its tokenizer, and where both came from; unpacks as `model, tokenizer = ...`.

    notes: what a person should be told: where an alias led, a head that turned out not to be tied.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.tokenizer


def load(
    model: str,
    *,
    base: Storage | None = None,
    nf4: NF4Options = DEFAULT_NF4,
    offline: bool = False,
    progress: Progress | None = None,
) -> Loaded:
    """Load a causal language model: a Transformers folder, a `.gguf` file, an alias, or a hub id.

    The class is the Transformers one; every linear layer is a LowRankLinear and the token embedding a
    LowRankEmbedding, a tied head sharing the embedding's matrix. Nothing requires gradients.
    base: how matrices are stored. None and "asis" keep the checkpoint's own: its dtype, the blocks of a GGUF file,
    bitsandbytes' NF4. "f32", "bf16", "f16" convert all of them. "nf4" quantises linear layers as `nf4` says; embeddings
    and the head stay as they are. Norms, biases and position embeddings are float32, and so are activations.
    Blocks of a GGUF file of a type that has no kernel cannot stay: only where `base` converts them are they read.
    offline: no network is touched. progress(stage, done, total) is called with bytes.
    Memory stays below the stored model plus its largest tensor: weights that stay as they are are mapped.
    Raises ConfigError for a name that leads nowhere, ModelError for files that are missing, damaged or unsupported,
    PreflightError for NaN or Inf in a weight that is quantised.
    """
    if base is not None and base not in get_args(Storage):
        raise ConfigError(
            f"base storage is one of {', '.join(get_args(Storage))}; got {base!r}.{nearest(base, get_args(Storage))}"
        )
    source = resolve(model, offline=offline, progress=progress)
    (config, weights), tokenizer = open_weights(source.path), _open_tokenizer(source.path)
    cached = cached_folder(source.path, nf4) if base == "nf4" and nf4.cache else None
    kept, damaged = open_cached(weights, cached) if cached is not None else (None, None)
    weights = kept or weights
    loaded = build_skeleton(config, str(source.path))
    loaded.config._name_or_path = loaded.name_or_path = source.name
    filler = Filler(loaded, weights, base, str(source.path), nf4)
    filler.fill(progress)
    use_blocks_in_forward(loaded)
    _set_generation_config(loaded, source.path)
    if cached is not None and filler.quantized:
        write_cached(cached, filler.quantized)
    return Loaded(loaded, tokenizer, source, [note for note in (source.note, damaged, *filler.notes) if note])


def load_tokenizer(model: str, *, offline: bool = False, progress: Progress | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, named as for `load`, without reading its weights. Raises what `load` raises."""
    source = resolve(model, offline=offline, progress=progress)
    return _open_tokenizer(source.path)


def open_weights(path: Path) -> tuple[PretrainedConfig, WeightSource]:
    """The configuration and the weights in a folder or GGUF file; of the weights only the headers are read.

    A compressed folder's files are hashed besides, once a process as long as they do not change.
    """
    if path.is_dir():
        config = read_config(path)
        if is_compressed(path):
            return config, compressed_checkpoint(path)
        plain = SafetensorsCheckpoint(path)
        return config, nf4_checkpoint(plain) if holds_nf4(plain) else plain
    file = read_gguf(path)
    config = make_config(config_content(file), str(path))
    return config, GGUFCheckpoint(file, config.num_attention_heads, config.num_key_value_heads)


def _open_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    if path.is_dir():
        require_config(path)
        _refuse_endless_files(path)
    return read_tokenizer(path) if path.is_dir() else gguf_tokenizer(read_gguf(path))


def _refuse_endless_files(folder: Path) -> None:
    """Raise ModelError for what libraries would wait at, or read without end, while they look for a tokenizer."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"a model folder holds files; {path} is a pipe or a device. Remove it.")
        if path.name in TOKENIZER_FILES and path.is_file() and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelError(
                f"a tokenizer's file has at most {MAX_TOKENIZER_BYTES} bytes; {path} has {path.stat().st_size}. "
                "Download the model again."
            )


def _set_generation_config(model: PreTrainedModel, folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.exists():
        return
    try:
        read_json(path)
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{path} must be valid; {one_line(error)}. Delete it.") from error


def fingerprint(model: PreTrainedModel) -> str:
    """A sha256 that tells one base model from another: sizes, tensor names and shapes, and a sample of what is stored.

    64 stored numbers of every tensor, evenly spread: of a 4-bit matrix both codes and scales. Adapters do not change it.
    """
    digest = hashlib.sha256()
    sizes = {key: getattr(model.config, key, None) for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
    digest.update(json.dumps(sizes, sort_keys=True).encode())
    stored = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if ".matrix." in name)]
    for name, tensor in sorted(stored, key=lambda item: item[0]):
        if ".terms." in name:
            continue
        flat = tensor.detach().contiguous().reshape(-1)
        step = max(1, flat.numel() // 64)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[::step][:64].to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def check_finite(model: PreTrainedModel) -> None:
    """Raise PreflightError naming every weight that holds NaN or Inf. Reads all numbers once; of blocks, the scales."""
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, StoredMatrix):
            counts = {"weight": (module.not_finite(), module.shape[0] * module.shape[1])}
        else:
            own = module.named_parameters(recurse=False)
            counts = {key: (int((~torch.isfinite(tensor)).sum()), tensor.numel()) for key, tensor in own}
        for key, (bad, numbers) in counts.items():
            if bad:
                problems.append(f"{f'{name}.{key}'.replace('.matrix.', '.')}: {bad} of {numbers} values")
    if problems:
        raise PreflightError(
            f"the base weights must be finite; NaN or Inf in:\n{bulleted(problems)}\nDownload the model again."
        )
