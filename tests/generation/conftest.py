"""Prompts of many lengths, and answers by Transformers' own generation, one prompt alone, as the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Oracle = Callable[..., list[int]]


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged, some longer than the tiny models' window of 32 and than a page of 64, three with a beginning in common."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 390, (length,), generator=generator).tolist() for length in (3, 70, 3, 11, 130, 1, 24)]
    beginning = texts[4]
    return [*texts, beginning[:100] + texts[1][:9], beginning[:100] + texts[3], list(texts[3])]


@pytest.fixture
def alone() -> Oracle:
    def answer(model, prompt: list[int], tokens: int, stops: tuple[int, ...] = ()) -> list[int]:
        """Greedy, the end token left out."""
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=0
        )
        found = output[0, len(prompt) :].tolist()
        return found[:-1] if found and found[-1] in stops else found

    return answer


@pytest.fixture
def through_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model generates through Transformers' modules."""
    monkeypatch.setattr("luthier.generation.generator.stack_obstacle", lambda _model: "the test asks for it")
