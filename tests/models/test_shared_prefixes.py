"""Tokens that texts share are computed once, and loss and gradients are those of the texts one by one in float64."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, write_tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier.adapters import AdapterSpec, attach, trainable_parameters
from luthier.data.example import Example
from luthier.data.packing import pack_examples
from luthier.errors import ShapeError
from luthier.evaluation.loss import supervised_loss
from luthier.kernels import native
from luthier.linear import LowRankLinear
from luthier.models.blocks import without_blocks
from luthier.models.load import load
from luthier.models.packed import packed_hidden, shares_prefixes
from luthier.training.prepare import set_training_mode
from luthier.training.recompute import set_recomputed

pytestmark = pytest.mark.skipif(not native.use_native(), reason="the blocks run on the compiled kernels")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_tiny(root / family, family) for family in FAMILIES}


def some_examples() -> list[Example]:
    """A common beginning of 20 tokens, groups that share up to 25 more (past the tiny models' window of 32), and one apart."""
    draw = random.Random(2)
    tokens = lambda count: [draw.randrange(3, 390) for _ in range(count)]  # noqa: E731
    head, groups = tokens(20), [tokens(25), tokens(6)]
    rows = [[*head, *groups[0], *tokens(9)], [*head, *groups[1], *tokens(30)], [*head, *groups[0], *tokens(4)]]
    rows += [[*head, *tokens(3)], tokens(11), rows[1][:26], rows[0]]
    return [Example(ids, [draw.random() < 0.6 for _ in ids], [], "", None, "row") for ids in rows]


def adapted(folder: Path, **spec) -> nn.Module:
    model = load(str(folder)).model
    attach(model, AdapterSpec(rank=4, **spec), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    set_training_mode(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in trainable_parameters(model) if parameter.grad is not None}


def adapted_weights(model: nn.Module, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By `factors`, of every adapted layer W + s B A, or m (W + s B A) / |W + s B A|_row with the norm held fixed."""
    weights = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LowRankLinear) or not layer.terms:
            continue
        (key, term), prefix = next(iter(layer.terms.items())), f"{name}.terms."
        weight = layer.matrix.dequantize().to(torch.float64)
        weight = weight + term.scaling * factors[f"{prefix}{key}.lora_B"] @ factors[f"{prefix}{key}.lora_A"]
        if term.magnitude is not None:
            weight = factors[f"{prefix}{key}.magnitude"][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
        weights[f"{name}.weight"] = weight
    return weights


def exact(model: nn.Module, folder: Path, examples: list[Example]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one example after the other through Transformers' own model, all of it in float64."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    factors = {name: p.detach().to(torch.float64).requires_grad_() for name, p in trainable_parameters(model)}
    weights = adapted_weights(model, factors)
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        logits = torch.func.functional_call(plain, weights, kwargs={"input_ids": torch.tensor([example.ids])}).logits[0]
        marked = [t for t in range(1, len(example.ids)) if example.supervised[t]]
        targets = torch.tensor([example.ids[t] for t in marked], dtype=torch.int64)
        total = total + F.cross_entropy(logits[[t - 1 for t in marked]], targets, reduction="sum")
    total.backward()
    return total.item(), {name: factor.grad for name, factor in factors.items() if factor.grad is not None}


def assert_equal_to_exact(model: nn.Module, folder: Path) -> None:
    examples = some_examples()
    assert shares_prefixes(model)
    packs = pack_examples(examples, max_tokens=80, share=True)
    assert len(packs) == 2
    assert any(bool((pack.parents >= 0).any()) for pack in packs)
    assert sum(pack.tokens for pack in packs) < 0.8 * sum(len(example.ids) for example in examples)
    loss = torch.stack([supervised_loss(model, pack) for pack in packs]).sum()
    loss.backward()
    expected_loss, expected = exact(model, folder, examples)
    assert loss.item() == pytest.approx(expected_loss, rel=2e-6)
    got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() < 3e-5 * gradient.norm(), name


@pytest.mark.parametrize("recomputed", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(folders: dict[str, Path], family: str, recomputed: int) -> None:
    model = adapted(folders[family])
    set_recomputed(model, recomputed)
    assert_equal_to_exact(model, folders[family])


@pytest.mark.parametrize("spec", [{"variant": "dora"}, {"targets": r".*\.1\..*v_proj"}, {"variant": "rslora"}])
def test_other_adapters(folders: dict[str, Path], spec: dict) -> None:
    assert_equal_to_exact(adapted(folders["llama"], **spec), folders["llama"])


def test_with_dropout_every_row_draws_its_own_masks(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(folders["llama"], dropout=0.5)
    with caplog.at_level(logging.INFO, logger="luthier"):
        assert not shares_prefixes(model)
    assert "are computed for each row: dropout draws a mask for each of them" in caplog.text
    assert shares_prefixes(model.eval())


def test_gradients_of_a_state_that_many_rows_read_are_the_same_every_time(folders: dict[str, Path]) -> None:
    """Enough numbers for torch to add in parallel, where the order of sums could change."""
    ids = [7 * t % 380 + 3 for t in range(60)]
    examples = [Example([*ids, n], [True] * 61, [], "", None, "row") for n in range(3, 15)]
    (pack,) = pack_examples(examples, max_tokens=1000, share=True)
    assert pack.supervised_tokens * 64 > 32768
    model, seen = adapted(folders["llama"]), []
    for _ in range(3):
        model.zero_grad(set_to_none=True)
        supervised_loss(model, pack).backward()
        seen.append([gradient.clone() for gradient in gradients(model).values()])
    assert all(torch.equal(a, b) for again in seen[1:] for a, b in zip(seen[0], again, strict=True))


def test_a_model_without_blocks_shares_nothing_and_says_so(folders: dict[str, Path]) -> None:
    model = adapted(folders["llama"])
    (pack,) = pack_examples(some_examples(), max_tokens=1000, share=True)
    with without_blocks():
        assert not shares_prefixes(model)
        with pytest.raises(ShapeError, match=r"LlamaForCausalLM cannot share tokens between texts; pack them with share=False"):
            packed_hidden(model, pack.ids, pack.starts, parents=pack.parents)
    assert not shares_prefixes(tiny_model("gpt2"))


def test_frequencies_that_depend_on_the_length_share_nothing(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "dynamic", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert not shares_prefixes(load(str(folder)).model)
