"""Recomputed layers: the same loss and gradients, less kept, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, write_tiny

from luthier.adapters import AdapterSpec, attach, trainable_parameters
from luthier.data.packing import Pack
from luthier.errors import ModelError
from luthier.evaluation.loss import supervised_loss
from luthier.models.load import load
from luthier.training.live_bytes import LiveBytes
from luthier.training.prepare import set_training_mode
from luthier.training.recompute import decoder_layers, set_recomputed


def make_pack() -> Pack:
    """Two documents, one longer than the families' window of 32 tokens."""
    starts = torch.tensor([0, 20, 70])
    ids = torch.arange(70) * 7 % 400
    predict = torch.tensor([t for t in range(69) if t != 19])
    return Pack.of_texts(ids, starts, predict)


def gradients(model, pack: Pack, recomputed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    set_recomputed(model, recomputed)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss = supervised_loss(model, pack)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for _, parameter in trainable_parameters(model)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_tiny(root / family, family) for family in FAMILIES}


@pytest.mark.parametrize(
    "changes", [{}, {"dropout": 0.3}, {"variant": "dora", "dropout": 0.3}], ids=["lora", "dropout", "dora"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same(folders: dict[str, Path], family: str, changes: dict) -> None:
    model = load(str(folders[family])).model
    attach(model, AdapterSpec(rank=4, **changes), seed=0)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    set_training_mode(model)
    pack = make_pack()
    kept_loss, kept = gradients(model, pack, 0)
    for count in (1, 2):
        loss, recomputed = gradients(model, pack, count)
        assert torch.equal(loss, kept_loss)
        for one, other in zip(recomputed, kept, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert max(gradient.abs().max() for gradient in kept) > 0


def test_recomputed_layers_keep_only_their_input(tiny_llama: Path) -> None:
    model = load(str(tiny_llama)).model
    attach(model, AdapterSpec(rank=4), seed=0)
    set_training_mode(model)
    pack = make_pack()
    held = []
    for count in (0, 1, 2):
        set_recomputed(model, count)
        supervised_loss(model, pack)
        with LiveBytes() as live:
            loss = supervised_loss(model, pack)
            held.append(live.now)
        assert loss.requires_grad
    assert held[0] > held[1] > held[2]
    # The layers are alike, but the first has an input that needs no gradient and is not kept.
    assert held[0] - held[1] == pytest.approx(held[1] - held[2], rel=0.1)


def test_without_gradients_nothing_is_computed_twice(tiny_llama: Path) -> None:
    model = load(str(tiny_llama)).model
    calls = []
    decoder_layers(model)[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    set_recomputed(model, 2)
    with torch.no_grad():
        supervised_loss(model, make_pack())
    before = len(calls)
    with torch.no_grad():
        supervised_loss(model, make_pack())
    assert len(calls) == before + 1


def test_can_be_taken_back(tiny_llama: Path) -> None:
    model = load(str(tiny_llama)).model
    set_recomputed(model, 2)
    set_recomputed(model, 0)
    assert all("forward" not in layer.__dict__ for layer in decoder_layers(model))


def test_more_layers_than_there_are(tiny_llama: Path) -> None:
    model = load(str(tiny_llama)).model
    with pytest.raises(ModelError, match=r"at most all 2 decoder layers can be computed again; got 3\. Try 2\."):
        set_recomputed(model, 3)
