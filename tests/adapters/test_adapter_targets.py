"""Which layers names and expressions mean, and what is said where they mean nothing."""

from __future__ import annotations

import pytest
import torch
from peft_pair import ours, write_model

from luthier.adapters import AdapterSpec, attach, detach
from luthier.errors import AdapterError

LINEAR = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
CANDIDATES = (
    "Candidates: embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head "
    "(whole names look like model.embed_tokens)."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return ours(write_model(tmp_path_factory.mktemp("targets") / "model", "llama", False))


def targets(model: torch.nn.Module, **settings) -> list[str]:
    found = attach(model, AdapterSpec(rank=2, **settings), seed=0).targets
    detach(model)
    return found


def refusal(model: torch.nn.Module, **settings) -> str:
    with pytest.raises(AdapterError) as caught:
        attach(model, AdapterSpec(rank=2, **settings))
    assert not any("terms" in name for name, _ in model.named_parameters())
    return str(caught.value)


def test_all_linear_is_every_linear_layer_but_the_head(model: torch.nn.Module) -> None:
    assert targets(model) == [f"model.layers.{index}.{name}" for index in (0, 1) for name in LINEAR]


def test_a_list_means_whole_names_or_ends(model: torch.nn.Module) -> None:
    found = targets(model, targets=["model.layers.1.mlp.up_proj", "layers.0.self_attn.q_proj", "lm_head"])
    assert found == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head"]
    assert targets(model, targets=["embed_tokens"]) == ["model.embed_tokens"]


def test_an_expression_fits_whole_names(model: torch.nn.Module) -> None:
    assert targets(model, targets=r".*\.1\..*(k|v)_proj") == [
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert targets(model, targets="lm_head") == ["lm_head"]


def test_a_module_trained_whole_takes_no_term(model: torch.nn.Module) -> None:
    found = targets(model, modules_to_save=["layers.0.mlp", "layers.1"])
    assert found == [f"model.layers.0.{name}" for name in LINEAR[:4]]


def test_names_that_match_nothing_are_all_listed_with_candidates(model: torch.nn.Module) -> None:
    assert refusal(model, targets=["q_proj", "w_proj", "proj", "query_key_value"]).splitlines() == [
        "every target must match a linear layer or embedding:",
        "  - 'w_proj' matches nothing. Did you mean 'v_proj'?",
        "  - 'proj' matches nothing. Did you mean 'v_proj'?",
        "  - 'query_key_value' matches nothing.",
        CANDIDATES,
    ]


def test_a_module_that_is_not_linear_is_named(model: torch.nn.Module) -> None:
    message = refusal(model, targets=["input_layernorm"])
    assert (
        "'input_layernorm' matches only model.layers.0.input_layernorm, a LlamaRMSNorm. "
        "To train it whole, name it in modules_to_save." in message
    )


def test_an_expression_that_matches_nothing(model: torch.nn.Module) -> None:
    assert refusal(model, targets="q_proj").splitlines() == [
        "every target must match a linear layer or embedding:",
        "  - 'q_proj' matches nothing. One string is a regular expression for the whole name; "
        "for names that end in it give a list: ['q_proj'].",
        CANDIDATES,
    ]


def test_a_target_that_is_trained_whole(model: torch.nn.Module) -> None:
    message = refusal(model, targets=["q_proj", "lm_head"], modules_to_save=["lm_head"])
    assert "'lm_head' matches only what is trained whole already (modules_to_save). Take it out of one of the two." in message


def test_patterns_that_match_nothing(model: torch.nn.Module) -> None:
    assert refusal(
        model, targets=["q_proj"], rank_pattern={"q_proj": 1, "k_proj": 4}, alpha_pattern={"layers.7": 4}
    ).splitlines() == [
        "every pattern must match a target:",
        "  - rank_pattern: 'k_proj' matches nothing. Did you mean 'q_proj'?",
        "  - alpha_pattern: 'layers.7' matches nothing.",
        "Candidates: q_proj (whole names look like model.layers.0.self_attn.q_proj).",
    ]


def test_a_module_to_save_that_matches_nothing(model: torch.nn.Module) -> None:
    message = refusal(model, modules_to_save=["lm_heads"])
    assert message.startswith(
        "every entry of modules_to_save must match a module with weights:\n"
        "  - 'lm_heads' matches nothing. Did you mean 'lm_head'?"
    )


def test_a_model_without_low_rank_layers() -> None:
    with pytest.raises(
        AdapterError, match=r"the model must come from luthier\.load; Linear has no layer that can carry an adapter\."
    ):
        attach(torch.nn.Linear(2, 2), AdapterSpec())
