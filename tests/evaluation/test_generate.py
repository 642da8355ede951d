"""Batched greedy answers equal Transformers' own generation of each prompt alone, and end where they should."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.data import Renderer
from luthier.errors import DataError
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.pieces import text_of
from luthier.evaluation.stops import end_tokens
from luthier.generation import generator

LENGTHS = [3, 40, 3, 11, 57, 1, 24]  # some longer than the tiny models' window of 32


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def some_prompts(tokenizer) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, len(tokenizer), (length,), generator=generator).tolist() for length in LENGTHS]


def alone(model, prompt: list[int], stops: list[int], tokens: int) -> list[int]:
    """One answer by model.generate, end token left out."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=stops, pad_token_id=0)
    answer = output[0, len(prompt) :].tolist()
    return answer[:-1] if answer and answer[-1] in stops else answer


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_each_prompt_alone_and_rows_end_at_different_times(family: str, tokenizer) -> None:
    model = tiny_model(family, seed=2)
    prompts = some_prompts(tokenizer)
    free = [alone(model, prompt, [2], 24) for prompt in prompts]
    stops = sorted({2, *(answer[len(answer) // 2] for answer in free[:3] if answer)})
    model.generation_config.eos_token_id = stops
    expected = [alone(model, prompt, stops, 24) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    assert generate_batch(model, tokenizer, prompts, max_new_tokens=24) == [text_of(tokenizer, ids) for ids in expected]


@pytest.mark.parametrize("family", ["mamba", "bloom", "lfm2"])
def test_families_of_another_kind(family: str, tokenizer) -> None:
    """ALiBi, a state-space model, and one that mixes convolutions with attention: prompt by prompt."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "n_layer": 2, "n_head": 4, "vocab_size": 400}
    if family == "lfm2":
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
    config = AutoConfig.for_model(family, **sizes, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = some_prompts(tokenizer)[:3]
    expected = [text_of(tokenizer, alone(model, prompt, [2], 8)) for prompt in prompts]
    assert generate_batch(model, tokenizer, prompts, max_new_tokens=8) == expected


def test_batches_stay_within_their_bounds_and_keep_the_order(tokenizer, monkeypatch) -> None:
    model = tiny_model("llama", seed=2)
    prompts = some_prompts(tokenizer)
    expected = generate_batch(model, tokenizer, prompts, max_new_tokens=6)
    seen = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(generator, "PROMPT_TOKENS_AT_ONCE", 60)
    progress = []
    answers = generate_batch(model, tokenizer, prompts, max_new_tokens=6, progress=lambda *state: progress.append(state))
    assert answers == expected
    prefills = [shape for shape in seen if shape[1] > 1]
    assert prefills[0] == (1, 57)
    assert max(rows * length for rows, length in prefills) <= 60
    assert progress == [("generating", done, 7) for done in range(1, 8)]
    monkeypatch.setattr(generator, "CACHE_BYTES_AT_ONCE", 1)
    assert generate_batch(model, tokenizer, prompts, max_new_tokens=6) == expected


def test_rows_that_have_ended_leave_the_batch(tokenizer) -> None:
    model = tiny_model("llama", seed=2)
    prompts = some_prompts(tokenizer)
    free = [alone(model, prompt, [2], 12) for prompt in prompts]
    model.generation_config.eos_token_id = [2, free[0][2]]
    rows = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    generate_batch(model, tokenizer, prompts, max_new_tokens=12)
    assert rows[0] == 7
    assert rows[-1] < 7
    assert rows == sorted(rows, reverse=True)


def test_an_answer_ends_where_the_positions_end(tokenizer) -> None:
    model = tiny_model("gpt2")
    prompt = some_prompts(tokenizer)[0] * 84  # 252 of 256 positions
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    expected = text_of(tokenizer, alone(model, prompt, [2], 4))
    assert generate_batch(model, tokenizer, [prompt], max_new_tokens=50) == [expected]


def test_prompts_that_cannot_be_answered_are_named(tokenizer) -> None:
    with pytest.raises(DataError, match=r"1 to 255 tokens, the model having 256 positions; got:\n  - prompt 2 is empty\n"):
        generate_batch(tiny_model("gpt2"), tokenizer, [[5], [], [5] * 256], max_new_tokens=3)


def test_no_prompts_no_answers(tokenizer) -> None:
    assert generate_batch(tiny_model("llama"), tokenizer, [], max_new_tokens=3) == []


def test_the_template_says_how_an_answer_ends() -> None:
    """Every source counts: the generation configuration, the tokenizer's eos and the template's end of turn."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [7]
    tokenizer.eos_token = "<|endoftext|>"
    assert end_tokens(model, tokenizer, Renderer(tokenizer, max_length=64)) == {0, 2, 7}
    tokenizer.chat_template = None
    model.config.eos_token_id = None
    assert end_tokens(model, tokenizer, Renderer(tokenizer, max_length=64)) == {0, 7}
