"""Tiny random models of every family, with a real byte-level tokenizer, written as ordinary Transformers folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "olmo2")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "Book a table for two at noon, please.",
    '{"intent": "play", "slots": {"artist": "Nina Simone", "year": "1964"}}',
    "The quick brown fox jumps over the lazy dog. 0123456789 user assistant system",
] * 4


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 tokens with ChatML's control tokens and template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(family: str, tied: bool | None = None, vocabulary: int = 512) -> object:
    """A config of `family` with 2 layers, hidden size 64 and grouped queries where the family has them."""
    common = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if tied is not None:
        common["tie_word_embeddings"] = tied
    if family == "gpt2":
        return AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=256, **common)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    if family != "gpt_neox":
        sizes["num_key_value_heads"] = 2
    if family in ("gemma2", "gemma3", "qwen3"):
        sizes["head_dim"] = 16
    if family in ("gemma2", "gemma3", "mistral"):
        sizes["sliding_window"] = 32
    name = "gemma3_text" if family == "gemma3" else family
    return AutoConfig.for_model(name, **sizes, **common)


def tiny_model(family: str, tied: bool | None = None, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A random Transformers model; norms and biases are random too, so that nothing is hidden by zeros and ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model.to(dtype).eval()


def write_tiny(
    folder: Path, family: str = "llama", tied: bool | None = None, dtype: torch.dtype = torch.float32, **save
) -> Path:
    """Write a tiny model and its tokenizer as a Transformers folder and return the folder."""
    tiny_model(family, tied, dtype).save_pretrained(folder, **save)
    tiny_tokenizer().save_pretrained(folder)
    return folder
