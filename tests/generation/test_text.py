"""One text that grows, is cut back and replaced: what is kept of it changes no logits, and only what is new is read."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from luthier.errors import ConfigError
from luthier.generation import text as text_module
from luthier.generation.native_session import NativeSession
from luthier.generation.text import GrowingText
from luthier.kernels import native

needs_native = pytest.mark.skipif(not native.use_native(), reason="the decoder is one of the compiled kernels")


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 390, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", [*(pytest.param(name, marks=needs_native) for name in ("llama", "gemma3")), "gpt2", "olmo2"])
def test_a_text_that_changes(family: str, monkeypatch) -> None:
    model = tiny_model(family, seed=2).train()
    monkeypatch.setattr(text_module, "PROMPT_TOKENS_AT_ONCE", 40)
    growing = GrowingText(model)

    def check(found: torch.Tensor, whole: list[int]) -> None:
        with torch.no_grad():
            expected = model.eval()(torch.tensor([whole])).logits[0, -1]
        model.train()
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    first = ids(70)
    check(growing.read(first), first)
    check(growing.add(8), [*first, 8])
    longer = [*first, 8, *ids(50, 1)]
    check(growing.read(longer), longer)  # goes on
    check(growing.read(longer), longer)  # the same once more
    check(growing.read(longer[:30]), longer[:30])  # shorter
    other = longer[:50] + ids(30, 2)
    check(growing.read(other), other)  # another end
    check(growing.read(ids(20, 3)), ids(20, 3))  # another text
    growing.forget()
    check(growing.read(first), first)
    assert model.training


@needs_native
def test_only_what_is_new_is_read(monkeypatch) -> None:
    model = tiny_model("llama", seed=2)
    started, read = [], []
    start, further = NativeSession.start, NativeSession.read
    monkeypatch.setattr(NativeSession, "start", lambda self, prompts: started.append(prompts) or start(self, prompts))
    monkeypatch.setattr(NativeSession, "read", lambda self, row, new: read.append(list(new)) or further(self, row, new))
    growing = GrowingText(model)
    text = ids(100)
    growing.read(text[:60])
    growing.read(text)
    growing.read([*text[:50], 5])
    assert started == [[text[:60]]]
    assert read == [text[60:], [5]]


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="a conversation needs a model with a key-value cache; linear has none"):
        GrowingText(_WithoutCache())


class _WithoutCache(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
        self.config = type("Config", (), {"model_type": "linear"})()
