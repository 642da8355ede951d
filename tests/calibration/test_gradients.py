"""Output moments against the gradient of the loss that a plain Transformers model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.calibration import gradient_moments, text_packs
from luthier.errors import ShapeError
from luthier.models.load import load

TEXT = "Book a table for two at noon, please. The quick brown fox jumps over the lazy dog. " * 8


def test_moments_are_those_of_transformers_own_gradients(tiny_llama: Path) -> None:
    model, tokenizer = load(str(tiny_llama))
    packs = text_packs(tokenizer, TEXT, windows=2, length=40, max_tokens=40)
    names = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    found = gradient_moments(model, packs, names)

    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    outputs: dict[str, torch.Tensor] = {}
    for name in names:
        plain.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: (output.retain_grad(), outputs.__setitem__(name, output))[0]
        )
    expected = dict.fromkeys(names, 0)
    for pack in packs:
        logits = plain(input_ids=pack.ids[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], pack.ids[1:], reduction="sum").backward()
        for name in names:
            g = outputs[name].grad[0]
            expected[name] = expected[name] + g.T @ g
    for name in names:
        scale = float(expected[name].abs().max())
        assert torch.allclose(found[name].second, expected[name], atol=1e-4 * scale)
    assert list(found) == ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj"]


def test_no_text_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ShapeError, match="got no packs"):
        gradient_moments(load(str(tiny_llama)).model, [], ["model.layers.0.mlp.down_proj"])
