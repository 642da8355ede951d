"""The model's own forward, as other training loops call it, gives the same loss and gradients through the blocks."""

from __future__ import annotations

import copy
import gc
import json
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from tiny import write_tiny
from torch import Tensor, nn

from luthier.adapters import AdapterSpec, attach, trainable_parameters
from luthier.kernels import native
from luthier.kernels.registry import registered_ops
from luthier.models.blocks import without_blocks
from luthier.models.load import load

pytestmark = pytest.mark.skipif(not native.use_native(), reason="the blocks run on the compiled kernels")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
LENGTHS = (40, 13, 27)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_tiny(root / family, family) for family in FAMILIES}


def adapted(folder: Path, base: str | None = None, **spec) -> nn.Module:
    model = load(str(folder), base=base).model
    attach(model, AdapterSpec(rank=4, **spec), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def rows() -> list[Tensor]:
    """The first and the last begin alike."""
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(3, 390, (length,), generator=generator) for length in LENGTHS]
    texts[2][:10] = texts[0][:10]
    return texts


def padded(side: str = "right") -> dict[str, Tensor]:
    batch = {name: torch.full((3, 44), fill) for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))}
    for row, text in enumerate(rows()):
        places = slice(0, len(text)) if side == "right" else slice(44 - len(text), 44)
        batch["input_ids"][row, places] = batch["labels"][row, places] = text
        batch["attention_mask"][row, places] = 1
    return batch


def end_to_end() -> dict[str, Tensor]:
    """As a collator without padding gives it: positions restart, the first label of each text is left out."""
    texts = rows()
    labels = torch.cat([torch.cat([torch.tensor([-100]), text[1:]]) for text in texts])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return {"input_ids": torch.cat(texts)[None], "position_ids": positions[None], "labels": labels[None], "use_cache": False}


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def calls() -> int:
    return {op.name: op.native_calls for op in registered_ops()}["packed_attention"]


def assert_same(model: nn.Module, batch: dict[str, Tensor], *, blocks: bool = True) -> None:
    with without_blocks():
        expected_loss, expected = loss_and_gradients(model, batch)
    before = calls()
    loss, got = loss_and_gradients(model, batch)
    assert (calls() > before) == blocks
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert got.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 2e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(folders: dict[str, Path], family: str) -> None:
    assert_same(adapted(folders[family]), padded())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_that_are_recomputed(folders: dict[str, Path], family: str, reentrant: bool) -> None:
    model = adapted(folders[family])
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model, padded())


def test_layers_are_recomputed_as_transformers_was_told(folders: dict[str, Path]) -> None:
    """The options, here a context around each second pass, and every second layer alone."""
    model, entered = adapted(folders["llama"]), []

    @contextmanager
    def again() -> Iterator[None]:
        entered.append(1)
        yield

    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), again())}
    for every, layers in ((1, 2), (2, 1)):
        model.activation_checkpointing_enable(options, every_n_layers=every)
        entered.clear()
        before = calls()
        loss_and_gradients(model, padded())
        assert calls() > before
        assert len(entered) == layers


@pytest.mark.parametrize("base", ["nf4", "bf16"])
def test_other_storages(folders: dict[str, Path], base: str) -> None:
    assert_same(adapted(folders["llama"], base=base), padded())


def test_padding_on_the_left_is_left_to_the_model(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert_same(adapted(folders["llama"]), padded("left"), blocks=False)
    assert "a call runs as Transformers' modules: its mask leaves out tokens before the end of a row" in caplog.text


def test_rows_end_to_end(folders: dict[str, Path]) -> None:
    assert_same(adapted(folders["llama"]), end_to_end())


def test_restarting_positions_beside_a_cache_are_left_to_the_model(folders: dict[str, Path]) -> None:
    assert_same(adapted(folders["llama"]), {**end_to_end(), "use_cache": None}, blocks=False)


def test_no_mask_and_no_positions(folders: dict[str, Path]) -> None:
    ids = torch.stack([rows()[0], rows()[0].flip(0)])
    assert_same(adapted(folders["qwen3"], variant="dora"), {"input_ids": ids, "labels": ids})


def test_padding_is_not_computed_and_beginnings_once(folders: dict[str, Path]) -> None:
    model = adapted(folders["llama"])
    seen = []
    original = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: seen.append(ids.numel()) or original(ids)
    model(**padded())
    assert max(seen) == sum(LENGTHS) - 10


def test_holes_in_a_mask_are_left_to_the_model(folders: dict[str, Path]) -> None:
    batch = padded()
    batch["attention_mask"][0, 5:8] = 0
    assert_same(adapted(folders["llama"]), batch, blocks=False)


def test_caches_hidden_states_and_inference_are_the_models_own(folders: dict[str, Path]) -> None:
    model, ids = adapted(folders["llama"]), rows()[0][None]
    before = calls()
    assert model(input_ids=ids, use_cache=True).past_key_values is not None
    assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == 3
    with torch.no_grad():
        model.eval()(input_ids=ids)
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert calls() == before


def test_what_the_blocks_would_compute_otherwise_is_the_models_own(folders: dict[str, Path], tmp_path: Path) -> None:
    model, batch = adapted(folders["llama"]), padded()
    assert_same(model, {**batch, "is_causal": False}, blocks=False)
    with torch.autocast("cpu", torch.bfloat16):
        before = calls()
        model(**batch)
        assert calls() == before
    noise = model.model.embed_tokens.register_forward_hook(lambda _module, _inputs, output: output * 1.5)
    assert_same(model, batch, blocks=False)
    noise.remove()
    assert_same(model, batch)
    config = json.loads((folders["llama"] / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = write_tiny(tmp_path / "dynamic", "llama")
    (folder / "config.json").write_text(json.dumps(config))
    assert_same(adapted(folder), batch, blocks=False)


def test_a_loop_of_ones_own_gets_a_cache_outside_training(folders: dict[str, Path]) -> None:
    model, ids = adapted(folders["llama"]).eval(), rows()[0][None]
    whole = model(input_ids=ids).logits[:, -1]
    first = model(input_ids=ids[:, :-1])
    assert torch.allclose(model(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1], whole, atol=1e-4)


def test_a_model_is_freed_when_it_is_let_go_of(folders: dict[str, Path]) -> None:
    model = load(str(folders["llama"])).model
    body = weakref.ref(model.model)
    gc.disable()
    try:
        del model
        assert body() is None
    finally:
        gc.enable()


def test_a_copy_uses_its_own_weights(folders: dict[str, Path]) -> None:
    model, batch = adapted(folders["llama"]), padded()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for _, parameter in trainable_parameters(twin):
            parameter.zero_()
    loss, _ = loss_and_gradients(model, batch)
    other, _ = loss_and_gradients(twin, batch)
    assert loss != other
    assert_same(twin, batch)
