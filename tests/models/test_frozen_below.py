"""Layers below the lowest one that trains: no graph, nothing kept, and what goes into that layer can be given instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_blocks import FAMILIES, RANK, add_adapter, make_pack, relative
from tiny import write_tiny
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from luthier.adapters import AdapterSpec, trainable_parameters
from luthier.data.example import Example
from luthier.data.packing import Pack, pack_examples
from luthier.errors import ShapeError
from luthier.evaluation.loss import supervised_loss
from luthier.kernels import native
from luthier.models.blocks import Entry, without_blocks
from luthier.models.load import load
from luthier.models.packed import entry_obstacle, packed_hidden, packed_inputs
from luthier.training.depth import frozen_layers
from luthier.training.recompute import decoder_layers, set_recomputed

needs_blocks = pytest.mark.skipif(not native.use_native(), reason="the blocks run on the compiled kernels")

UPPER = r".*\.1\..*"  # all linear layers of the second layer of two
KINDS = {
    "fused": {"targets": UPPER},
    "composed": {"targets": UPPER, "variant": "dora"},
    "dropout": {"targets": UPPER, "dropout": 0.5},
    "down alone": {"targets": r".*\.1\..*(down_proj|c_proj)"},
    "output alone": {"targets": r".*\.1\..*o_proj"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_tiny(root / family, family) for family in (*FAMILIES, "gpt2", "gpt_neox")}


def adapted(folder: Path, **spec: Any) -> nn.Module:
    model = load(str(folder)).model
    add_adapter(model, AdapterSpec(rank=RANK, **spec))
    return model


def some_examples() -> list[Example]:
    """A beginning of 40 tokens that three of four rows share, longer than the tiny models' window of 32."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda count: torch.randint(3, 390, (count,), generator=generator).tolist()  # noqa: E731
    head = draw(40)
    rows = [[*head, *draw(9)], [*head, *draw(30)], draw(11), [*head, *draw(2)]]
    return [Example(ids, [place % 3 > 0 for place in range(len(ids))], [], "", None, "row") for ids in rows]


def watch_layers(model: nn.Module) -> list[bool]:
    """For each decoder layer that runs as Transformers' module, whether its output has a graph, as it is called."""
    seen: list[bool] = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(_first(output).requires_grad))
    return seen


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def saved_by(model: nn.Module, pack: Pack) -> list[Tensor]:
    """The tensors that one forward pass keeps for backward."""
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        supervised_loss(model, pack)
    return saved


def count_ops(loss: Tensor) -> int:
    """The nodes of a loss's graph."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return len(seen)


@needs_blocks
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_keep_nothing_of_frozen_layers(folders: dict[str, Path], kind: str) -> None:
    """What a pass keeps does not change where the lower layers are left out of it altogether."""
    model, pack = adapted(folders["llama"], **KINDS[kind]), make_pack()
    whole, graph = saved_by(model, pack), count_ops(supervised_loss(model, pack))
    inputs = packed_inputs(model, pack.ids, pack.starts, 1)
    assert not inputs.requires_grad
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = supervised_loss(model, pack, Entry(1, inputs))
    assert [tuple(tensor.shape) for tensor in whole] == [tuple(tensor.shape) for tensor in saved]
    assert len(saved) > 0
    assert graph == count_ops(loss)


@needs_blocks
@pytest.mark.parametrize("kind", ["fused", "down alone", "output alone"])
def test_lowest_half_gets_no_gradient_to_its_input(folders: dict[str, Path], kind: str) -> None:
    """The whole pack's vectors are kept only where a gradient is asked for that needs them."""
    model, pack = adapted(folders["llama"], **KINDS[kind]), make_pack()
    wide = [tensor for tensor in saved_by(model, pack) if tensor.shape[0] == pack.tokens]
    everything = [tensor for tensor in saved_by(adapted(folders["llama"]), pack) if tensor.shape[0] == pack.tokens]
    assert len(wide) < len(everything)
    if kind == "down alone":
        assert wide == []  # the last layer's second half runs on the predicting tokens alone


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_transformers_modules_have_no_graph_below(folders: dict[str, Path], family: str, recomputed: bool) -> None:
    model = adapted(folders[family], targets=UPPER)
    below = frozen_layers(model, [name for name, _ in trainable_parameters(model)])
    assert below == 1
    set_recomputed(model, int(recomputed), first=below)
    seen = watch_layers(model)
    with without_blocks():
        packed_hidden(model, make_pack().ids, make_pack().starts)  # what is measured once a model
        seen.clear()
        loss = supervised_loss(model, make_pack())
    assert seen == [False, True]
    loss.backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(model))


