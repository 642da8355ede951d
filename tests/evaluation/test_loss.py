"""The chunked loss on supervised tokens equals cross entropy on full logits, in value and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import FAMILIES, tiny_config, tiny_model

import luthier
from luthier.data.example import Example
from luthier.data.packing import Pack, pack_examples
from luthier.evaluation import loss as loss_module
from luthier.evaluation.loss import linear_cross_entropy, supervised_loss
from luthier.linear import LowRankLinear, LowRankTerm
from luthier.matrices import DenseMatrix
from luthier.models.packed import Head


def some_pack(share: float = 0.4) -> Pack:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for length in (3, 40, 17, 70):
        ids = torch.randint(3, 512, (length,), generator=generator).tolist()
        supervised = (torch.rand(length, generator=generator) < share).tolist()
        examples.append(Example(ids, supervised, [], "", None, "x"))
    (pack,) = pack_examples(examples, max_tokens=1000)
    return pack


def oracle(model: torch.nn.Module, pack: Pack) -> torch.Tensor:
    """Full logits of each document alone, then cross entropy, in the model's own precision."""
    parts = [model(input_ids=part[None]).logits[0] for part in pack.ids.split(pack.starts.diff().tolist())]
    return F.cross_entropy(torch.cat(parts)[pack.predict], pack.targets, reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_frozen", [True, False])
def test_value_and_gradients_equal_full_logits_in_float64(family: str, head_frozen: bool) -> None:
    model = tiny_model(family, tied=False)
    model.get_output_embeddings().weight.requires_grad_(not head_frozen)
    exact = copy.deepcopy(model).to(torch.float64)
    pack = some_pack()
    expected = oracle(exact, pack)
    expected.backward()
    got = supervised_loss(model, pack)
    got.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(p.grad.abs().max() for p in exact.parameters() if p.grad is not None)
    for (name, mine), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            assert (mine.grad - theirs.grad).abs().max() < 1e-4 * max(theirs.grad.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 0.5)])
@pytest.mark.parametrize("adapted", [False, True])
def test_chunks_do_not_change_the_loss(rows: int, softcap, scale, adapted: bool, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "MIN_CHUNK_ROWS", rows)
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 1)
    torch.manual_seed(0)
    linear = LowRankLinear(DenseMatrix(torch.randn(50, 16).to(torch.bfloat16)), torch.randn(50))
    if adapted:
        linear.terms["default"] = LowRankTerm(torch.randn(4, 16), torch.randn(50, 4), 2.0)
    hidden = torch.randn(30, 16, requires_grad=True)
    targets = torch.randint(0, 50, (30,))
    loss = linear_cross_entropy(hidden, Head(linear, softcap, scale), targets)
    (loss * 3).backward()

    exact = hidden.detach().to(torch.float64).requires_grad_()
    weight = linear.matrix.dequantize(torch.float64)
    if adapted:
        A, B = (p.detach().to(torch.float64).requires_grad_() for p in linear.terms["default"].parameters())
        weight = weight + 2.0 * B @ A
    logits = scale * F.linear(exact, weight, linear.bias.to(torch.float64))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected * 3).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = [(hidden.grad, exact.grad)]
    if adapted:
        pairs += [(linear.terms["default"].lora_A.grad, A.grad), (linear.terms["default"].lora_B.grad, B.grad)]
    for mine, theirs in pairs:
        assert torch.allclose(mine.to(torch.float64), theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, Head(linear, softcap, scale), targets).item() == pytest.approx(
            expected.item(), rel=1e-5
        )


@pytest.mark.parametrize("storage", [None, "bf16"])
def test_an_adapted_model_from_load_gets_the_plain_gradients(storage, tiny_llama) -> None:
    model, _ = luthier.load(str(tiny_llama), base=storage)
    luthier.attach(model, luthier.AdapterSpec(rank=4, variant="dora"), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    pack = some_pack()
    results = []
    for compute in (supervised_loss, oracle):
        model.zero_grad()
        loss = compute(model, pack)
        loss.backward()
        results.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}))
    (got, got_gradients), (expected, gradients) = results
    assert got == pytest.approx(expected, rel=1e-5)
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        assert (got_gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_a_frozen_head_sees_each_row_once_and_only_a_chunk_at_a_time(monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "MIN_CHUNK_ROWS", 8)
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 1)
    linear = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    seen = []
    linear.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    hidden = torch.randn(30, 16, requires_grad=True)
    linear_cross_entropy(hidden, Head(linear, None, 1.0), torch.zeros(30, dtype=torch.int64)).backward()
    assert seen == [8, 8, 8, 6]


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)])
def test_a_bare_frozen_matrix_goes_to_the_kernel(softcap, scale, monkeypatch) -> None:
    linear, targets = LowRankLinear(DenseMatrix(torch.randn(50, 16)), torch.randn(50)), torch.arange(30)
    called = []
    kernel = loss_module.kernel_cross_entropy
    monkeypatch.setattr(loss_module, "kernel_cross_entropy", lambda *a, **b: called.append(1) or kernel(*a, **b))
    hidden = torch.randn(30, 16, requires_grad=True)
    wide = hidden.detach().double().requires_grad_()
    loss = linear_cross_entropy(hidden, Head(linear, softcap, scale), targets)
    logits = scale * (wide @ linear.weight.double().T + linear.bias.double())
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = F.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    expected.backward()
    assert called == [1]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    linear.terms["term"] = LowRankTerm(torch.randn(2, 16), torch.randn(50, 2), 1.0)
    linear_cross_entropy(hidden, Head(linear, softcap, scale), targets)
    assert called == [1]


def test_a_model_with_a_head_of_its_own_computes_its_logits() -> None:
    class Shifted(type(tiny_model("llama"))):
        def forward(self, input_ids=None, position_ids=None, use_cache=None):
            output = super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
            output.logits = output.logits + 0.01 * torch.arange(output.logits.shape[-1])
            return output

    torch.manual_seed(0)
    model = Shifted(tiny_config("llama")).eval()
    pack = some_pack()
    gradients = []
    for compute in (supervised_loss, oracle):
        model.zero_grad()
        loss = compute(model, pack)
        loss.backward()
        gradients.append((loss.item(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    assert torch.allclose(gradients[0][1], gradients[1][1], rtol=1e-4, atol=1e-4)


def test_a_pack_without_supervised_tokens_has_loss_zero() -> None:
    model = tiny_model("llama")
    loss = supervised_loss(model, some_pack(share=0.0))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None for parameter in model.parameters())
