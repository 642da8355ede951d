"""Attaching, detaching, switching off; initial values; several adapters; trained modules and ties; states."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft_pair import logits, ours, plain, randomize, relative, write_model
from tiny import FAMILIES

import luthier
from luthier import adapters
from luthier.adapters import AdapterSpec, adapter_state, attach, detach, disabled, set_adapter_state, trainable_parameters
from luthier.errors import AdapterError, NumericError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("attach")
    return {tied: write_model(folder / str(tied), "llama", tied) for tied in (False, True)}


def moved(model: torch.nn.Module) -> torch.Tensor:
    randomize([parameter for _, parameter in trainable_parameters(model)])
    return logits(model)


def test_public_names_lead_here() -> None:
    for name in ("AdapterSpec", "attach", "detach", "disabled", "load_adapter", "save_adapter"):
        assert getattr(luthier, name) is getattr(adapters, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / "model", family)
    model = ours(folder)
    base = logits(model)
    assert relative(base, logits(plain(folder))) < 1e-5
    for variant in ("lora", "rslora", "dora", "rsdora"):
        attach(model, AdapterSpec(rank=4, variant=variant), seed=0)
        assert torch.equal(logits(model), base)
        detach(model)


def test_head_and_embedding_start_at_the_base(folders: dict[bool, Path]) -> None:
    for tied, folder in folders.items():
        model = ours(folder)
        base = logits(model)
        attach(
            model,
            AdapterSpec(rank=4, variant="dora", targets=["embed_tokens", "lm_head", "q_proj"], modules_to_save=["norm"]),
            seed=0,
        )
        assert torch.equal(logits(model), base), tied


def test_initial_values(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    attach(model, AdapterSpec(rank=4, variant="dora", targets=["down_proj", "embed_tokens"]), seed=3)
    term = model.model.layers[0].mlp.down_proj.terms["default"]
    bound = 96**-0.5
    assert 0.9 * bound < term.lora_A.abs().max() <= bound
    assert term.lora_B.abs().max() == 0
    torch.testing.assert_close(term.magnitude.detach(), model.model.layers[0].mlp.down_proj.weight.norm(dim=1))
    embedding = model.model.embed_tokens.terms["default"]
    assert embedding.lora_A.abs().max() == 0
    assert 0.8 < embedding.lora_B.std() < 1.2
    torch.testing.assert_close(embedding.magnitude.detach(), model.model.embed_tokens.weight.norm(dim=0))


def test_initial_values_depend_on_seed_and_name_alone(folders: dict[bool, Path]) -> None:
    def first(seed: int, name: str = "default", **settings) -> torch.Tensor:
        model = ours(folders[False])
        attach(model, AdapterSpec(rank=4, **settings), seed=seed, name=name)
        return model.model.layers[1].self_attn.v_proj.terms[name].lora_A

    assert torch.equal(first(0), first(0, name="other", targets=["v_proj"]))
    assert not torch.equal(first(0), first(1))
    torch.manual_seed(5)
    model = ours(folders[False])
    attach(model, AdapterSpec(rank=4))
    torch.manual_seed(5)
    again = ours(folders[False])
    attach(again, AdapterSpec(rank=4))
    states = adapter_state(model), adapter_state(again)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    layers = model.model.layers
    assert not torch.equal(
        layers[0].self_attn.v_proj.terms["default"].lora_A, layers[1].self_attn.v_proj.terms["default"].lora_A
    )


def test_only_the_adapter_trains(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    model.requires_grad_(True)
    report = attach(model, AdapterSpec(rank=2, targets=["q_proj"], modules_to_save=["model.norm"]), seed=0)
    names = [name for name, _ in trainable_parameters(model)]
    assert names == [
        "model.layers.0.self_attn.q_proj.terms.default.lora_A",
        "model.layers.0.self_attn.q_proj.terms.default.lora_B",
        "model.layers.1.self_attn.q_proj.terms.default.lora_A",
        "model.layers.1.self_attn.q_proj.terms.default.lora_B",
        "model.norm.weight",
    ]
    assert report.trainable_parameters == 4 * 2 * 64 + 64 == sum(p.numel() for _, p in trainable_parameters(model))
    assert report.notes == []


def test_disabled_and_detach_give_the_base_back(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    base, weights = logits(model), copy.deepcopy(model.state_dict())
    attach(model, AdapterSpec(rank=2, variant="dora", modules_to_save=["lm_head", "model.norm"]), seed=0)
    tuned = moved(model)
    assert relative(tuned, base) > 1e-2
    with disabled(model):
        assert torch.equal(logits(model), base)
        with disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), tuned)
    with pytest.raises(RuntimeError, match="stop"), disabled(model):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), tuned)
    detach(model)
    assert torch.equal(logits(model), base)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)
    detach(model)


def test_training_mode_is_kept_when_modules_are_swapped(folders: dict[bool, Path]) -> None:
    model = ours(folders[False]).train()
    attach(model, AdapterSpec(rank=2, modules_to_save=["lm_head"]), seed=0)
    with disabled(model):
        model.eval()
        assert not model.lm_head.training
    assert not model.lm_head.training


def test_several_adapters_add_up(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    base = logits(model)
    attach(model, AdapterSpec(rank=2, targets=["lm_head"]), name="one", seed=0)
    one = moved(model)
    state = adapter_state(model, "one")
    attach(model, AdapterSpec(rank=3, targets=["lm_head"]), name="two", seed=1)
    assert torch.equal(logits(model), one)
    set_adapter_state(model, {key: tensor + 0.1 for key, tensor in adapter_state(model, "two").items()}, "two")
    both = logits(model)
    detach(model, "one")
    two = logits(model)
    torch.testing.assert_close(both - base, (one - base) + (two - base), rtol=1e-4, atol=1e-4)
    assert list(state) == ["base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"]
    attach(model, AdapterSpec(rank=3), name="three", seed=1)
    with pytest.raises(
        AdapterError, match=r"the adapter's name is needed where several are attached: two, three\. Pass name=\."
    ):
        adapter_state(model)
    with pytest.raises(AdapterError, match=r"the adapter must be attached to the model; got 'one', attached: two, three\."):
        detach(model, "one")


def test_what_cannot_be_attached(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    with pytest.raises(
        AdapterError,
        match=r"rank must be between 1 and min\(in, out\) = 32 on model\.layers\.0\.self_attn\.k_proj; got 33\. Try a smaller",
    ):
        attach(model, AdapterSpec(rank=33, targets=["layers.0.self_attn.k_proj"]))
    with pytest.raises(AdapterError, match=r"an adapter's name is made of letters, digits, - and _; got 'a\.b'"):
        attach(model, AdapterSpec(), name="a.b")
    attach(model, AdapterSpec(rank=2, modules_to_save=["lm_head"]), seed=0)
    with pytest.raises(AdapterError, match="adapter names must differ; 'default' is attached already"):
        attach(model, AdapterSpec())
    with pytest.raises(AdapterError, match="lm_head is trained whole by adapter 'default'"):
        attach(model, AdapterSpec(rank=2, modules_to_save=["lm_head"]), name="two")
    with pytest.raises(AdapterError, match="'lm_head' matches only what is trained whole already"):
        attach(model, AdapterSpec(rank=2, targets=["lm_head"]), name="two")
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp carries terms of adapter 'default'"):
        attach(model, AdapterSpec(rank=2, targets=["q_proj"], modules_to_save=["layers.0.mlp"]), name="two")


def test_terms_on_tied_weights_are_said(folders: dict[bool, Path]) -> None:
    model = ours(folders[True])
    report = attach(model, AdapterSpec(rank=2, targets=["lm_head"]), seed=0)
    assert report.notes == [
        "lm_head shares its weights with model.embed_tokens: its term acts on lm_head alone, and merging it unties them."
    ]
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    hidden = model.model(torch.tensor([[5, 6]])).last_hidden_state
    moved(model)
    assert torch.equal(model.model(torch.tensor([[5, 6]])).last_hidden_state, hidden)


def test_training_one_of_two_tied_modules_is_said(folders: dict[bool, Path]) -> None:
    model = ours(folders[True])
    report = attach(model, AdapterSpec(rank=2, modules_to_save=["embed_tokens"]), seed=0)
    assert report.notes == [
        "model.embed_tokens shares its weights with lm_head and is trained whole on its own: from now on they differ. "
        "ensure_weight_tying=True trains them as one."
    ]
    assert model.lm_head.matrix is not model.model.embed_tokens.matrix
    detach(model)
    assert model.lm_head.matrix is model.model.embed_tokens.matrix


def test_tied_modules_can_be_trained_as_one(folders: dict[bool, Path]) -> None:
    model = ours(folders[True])
    base = logits(model)
    report = attach(
        model, AdapterSpec(rank=2, targets=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True), seed=0
    )
    assert report.notes == ["lm_head and model.embed_tokens share their weights and are trained as one."]
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    assert report.trainable_parameters == 512 * 64 + 2 * 2 * 2 * 64
    assert torch.equal(logits(model), base)
    with disabled(model):
        assert torch.equal(logits(model), base)
    detach(model)
    assert torch.equal(logits(model), base)
    with pytest.raises(
        AdapterError,
        match=r"ensure_weight_tying needs a module that shares its weights in modules_to_save; got .*, sharing: model\.embed",
    ):
        attach(model, AdapterSpec(rank=2, modules_to_save=["model.norm"], ensure_weight_tying=True))


def test_a_bfloat16_base_trains_whole_modules_in_float32(tmp_path: Path) -> None:
    from tiny import write_tiny

    model = ours(write_tiny(tmp_path / "model", "llama", tied=True, dtype=torch.bfloat16))
    base = logits(model)
    attach(model, AdapterSpec(rank=2, modules_to_save=["lm_head"]), seed=0)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), base)


def test_states_round_trip_and_are_copies(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    attach(model, AdapterSpec(rank=2, variant="dora", modules_to_save=["lm_head"]), seed=0)
    before, state = logits(model), adapter_state(model)
    after = moved(model)
    assert relative(after, before) > 1e-2
    set_adapter_state(model, state)
    assert torch.equal(logits(model), before)


def test_a_state_that_does_not_fit_changes_nothing(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    attach(model, AdapterSpec(rank=2, targets=["layers.0.self_attn.q_proj"]), seed=0)
    state = adapter_state(model)
    a, b = state
    with pytest.raises(AdapterError) as caught:
        set_adapter_state(model, {a: torch.zeros(3, 64), "other": torch.zeros(2)})
    assert str(caught.value).splitlines() == [
        "the state must fit the adapter on the model:",
        f"  - {b} is missing; it must be (64, 2)",
        f"  - {a} must be (2, 64); it is (3, 64)",
        "  - other (2,) has no place in the adapter",
        "Attach with the settings it was made with.",
    ]
    with pytest.raises(NumericError, match=f"the state must be finite; NaN or Inf in:\n  - {b}\n"):
        set_adapter_state(model, {a: state[a] + 1, b: torch.full((64, 2), torch.nan)})
    assert torch.equal(adapter_state(model)[a], state[a])
    with pytest.raises(
        AdapterError, match=r"the adapter must be attached to the model, attached: none\. Call luthier\.attach first\."
    ):
        adapter_state(ours(folders[False]))


def test_a_deep_copy_is_independent(folders: dict[bool, Path]) -> None:
    model = ours(folders[False])
    attach(model, AdapterSpec(rank=2, modules_to_save=["lm_head"]), seed=0)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert relative(moved(twin), before) > 1e-2
    assert torch.equal(logits(model), before)
    with disabled(twin):
        assert torch.equal(logits(twin), before)
    detach(twin)
    assert torch.equal(logits(twin), before)
