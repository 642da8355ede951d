"""Training every weight, and saving the result as an ordinary Transformers folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft_pair import IDS, logits, ours, plain, randomize, relative
from safetensors import safe_open
from tiny import FAMILIES, tiny_tokenizer, write_tiny
from transformers import AutoTokenizer

import luthier
from luthier.adapters import (
    AdapterSpec,
    adapter_state,
    attach,
    disabled,
    save_adapter,
    save_full,
    set_adapter_state,
    train_everything,
    trainable_parameters,
)
from luthier.errors import AdapterError, NumericError


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_model_opens_in_plain_transformers(tmp_path: Path, family: str) -> None:
    folder = write_tiny(tmp_path / "model", family, dtype=torch.bfloat16)
    model, tokenizer = luthier.load(str(folder))
    base = logits(model)
    count = train_everything(model)
    assert count == sum(parameter.numel() for parameter in plain(folder).parameters())
    assert relative(logits(model), base) < 1e-6
    randomize([parameter for _, parameter in trainable_parameters(model)])
    expected = logits(model)
    assert relative(expected, base) > 1e-2
    save_full(model, tmp_path / "full", tokenizer)
    again = plain(tmp_path / "full")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert relative(logits(again), expected) < 1e-5
    assert relative(logits(ours(tmp_path / "full")), expected) < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "full").vocab_size == tiny_tokenizer().vocab_size
    with (
        safe_open(tmp_path / "full" / "model.safetensors", "pt") as saved,
        safe_open(folder / "model.safetensors", "pt") as original,
    ):
        assert sorted(saved.keys()) == sorted(original.keys())


def test_gradients_are_those_of_the_plain_model(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "gpt2")
    model, reference = ours(folder), plain(folder)
    train_everything(model)
    for each in (model, reference):
        each.eval()(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    found = {name.replace(".matrix.", "."): parameter.grad for name, parameter in trainable_parameters(model)}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    model = ours(write_tiny(tmp_path / "model", "llama", tied=True))
    train_everything(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in adapter_state(model)
    save_full(model, tmp_path / "full")
    assert json.loads((tmp_path / "full" / "config.json").read_text())["tie_word_embeddings"] is True


def test_the_base_that_was_loaded_is_not_touched(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    before = (folder / "model.safetensors").read_bytes()
    model = ours(folder)
    train_everything(model)
    randomize([parameter for _, parameter in trainable_parameters(model)])
    assert (folder / "model.safetensors").read_bytes() == before


def test_states_cover_every_weight(tmp_path: Path) -> None:
    model = ours(write_tiny(tmp_path / "model", "gpt2"))
    train_everything(model)
    before, state = logits(model), adapter_state(model)
    randomize([parameter for _, parameter in trainable_parameters(model)])
    assert not torch.equal(logits(model), before)
    set_adapter_state(model, state)
    assert torch.equal(logits(model), before)
    assert sum(tensor.numel() for tensor in state.values()) == sum(p.numel() for _, p in trainable_parameters(model))


def test_adapters_and_full_training_exclude_each_other(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    model = ours(folder)
    attach(model, AdapterSpec(rank=2), seed=0)
    with pytest.raises(AdapterError, match="a model trains everything or adapters, not both; attached: default"):
        train_everything(model)
    with pytest.raises(AdapterError, match="a model is saved in full without adapters; attached: default"):
        save_full(model, tmp_path / "full")
    model = ours(folder)
    train_everything(model)
    with pytest.raises(AdapterError, match="a model that trains everything takes no adapter"):
        attach(model, AdapterSpec(rank=2))
    with pytest.raises(AdapterError, match="a model that trains everything keeps no base to go back to"), disabled(model):
        pass
    with pytest.raises(AdapterError, match="the adapter must be attached to the model"):
        save_adapter(model, tmp_path / "adapter")


def test_a_model_with_nan_is_not_saved(tmp_path: Path) -> None:
    model = ours(write_tiny(tmp_path / "model", "llama"))
    train_everything(model)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NumericError, match=r"a model that is saved must be finite; NaN or Inf in:\n  - model\.norm\.weight\n"):
        save_full(model, tmp_path / "full")
    assert not (tmp_path / "full").exists()
