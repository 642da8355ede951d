"""A merged model as a GGUF file, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, LlamaFileType

from luthier.errors import ConfigError, ModelError
from luthier.export import forms
from luthier.export.choices import gguf_layer_kind, is_untouched
from luthier.export.forms import AS_IS
from luthier.export.gguf_settings import GGUFSettings
from luthier.export.merge import Merge, Part
from luthier.matrices import NF4Matrix
from luthier.models.gguf_file import read_gguf
from luthier.models.gguf_names import norm_offset, original_rows, permuted_heads, to_gguf
from luthier.progress import Progress

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0, "q4_1": LlamaFileType.MOSTLY_Q4_1, "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S, "q6_k": LlamaFileType.MOSTLY_Q6_K, AS_IS: LlamaFileType.GUESSED,
}  # fmt: skip
QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its name there, the part it is made of, and how it is stored. untouched: the base's own
    blocks are copied."""

    name: str
    part: Part
    kind: str
    untouched: bool = False


def plan_entries(merge: Merge, architecture: str, kind: str) -> list[Entry]:
    """The tensors of the file in the model's order. kind: one of forms.GGUF_KINDS, or "asis".

    Matrices go to `kind`, or to what llama.cpp takes where it does not fit; all else is float32. "asis": a matrix that no term
    changes stays as it is stored, blocks that a term changes become q8_0. Blocks of `kind` that no term changes are copied.
    Raises ModelError for tensors that the architecture has no name for or that llama.cpp
    would not read, ConfigError for "asis" where matrices are in NF4 or in factors.
    """
    if architecture == "gemma2" and not merge.tied:
        raise ModelError(
            "llama.cpp has one matrix for gemma2's head and embedding; here the two differ. Train them with "
            "ensure_weight_tying, or leave both out of the adapter, or use --to merged."
        )
    entries, unnamed = [], []
    for part in merge.parts():
        name = to_gguf(part.name, architecture)
        if name == part.name:
            unnamed.append(part.name)
            continue
        entries.append(_entry(merge, name, part, kind))
    if unnamed:
        raise ModelError(f"every tensor must have a name in {architecture} files; {', '.join(unnamed[:3])} has none.")
    return entries


def fallbacks(entries: list[Entry], merge: Merge, kind: str) -> list[str]:
    """A note on each kind of fallback: how many matrices it does not fit and what they are stored in."""
    counts: dict[str, int] = {}
    for entry in entries:
        if entry.part.layer is None or entry.untouched or kind == AS_IS:
            continue
        if forms.fitting_kind(kind, entry.part.shape[1]) != kind:
            counts[entry.kind] = counts.get(entry.kind, 0) + 1
    return [
        f"Blocks of {kind.upper()} do not divide the rows of {count} matrices: these are stored as {other.upper()}."
        for other, count in counts.items()
    ]


def write_model(
    path: Path,
    merge: Merge,
    entries: list[Entry],
    settings: GGUFSettings,
    general: dict[str, Any],
    vocabulary: dict[str, Any],
    *,
    progress: Progress | None = None,
) -> int:
    """Write the file; returns its bytes. Memory holds one tensor beside the model.

    Raises NumericError naming a tensor that its type cannot hold.
    """
    writer = GGUFWriter(path, settings.architecture)
    for key, value in (general | settings.metadata | vocabulary).items():
        add_value(writer, key, value)
    for name, factors in settings.tensors.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    for entry in entries:
        size = forms.size_bytes(entry.part.shape, entry.kind)
        writer.add_tensor_info(entry.name, entry.part.shape, np.dtype(np.float32), size, forms.ggml_kind(entry.kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for factors in settings.tensors.values():
        writer.write_tensor_data(factors)
    for number, data in enumerate(_data(merge, entries, settings.architecture)):
        writer.write_tensor_data(data)
        if progress is not None:
            progress("writing", number + 1, len(entries))
    writer.close()
    return path.stat().st_size


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """One key with the type that gguf.md gives such values."""
    if key == "general.architecture":
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def general_keys(kind: str, name: str, base_name: str, license_name: str | None, base_file: Path | None) -> dict[str, Any]:
    """general.*: what the file is, what it is called and what it was made from. "asis" is of the type of `base_file`."""
    file_type = int(FILE_TYPES[kind])
    if kind == AS_IS and base_file is not None:
        stated = read_gguf(base_file).metadata.get("general.file_type")
        file_type = stated if isinstance(stated, int) else file_type
    keys: dict[str, Any] = {"general.type": "model", "general.name": name, "general.file_type": file_type}
    keys |= {"general.base_model.count": 1, "general.base_model.0.name": base_name}
    if kind not in forms.DENSE:
        keys["general.quantization_version"] = QUANTIZATION_VERSION
    return keys | ({"general.license": license_name} if license_name else {})


def permutation(name: str, architecture: str, rows: int, heads: int, key_heads: int) -> np.ndarray | None:
    """For each row of a tensor in the file, the row of Transformers' that it holds; None where rows stay in order."""
    own = permuted_heads(name, architecture, heads, key_heads)
    return None if own is None else np.argsort(original_rows(rows, own))


def _entry(merge: Merge, name: str, part: Part, kind: str) -> Entry:
    if part.layer is None:
        return Entry(name, part, "f32")
    if kind == AS_IS and isinstance(merge.matrix(part.layer), NF4Matrix):
        raise ConfigError("--dtype asis keeps the blocks of a GGUF base; this one is in nf4. Try --dtype q8_0 or q4_k.")
    return Entry(name, part, gguf_layer_kind(merge, part.layer, kind), is_untouched(merge, part.layer, kind))


@torch.no_grad()
def _data(merge: Merge, entries: list[Entry], architecture: str) -> Iterator[np.ndarray]:
    """What the file holds of each entry, made when it is asked for."""
    config = merge.model.config
    for entry in entries:
        rows = permutation(
            entry.part.name, architecture, entry.part.shape[0], config.num_attention_heads, config.num_key_value_heads
        )
        if entry.part.layer is None:
            value = merge.value(entry.part) + norm_offset(entry.part.name, architecture)
            data = forms.dense(value, "f32", entry.part.name).numpy()
        elif entry.untouched:
            data = forms.matrix_bytes(merge.matrix(entry.part.layer))
        else:
            data = forms.matrix_bytes(forms.as_kind(merge.weight(entry.part.layer), entry.kind, entry.part.name))
        yield np.ascontiguousarray(data if rows is None else data[rows])


def file_kinds(entries: list[Entry]) -> dict[str, int]:
    """How many tensors are stored as what."""
    counts: dict[str, int] = {}
    for entry in entries:
        name = GGMLQuantizationType[entry.kind.upper()].name
        counts[name] = counts.get(name, 0) + 1
    return counts
