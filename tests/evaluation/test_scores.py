"""Log-likelihoods equal those of Transformers, token by token, whatever shares a pack with them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer

from luthier.adapters import AdapterSpec, attach
from luthier.data import Example, Renderer
from luthier.data.packing import pack_examples
from luthier.errors import DataError, NumericError, ShapeError
from luthier.evaluation import scores
from luthier.evaluation.loss import supervised_loss
from luthier.evaluation.scores import pack_log_likelihoods, score_answers, score_examples, token_log_likelihoods
from luthier.models.load import load

ROWS = [("one", "ONE"), ("two and two", "four, I think"), ("one", "two"), ("one", "ONE"), ("three " * 20, "x")]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    renderer = Renderer(tiny_tokenizer(), max_length=300)
    return [renderer.render({"prompt": prompt, "completion": answer}, f"row {n}") for n, (prompt, answer) in enumerate(ROWS)]


def by_transformers(model, example: Example) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids])).logits[0, :-1].double().log_softmax(-1)
    picked = logits.gather(1, torch.tensor(example.ids[1:])[:, None])[:, 0]
    return float(picked[torch.tensor(example.supervised[1:])].sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_score_as_transformers_does(family: str, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    expected = [by_transformers(model, example) for example in examples]
    for pack_tokens in (1, 100, 2048):
        monkeypatch.setattr(scores, "PACK_TOKENS", pack_tokens)
        assert score_examples(model, examples) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("storage", ["f32", "bf16", "nf4"])
def test_frozen_heads_and_adapters_too(storage: str, tiny_llama, examples: list[Example]) -> None:
    model = load(str(tiny_llama), base=storage).model
    attach(model, AdapterSpec(rank=4), seed=1)
    expected = [by_transformers(model, example) for example in examples]
    found = score_examples(model, examples)
    assert found == pytest.approx(expected, rel=2e-4 if storage != "bf16" else 2e-2)


def test_a_pack_gives_one_sum_an_example_and_together_the_loss(examples: list[Example]) -> None:
    model = tiny_model("llama")
    (pack,) = pack_examples(examples, max_tokens=4096)
    tokens = token_log_likelihoods(model, pack)
    assert tokens.shape == (pack.supervised_tokens,)
    sums = pack_log_likelihoods(model, pack, examples)
    assert sums.dtype == torch.float64
    assert float(sums.sum()) == pytest.approx(-supervised_loss(model, pack).item(), rel=1e-5)
    with pytest.raises(ShapeError, match="the examples of a pack must have its"):
        pack_log_likelihoods(model, pack, examples[::-1][:1] * 5)


def test_an_example_without_supervised_tokens_has_none() -> None:
    model = tiny_model("llama")
    silent = Example([5, 6, 7], [True, False, False], [], "", None, "row")
    assert score_examples(model, [silent]).tolist() == [0.0]
    spoken = Example([5, 6, 7], [False, False, True], [], "", None, "row")
    assert score_examples(model, [silent, spoken])[1] == pytest.approx(by_transformers(model, spoken), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_answers_behind_one_prompt_score_as_if_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 300, length).tolist() for length in (20, 7, 33)]
    answers = [[generator.integers(3, 300, length).tolist() for length in (1, 4, 6)[: 3 - row % 2]] for row in range(3)]
    where = ["a", "b", "c"]
    told: list[tuple] = []
    found = score_answers(model, prompts, answers, where, progress=lambda *state: told.append(state), stage="here")
    assert told[-1] == ("here", 3, 3)
    for prompt, own, row in zip(prompts, answers, found, strict=True):
        for answer, score in zip(own, row, strict=True):
            example = Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), [], "", None, "")
            assert score == pytest.approx(by_transformers(model, example), rel=1e-4)
    monkeypatch.setattr(scores, "CANDIDATE_TOKENS", 1)
    again = score_answers(model, prompts, answers, where)
    assert all(np.allclose(one, other, rtol=1e-4) for one, other in zip(found, again, strict=True))


def test_a_shared_prompt_is_computed_once() -> None:
    prompt = list(range(3, 103))
    candidates = [Example([*prompt, 200 + n], [False] * 100 + [True], prompt, "", None, "") for n in range(20)]
    packs = pack_examples(candidates, max_tokens=2048, share=True)
    assert [pack.tokens for pack in packs] == [100]  # the answers themselves are only predicted


def test_prompts_that_cannot_be_scored_are_named() -> None:
    model = tiny_model("gpt2")
    message = (
        "rows whose answers are scored need a prompt and fit the model's 256 positions; these do not:\n"
        "  - a has an empty prompt\n  - b has 258 tokens with its longest answer\nLeave these rows out."
    )
    with pytest.raises(DataError, match=re.escape(message)):
        score_answers(model, [[], [5] * 255, [5]], [[[1], [2]], [[1], [1, 2, 3]], [[1], [2]]], ["a", "b", "c"])


def test_scores_that_are_not_finite_are_an_error() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericError, match="the log-likelihood of an answer must be finite; row 3 has nan"):
        score_answers(model, [[5, 6]], [[[7], [8]]], ["row 3"])
