"""An adapter as the GGUF file that llama.cpp puts on a base (`--lora`), and reading such a file back.

A tensor pair for each target, `<tensor>.lora_a` (r, in) and `.lora_b` (out, r), float32; llama.cpp computes
W x + (alpha / r) B A x with one alpha for the file and r from the tensor. Rows of B follow the rows of W in the file.
On token_embd the pair lies the other way: lora_a is A^T (vocabulary, r), lora_b is B (hidden, r).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from luthier.adapters.registry import pick, term_of
from luthier.adapters.targets import tied_to
from luthier.errors import AdapterError, ModelError, bulleted
from luthier.export.gguf_model import add_value, permutation
from luthier.export.gguf_settings import architecture_of
from luthier.linear import LowRankEmbedding, LowRankTerm
from luthier.models.gguf_file import read_gguf
from luthier.models.gguf_names import original_rows, permuted_heads, to_gguf, to_transformers

SUFFIXES = (".lora_a", ".lora_b")


@dataclass(frozen=True)
class GGUFAdapter:
    """What an adapter file says: for each layer's name in Transformers A (r, in) and B (out, r), float32, rows in
    Transformers' order; on the embedding A (r, vocabulary), B (hidden, r). scaling: what B A is multiplied with."""

    architecture: str
    alpha: float
    pairs: dict[str, tuple[Tensor, Tensor]]

    def scaling(self, layer: str) -> float:
        return self.alpha / self.pairs[layer][0].shape[0]


def write_adapter(path: Path, model: PreTrainedModel, general: Mapping[str, Any]) -> list[str]:
    """Write the model's one adapter; returns notes. general: further general.* keys.

    alpha is s r where that is one number for all targets: alpha of a LoRA, alpha sqrt(r) of an rsLoRA. Where it is not,
    the commonest is written and what a target's own differs by is folded into its B.
    Raises AdapterError naming everything that llama.cpp's adapters cannot express, ModelError for an unknown family.
    """
    adapter = pick(model, None)
    architecture = architecture_of(model.config)
    terms = {target: term_of(model, adapter, target) for target in adapter.targets}
    problems = _problems(model, architecture, terms, list(adapter.saved))
    if problems:
        raise AdapterError(
            f"llama.cpp adds s B A to matrices and nothing else; this adapter cannot be expressed so:\n{bulleted(problems)}\n"
            "Export the merged model: --to gguf."
        )
    own = {target: term.scaling * term.rank for target, term in terms.items()}
    alpha = Counter(own.values()).most_common(1)[0][0]
    writer = GGUFWriter(path, architecture)
    keys = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    for key, value in (dict(general) | keys).items():
        add_value(writer, key, value)
    for target, term in terms.items():
        for suffix, data in zip(SUFFIXES, _pair(model, architecture, target, term, own[target] / alpha), strict=True):
            writer.add_tensor(to_gguf(f"{target}.weight", architecture) + suffix, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folded = sum(value != alpha for value in own.values())
    return [_folding_note(alpha, folded)] if folded else []


def _folding_note(alpha: float, folded: int) -> str:
    return f"llama.cpp has one alpha a file, {alpha:g}: what the scale of {folded} layers differs by is folded into their B."


def read_adapter(path: Path, config: PretrainedConfig) -> GGUFAdapter:
    """Read an adapter file for a model of `config`. Raises ModelError if it is none, or is of another architecture."""
    file = read_gguf(path)
    architecture = architecture_of(config)
    if file.metadata.get("adapter.type") != "lora" or file.metadata.get("general.architecture") != architecture:
        raise ModelError(
            f"{path} must hold a LoRA of architecture {architecture}; it has {file.metadata.get('adapter.type')!r} of "
            f"{file.metadata.get('general.architecture')!r}."
        )
    alpha = file.metadata.get("adapter.lora.alpha")
    stems = {name.removesuffix(SUFFIXES[0]) for name in file.tensors if name.endswith(SUFFIXES[0])}
    missing = [name for stem in stems for name in (stem + suffix for suffix in SUFFIXES) if name not in file.tensors]
    if not isinstance(alpha, float) or len(file.tensors) != 2 * len(stems) or missing:
        raise ModelError(f"{path} must hold adapter.lora.alpha and pairs of lora_a and lora_b; it does not. Export it again.")
    pairs = {}
    for stem in sorted(stems):
        name = to_transformers(stem, architecture)
        a, b = (_numbers(file, stem + suffix) for suffix in SUFFIXES)
        if stem == "token_embd.weight":
            a = np.ascontiguousarray(a.T)
        heads = permuted_heads(name, architecture, config.num_attention_heads, config.num_key_value_heads)
        if heads is not None:
            b = b[original_rows(b.shape[0], heads)]
        pairs[name.removesuffix(".weight")] = (torch.from_numpy(a), torch.from_numpy(b))
    return GGUFAdapter(architecture, alpha, pairs)


def _numbers(file: Any, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    return file.data(tensor, mapped=False).view(np.float32).reshape(tensor.shape)


def _pair(
    model: PreTrainedModel, architecture: str, target: str, term: LowRankTerm, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """lora_a and lora_b of one target, as the file holds them."""
    A = term.lora_A.detach().numpy()
    B = (term.lora_B.detach() * factor).numpy()
    if isinstance(model.get_submodule(target), LowRankEmbedding):
        return np.ascontiguousarray(A.T), B
    config = model.config
    rows = permutation(f"{target}.weight", architecture, B.shape[0], config.num_attention_heads, config.num_key_value_heads)
    return A, B if rows is None else np.ascontiguousarray(B[rows])


def _problems(model: PreTrainedModel, architecture: str, terms: Mapping[str, LowRankTerm], saved: list[str]) -> list[str]:
    problems = [f"{name} is trained whole (modules_to_save)" for name in saved]
    tied = tied_to(model)
    for target, term in terms.items():
        if term.magnitude is not None:
            problems.append(f"{target} has a magnitude (DoRA)")
        if term.lora_B_bias is not None:
            problems.append(f"the term of {target} has a bias (lora_bias)")
        if target in tied:
            problems.append(
                f"{target} shares its matrix with {', '.join(tied[target])}, and its term acts on one of them alone"
            )
        if to_gguf(f"{target}.weight", architecture) == f"{target}.weight":
            problems.append(f"{target} has no name in {architecture} files")
    return problems
