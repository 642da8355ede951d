"""A stand-in for a model: one layer of each kind it has, of its shapes and storages, with weights that mean nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from luthier.adapters import Start, attach, train_everything
from luthier.adapters.spec import AdapterSpec
from luthier.adapters.targets import low_rank_layers
from luthier.config import RunConfig
from luthier.kernels.storage import DENSE_DTYPES, GGUF_BLOCKS, NF4_BLOCK, NF4_NESTED_BLOCK
from luthier.linear import LowRankEmbedding
from luthier.matrices import DenseMatrix, FactoredMatrix, GGUFMatrix, Matrix, NF4Matrix, StoredMatrix
from luthier.matrices.factored import FactoredKind
from luthier.models.skeleton import build_skeleton, make_config
from luthier.training.blueprint import Blueprint, put_layers
from luthier.training.initial import TAKES_OFF

VOCABULARY = 512
SIZE_OF_WEIGHTS = 0.02


def sample_model(blueprint: Blueprint, config: RunConfig, targets: list[str]) -> PreTrainedModel:
    """The model cut to one layer of each kind and 512 tokens, ready to train as `config` says.

    targets: the layers of the whole model that carry terms; here all layers called like one of them do. The embeddings'
    output requires gradients, so that the first layer works as those after it do.
    """
    content = _small_content(blueprint)
    model = build_skeleton(make_config(content, blueprint.path), blueprint.path)

    def make(name: str, rows: int, columns: int) -> Matrix:
        in_layers = f"{name}.weight" in blueprint.storages and VOCABULARY not in (rows, columns)
        kind = blueprint.storages[f"{name}.weight"] if in_layers else "f32"
        return sample_matrix(kind, rows, columns, double=config.double_quant)

    put_layers(model, make, tied=False)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, key, nn.Parameter(torch.full(parameter.shape, SIZE_OF_WEIGHTS), requires_grad=False))
    _make_trainable(model, config, targets)
    model.get_input_embeddings().register_forward_hook(make_inputs_require_grads)
    return model


def _small_content(blueprint: Blueprint) -> dict[str, Any]:
    content = blueprint.config.to_dict()
    kinds = list(dict.fromkeys(content.get("layer_types") or ["one"]))
    depth_key = blueprint.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    content |= {depth_key: len(kinds), "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    content |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if content.get("layer_types"):
        content["layer_types"] = kinds
    content.pop("quantization_config", None)
    return content


def _make_trainable(model: PreTrainedModel, config: RunConfig, targets: list[str]) -> None:
    if config.method == "full":
        train_everything(model)
        return
    model.requires_grad_(False)
    leaves = {target.rpartition(".")[2] for target in targets}
    layers = low_rank_layers(model)
    chosen = [name for name in layers if name.rpartition(".")[2] in leaves and not isinstance(layers[name], LowRankEmbedding)]
    chosen = [name for name in chosen if layers[name] is not model.get_output_embeddings()]
    if chosen:
        rank = min(config.rank, *(min(layers[name].matrix.shape) for name in chosen))
        spec = AdapterSpec(rank=rank, alpha=config.alpha, dropout=config.dropout, variant=config.variant, targets=chosen)
        attach(model, spec, seed=config.seed, start=_start(model, spec) if config.init in TAKES_OFF else None)


def _start(model: PreTrainedModel, spec: AdapterSpec) -> Start:
    """What costs as much as factors that are taken off again."""
    layers = low_rank_layers(model)
    shapes = {name: layers[name].matrix.shape for name in spec.targets}
    return Start(
        {name: (torch.ones(spec.rank, n), torch.zeros(m, spec.rank)) for name, (m, n) in shapes.items()}, taken_off=True
    )


def make_inputs_require_grads(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    """By the name of Transformers' own hook of this kind, which fused blocks let pass."""
    return output if output.requires_grad else output.detach().requires_grad_()


def sample_matrix(kind: str, rows: int, columns: int, *, double: bool) -> Matrix:
    """A matrix of that kind whose memory is really there; making it takes no longer than writing it."""
    factored = FactoredKind.parse(kind)
    if factored is not None:
        return _sample_factored(factored, rows, columns, double=double)
    return _sample_stored(kind, rows, columns, double=double)


def _sample_factored(kind: FactoredKind, rows: int, columns: int, *, double: bool) -> FactoredMatrix:
    own = max(1, rows - kind.rank) if kind.pivoted else rows
    places = torch.arange(rows, dtype=torch.int32) if kind.pivoted else None
    return FactoredMatrix(
        _sample_stored(kind.left, own, kind.rank, double=double),
        _sample_stored(kind.right, kind.rank, columns, double=double),
        base=_sample_stored(kind.base, rows, columns, double=double) if kind.base else None,
        places=places,
    )


def _sample_stored(kind: str, rows: int, columns: int, *, double: bool) -> StoredMatrix:
    if kind in DENSE_DTYPES:
        # Not symmetric: sums that cancel leave rounding alone, which the next norm makes large.
        row = torch.linspace(-SIZE_OF_WEIGHTS / 2, SIZE_OF_WEIGHTS, columns).to(DENSE_DTYPES[kind])
        return DenseMatrix(row.repeat(rows, 1))
    if kind in GGUF_BLOCKS:
        size, block_bytes = GGUF_BLOCKS[kind]
        return GGUFMatrix(torch.zeros(rows, columns // size * block_bytes, dtype=torch.uint8).fill_(0), kind)
    weights = rows * columns
    blocks = -(-weights // NF4_BLOCK)
    codes = torch.arange(256, dtype=torch.uint8).repeat(-(-weights // 512))[: -(-weights // 2)].clone()
    if not double:
        return NF4Matrix(codes, torch.full((blocks,), SIZE_OF_WEIGHTS), (rows, columns))
    nested = torch.full((-(-blocks // NF4_NESTED_BLOCK),), SIZE_OF_WEIGHTS)
    scales = torch.full((blocks,), 128, dtype=torch.uint8)
    return NF4Matrix(codes, scales, (rows, columns), nested_absmax=nested, nested_offset=SIZE_OF_WEIGHTS)
