"""A packed forward gives what every document alone gives, in all families, and leaves the model as it was."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny import FAMILIES, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.errors import ShapeError
from luthier.models.modes import evaluation_mode
from luthier.models.packed import head_of, packed_hidden, packed_logits

LENGTHS = [1, 40, 7, 83, 5]  # two of them longer than the tiny models' window of 32


def documents(vocabulary: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocabulary, (sum(LENGTHS),), generator=generator)
    return ids, torch.tensor([0, *LENGTHS]).cumsum(0)


def alone(model: torch.nn.Module, ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Each document by itself through the family's own eager attention."""
    ordinary = model.config._attn_implementation
    model.set_attn_implementation("eager")
    parts = [model.base_model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(starts.diff().tolist())]
    model.set_attn_implementation(ordinary)
    return torch.cat(parts)


def assert_same_hidden_and_gradients(model: torch.nn.Module) -> None:
    ids, starts = documents()
    grad = torch.randn(len(ids), model.config.hidden_size, generator=torch.Generator().manual_seed(4))
    results = []
    for run in (packed_hidden, alone):
        model.zero_grad()
        hidden = run(model, ids, starts)
        hidden.backward(grad)
        results.append((hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (got, got_grads), (expected, expected_grads) = results
    assert relative(got, expected) < 1e-5
    assert got_grads.keys() == expected_grads.keys()
    assert len(got_grads) > 10
    largest = max(gradient.abs().max() for gradient in expected_grads.values())
    for name, gradient in expected_grads.items():
        assert (got_grads[name] - gradient).abs().max() < 1e-5 * max(gradient.abs().max(), largest * 1e-2), name


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_and_gradients_equal_each_document_alone(family: str, caplog) -> None:
    assert_same_hidden_and_gradients(tiny_model(family))
    assert "one by one" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_recomputed_layers_see_the_same_documents(family: str) -> None:
    model = tiny_model(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable()
    model.train()
    functions = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    ids, starts = documents()
    gradients = []
    for checkpointed in (True, False):
        model.zero_grad()
        model.train(checkpointed)
        packed_hidden(model, ids, starts).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for got, expected in zip(*gradients, strict=True):
        assert relative(got, expected) < 1e-5
    assert functions == [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    packed_hidden(model, *documents())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    padded = torch.ones(2, 9, dtype=torch.int64)
    assert model(input_ids=padded, attention_mask=padded).logits.shape == (2, 9, 512)


def test_the_attention_is_given_back_after_an_error() -> None:
    model = tiny_model("llama")
    ids, starts = documents()
    packed_hidden(model, ids, starts)
    with pytest.raises(IndexError):
        packed_hidden(model, ids + 10_000, starts)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["qwen2_moe", "granite", "cohere", "smollm3", "starcoder2", "stablelm"])
def test_families_beyond_the_ten(family: str, caplog) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    moe = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    extra = {"qwen2_moe": moe | window, "granite": {"logits_scaling": 8.0}, "cohere": {"logit_scale": 0.3}}
    config = AutoConfig.for_model(
        family, **sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **extra.get(family, {})
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, starts = documents()
    with torch.no_grad():
        assert relative(packed_hidden(model, ids, starts), alone(model, ids, starts)) < 1e-5
        assert_head_gives_the_logits(model)
    assert "one by one" not in caplog.text


@pytest.mark.parametrize("family", ["mamba", "bloom", "lfm2"])
def test_families_that_cannot_be_packed_run_their_documents_one_by_one(family: str, caplog) -> None:
    """A state and a convolution carry over from one document to the next, and ALiBi is a bias: found out, and said once."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "n_layer": 2, "n_head": 4, "vocab_size": 512}
    if family == "lfm2":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, starts = documents()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="luthier"):
        hidden = packed_hidden(model, ids, starts)
        logits = packed_logits(model, ids, starts, torch.tensor([0, 5, 60, 61, 135]))
        parts = [model(input_ids=part[None]) for part in ids.split(LENGTHS)]
    assert relative(hidden, alone(model, ids, starts)) < 1e-5
    assert relative(logits, torch.cat([part.logits[0] for part in parts])[[0, 5, 60, 61, 135]]) < 1e-5
    assert caplog.text.count("one by one") == 1


def assert_head_gives_the_logits(model: torch.nn.Module) -> None:
    ids, _ = documents()
    output = model(input_ids=ids[None])
    head = head_of(model)
    assert head is not None
    logits = head.logits(model.base_model(input_ids=ids[None]).last_hidden_state[0])
    assert relative(logits, output.logits[0]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_transform_give_the_logits(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        assert_head_gives_the_logits(model)


def test_softcapped_heads_say_so() -> None:
    model = tiny_model("gemma2")
    assert head_of(model).softcap == model.config.final_logit_softcapping == 30.0


def test_an_unknown_head_is_not_guessed() -> None:
    """A model that does something of its own to its logits has no Head, and packed_logits asks the model."""

    class Shifted(type(tiny_model("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.arange(output.logits.shape[-1])
            return output

    Shifted.forward.__signature__ = __import__("inspect").signature(type(tiny_model("llama")).forward)
    model = Shifted(tiny_config("llama")).eval()
    ids, starts = documents()
    rows = torch.tensor([0, 1, 45, 130])
    with torch.no_grad():
        assert head_of(model) is None
        got = packed_logits(model, ids, starts, rows)
        expected = torch.cat([model(input_ids=part[None]).logits[0] for part in ids.split(LENGTHS)])[rows]
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("boundaries", [[0, 5], [1, 136], [0, 90, 80, 136], [0]])
def test_boundaries_must_fit(boundaries: list[int]) -> None:
    with pytest.raises(ShapeError, match="boundaries must rise from 0 to the number of ids"):
        packed_hidden(tiny_model("llama"), documents()[0], torch.tensor(boundaries))


def test_evaluation_mode_restores_each_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout()).train()
    model[0].eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]
