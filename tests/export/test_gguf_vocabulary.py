"""A tokenizer goes into a GGUF file and cuts text the same way when it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny import CORPUS, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from luthier.errors import ModelError
from luthier.export.gguf_model import add_value
from luthier.export.gguf_vocabulary import check_vocabulary, gguf_vocabulary
from luthier.models.gguf_tokenizer import GPT4O, LLAMA3, QWEN2, TEKKEN

ROWS = 700


def write(path: Path, metadata: dict[str, Any], architecture: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    writer.add_tensor("token_embd.weight", np.zeros((ROWS, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(steps: list[Any], *, whole: bool = False, composed: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if composed:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("gpt-2", byte_level([PLAIN])),
        ("smollm", byte_level([pre_tokenizers.Digits(individual_digits=True), PLAIN])),
        ("llama-bpe", byte_level(split(LLAMA3), whole=True)),
        ("qwen2", byte_level(split(QWEN2), composed=True)),
        ("tekken", byte_level(split(TEKKEN), whole=True)),
        ("gpt-4o", byte_level(split(GPT4O))),
    ],
)
def test_how_text_is_cut_is_found_from_the_tokenizers_steps(tmp_path: Path, name: str, tokenizer: Any) -> None:
    metadata = gguf_vocabulary(tokenizer, ROWS, None)
    assert metadata["tokenizer.ggml.pre"] == name
    assert len(metadata["tokenizer.ggml.tokens"]) == ROWS
    assert metadata["tokenizer.ggml.token_type"][:2] == [3, 3]
    assert metadata["tokenizer.ggml.token_type"][-1] == 5
    check_vocabulary(write(tmp_path / "one.gguf", metadata), tokenizer, CORPUS)


def sentencepiece(*, prefix: bool, bos: bool) -> PreTrainedTokenizerFast:
    """As Llama 2's tokenizer.json has it: BPE over blanks written as a mark, bytes for what is unknown."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special[:3], show_progress=False))
    state = backend.to_str()
    import json

    content = json.loads(state)
    learnt = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)[3:]
    content["model"]["vocab"] = {token: index for index, token in enumerate([*special, *learnt])}
    backend = Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("prefix", "bos"), [(True, True), (False, True), (True, False)])
def test_sentencepiece_bpe_gets_scores_from_its_merges(tmp_path: Path, prefix: bool, bos: bool) -> None:
    tokenizer = sentencepiece(prefix=prefix, bos=bos)
    metadata = gguf_vocabulary(tokenizer, ROWS, None)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert metadata["tokenizer.ggml.add_bos_token"] == bos
    assert metadata["tokenizer.ggml.add_space_prefix"] == prefix
    check_vocabulary(write(tmp_path / "one.gguf", metadata), tokenizer, CORPUS)


def test_added_tokens_and_the_end_of_a_turn(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    metadata = gguf_vocabulary(tokenizer, ROWS, 1)
    assert metadata["tokenizer.ggml.token_type"][tokenizer.convert_tokens_to_ids("<tool>")] == 4
    assert metadata["tokenizer.ggml.eot_token_id"] == 1
    assert metadata["tokenizer.chat_template"] == tokenizer.chat_template
    check_vocabulary(write(tmp_path / "one.gguf", metadata), tokenizer, ["call <tool> now", "<|im_start|>user\nhi<|im_end|>"])


def test_tokenizers_that_files_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llama\.cpp knows how to cut text by name, and none fits"):
        gguf_vocabulary(byte_level(split(r"\w+|\W+")), ROWS, None)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0)))
    with pytest.raises(ModelError, match="GGUF files hold BPE tokenizers; this one is Unigram"):
        gguf_vocabulary(unigram, ROWS, None)
    with pytest.raises(ModelError, match="a token must have a row in the embedding; the last one is"):
        gguf_vocabulary(tiny_tokenizer(), 100, None)
    other = gguf_vocabulary(tiny_tokenizer(), ROWS, None) | {"tokenizer.ggml.pre": "smollm"}
    with pytest.raises(ModelError, match="the file's tokenizer must cut text as the model's does"):
        check_vocabulary(write(tmp_path / "one.gguf", other), tiny_tokenizer(), ["year 1964 0123456789"])