@needs_blocks
@pytest.mark.parametrize("kind", ["fused", "composed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_beginning_at_a_layer_is_exact(folders: dict[str, Path], family: str, kind: str) -> None:
    model = adapted(folders[family], **KINDS[kind])
    examples = some_examples()
    for share in (False, True):
        for pack in pack_examples(examples, max_tokens=128, share=share):
            inputs = packed_inputs(model, pack.ids, pack.starts, 1, pack.parents)
            results = []
            for entry in (None, Entry(1, inputs)):
                model.zero_grad(set_to_none=True)
                loss = supervised_loss(model, pack, entry)
                loss.backward()
                results.append((loss.item(), [parameter.grad.clone() for _, parameter in trainable_parameters(model)]))
            (expected, gradients), (got, own) = results
            assert got == expected
            assert all(torch.equal(one, other) for one, other in zip(own, gradients, strict=True))


@needs_blocks
def test_layers_with_hooks_run_above_and_below(folders: dict[str, Path]) -> None:
    model, pack = adapted(folders["llama"], targets=UPPER), make_pack()
    expected = supervised_loss(model, pack)
    seen = watch_layers(model)
    inputs = packed_inputs(model, pack.ids, pack.starts, 1)
    assert relative(supervised_loss(model, pack, Entry(1, inputs)), expected) < 1e-6
    assert seen == [False, True]


@needs_blocks
def test_only_the_norm_and_the_head_above(folders: dict[str, Path]) -> None:
    model = load(str(folders["qwen2"])).model
    add_adapter(model, AdapterSpec(rank=RANK, targets=["lm_head"], modules_to_save=["model.norm"]))
    pack = make_pack()
    assert frozen_layers(model, [name for name, _ in trainable_parameters(model)]) == 2
    expected = supervised_loss(model, pack)
    inputs = packed_inputs(model, pack.ids, pack.starts, 2)
    assert relative(supervised_loss(model, pack, Entry(2, inputs)), expected) < 1e-6
    assert inputs.shape == (pack.tokens, 64)


def test_models_without_blocks_begin_nowhere_else(folders: dict[str, Path]) -> None:
    model, pack = adapted(folders["gpt2"], targets=UPPER), make_pack()
    assert entry_obstacle(model) == "its family has no blocks of its own"
    with pytest.raises(ShapeError, match=r"GPT2LMHeadModel runs as a whole only: its family has no blocks of its own\."):
        packed_inputs(model, pack.ids, pack.starts, 1)
    with pytest.raises(ShapeError, match=r"runs as a whole only: .* Give no entry"):
        supervised_loss(model, pack, Entry(1, torch.zeros(pack.tokens, 64)))
    with without_blocks():
        assert entry_obstacle(load(str(folders["llama"])).model) == "blocks are switched off"


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (["model.layers.1.mlp.down_proj"], 1),
        (["model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm"], 0),
        (["lm_head"], 2),
        (["model.norm", "model.layers.1.self_attn.q_proj.terms.default.lora_A"], 1),
        (["model.embed_tokens", "lm_head"], 0),
        (["model.layers"], 0),
        ([], 2),
    ],
)
def test_how_many_layers_are_frozen(folders: dict[str, Path], trained: list[str], expected: int) -> None:
    assert frozen_layers(load(str(folders["llama"])).model, trained) == expected
