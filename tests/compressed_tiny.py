"""A tiny model whose layers are stored in every way there is, random and small."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import write_tiny

from luthier.adapters.targets import low_rank_layers
from luthier.linear import LowRankLinear
from luthier.matrices import FactoredMatrix, Matrix, stored
from luthier.models.cache import publish
from luthier.models.compressed_folder import write_compressed
from luthier.models.load import Loaded, load


def factors_of(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * V[:rank]


def set_matrix(model: torch.nn.Module, name: str, matrix: Matrix) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, LowRankLinear)
    layer.matrix = matrix


def compress_tiny(model: torch.nn.Module) -> None:
    """Layer 0: q, k, v share an NF4 factor, gate is pivoted, up is NF4 with a repair; layer 1: blocks, NF4 and dense."""
    layers = low_rank_layers(model)
    weights = {name: layer.matrix.dequantize() for name, layer in layers.items()}
    first, second = "model.layers.0.", "model.layers.1."
    names = [f"{first}self_attn.{leaf}_proj" for leaf in "qkv"]
    L, R = factors_of(torch.cat([weights[name] for name in names]), 48)
    right, row = stored(R, "nf4"), 0
    for name in names:
        rows = weights[name].shape[0]
        set_matrix(model, name, FactoredMatrix(stored(L[row : row + rows], "nf4"), right))
        row += rows
    generator = torch.Generator().manual_seed(1)
    rows, columns = weights[f"{first}mlp.gate_proj"].shape
    places = torch.randperm(rows, generator=generator).to(torch.int32)
    left = torch.randn(rows - 32, 32, generator=generator) / 8
    R = torch.randn(32, columns, generator=generator) / 8
    set_matrix(model, f"{first}mlp.gate_proj", FactoredMatrix(stored(left, "bf16"), stored(R, "bf16"), places=places))
    base = stored(weights[f"{first}mlp.up_proj"], "nf4")
    L, R = factors_of(weights[f"{first}mlp.up_proj"] - base.dequantize(), 8)
    set_matrix(model, f"{first}mlp.up_proj", FactoredMatrix(stored(L, "bf16"), stored(R, "nf4"), base=base))
    for leaf, kind in (
        ("mlp.gate_proj", "q4_0"),
        ("mlp.up_proj", "nf4"),
        ("self_attn.q_proj", "q8_0"),
        ("mlp.down_proj", "f16"),
    ):
        set_matrix(model, f"{second}{leaf}", stored(weights[f"{second}{leaf}"], kind))
    layers["model.embed_tokens"].matrix = stored(weights["model.embed_tokens"], "q8_0")
    model.get_output_embeddings().matrix = layers["model.embed_tokens"].matrix


def write_folder(loaded: Loaded, folder: Path) -> Path:
    with publish(folder) as stage:
        write_compressed(stage, loaded.model, loaded.tokenizer, origin="tiny")
    return folder


def compressed_folder(folder: Path, family: str = "llama") -> tuple[Path, Loaded]:
    """A compressed folder, and the model that it was written from."""
    loaded = load(str(write_tiny(folder / "original", family, tied=True)))
    compress_tiny(loaded.model)
    return write_folder(loaded, folder / "compressed"), loaded
