"""The embedded default model as it is: tokenizer, template, answers."""

from __future__ import annotations

import pytest
import torch

from luthier.models.load import load, load_tokenizer

pytestmark = pytest.mark.model


def test_tokenizer_and_template() -> None:
    tokenizer = load_tokenizer("smollm2-135m", offline=True)
    assert len(tokenizer) == 49152
    assert tokenizer("<|im_end|>").input_ids == [2]
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello  123").input_ids) == ["Hello", "ĠĠ", "1", "2", "3"]
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert rendered == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    text = "naïve 日本 🙂\t\n  x = 3.14;"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_answers() -> None:
    loaded = load("smollm2-135m", offline=True)
    assert loaded.notes == [loaded.source.note]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = loaded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = loaded.model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert ids[0, -1] == 2
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
