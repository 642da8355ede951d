"""Tokenizers of GGUF files: byte-level and SentencePiece vocabularies, special tokens, templates, the cache, bad lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_tiny import random_model, vocabulary, write_gguf, write_vocabulary
from tiny import CHATML, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from luthier.errors import ModelError, PreflightError
from luthier.models import tokenizer as tokenizer_module
from luthier.models.cache import discard, seal
from luthier.models.gguf_file import read_gguf
from luthier.models.gguf_tokenizer import PATTERNS
from luthier.models.load import load_tokenizer
from luthier.models.tokenizer import gguf_tokenizer

TEXTS = [
    "Book a table for two at noon, please.",
    '{"intent": "play", "slots": {"year": "1964"}}',
    "  two  blanks\n\n\tand a tab ",
    "naïve 日本 🙂 \x00",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]

BYTES = [f"<0x{number:02X}>" for number in range(256)]
PIECES = [
    "▁",
    "h",
    "e",
    "l",
    "o",
    "w",
    "r",
    "d",
    "he",
    "ll",
    "hell",
    "hello",
    "▁w",
    "or",
    "▁wor",
    "ld",
    "▁world",
    "▁hello",
    "▁▁",
]


def sentencepiece(architecture: str, **keys: Any) -> dict[str, Any]:
    """A small SentencePiece vocabulary: three control tokens, the bytes, then pieces, best first."""
    control = ["<unk>", "<s>", "</s>", "<|end|>"]
    tokens = [*control, "<table>", *BYTES, *PIECES]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (5 + 256) + [float(-index) for index in range(len(PIECES))],
        "tokenizer.ggml.token_type": [2, 3, 3, 3, 4] + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    } | keys


def byte_level(**keys: Any) -> dict[str, Any]:
    return vocabulary() | keys


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def convert(path: Path, architecture: str, metadata: dict[str, Any], rows: int = 512) -> PreTrainedTokenizerBase:
    return gguf_tokenizer(read_gguf(write_vocabulary(path / "vocabulary.gguf", architecture, metadata, rows)))


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)


def test_byte_level_equals_the_tokenizer_it_was_made_from(tmp_path: Path) -> None:
    original, converted = tiny_tokenizer(), convert(tmp_path, "llama", byte_level())
    for text in TEXTS:
        ids = original(text).input_ids
        assert converted(text).input_ids == ids
        assert converted.decode(ids) == text
    roles = ("bos_token", "eos_token", "pad_token", "unk_token")
    assert [getattr(converted, role) for role in roles] == [getattr(original, role) for role in roles]
    assert converted.padding_side == "right"
    messages = [{"role": "user", "content": "hi"}]
    assert converted.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(messages, tokenize=False)
    assert converted.chat_template == CHATML


CUTS = {
    "gpt-2": ["don", "'t", " SAY", "'", "LL", " 1234", " ", " 5", " fooBar", "!!", "\n\n"],
    "smollm": ["don", "'t", " SAY", "'", "LL", " ", "1", "2", "3", "4", "  ", "5", " fooBar", "!!", "\n\n"],
    "llama-bpe": ["don", "'t", " SAY", "'LL", " ", "123", "4", " ", " ", "5", " fooBar", "!!\n\n"],
    "qwen2": ["don", "'t", " SAY", "'LL", " ", "1", "2", "3", "4", " ", " ", "5", " fooBar", "!!\n\n"],
    "tekken": ["don", "'t", " SAY", "'LL", " ", "1", "2", "3", "4", " ", " ", "5", " foo", "Bar", "!!\n\n"],
    "gpt-4o": ["don't", " SAY'LL", " ", "123", "4", " ", " ", "5", " foo", "Bar", "!!\n\n"],
}


@pytest.mark.parametrize("kind", CUTS)
def test_how_text_is_cut(tmp_path: Path, kind: str) -> None:
    """The cuts of each kind, on text where they differ."""
    converted = convert(tmp_path, "llama", byte_level(**{"tokenizer.ggml.pre": kind}))
    text = "don't SAY'LL 1234  5 fooBar!!\n\n"
    cuts = [text[start:end] for _, (start, end) in converted.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert cuts == CUTS[kind]


def test_every_known_kind_builds(tmp_path: Path) -> None:
    for kind in PATTERNS:
        converted = convert(
            tmp_path, "llama", byte_level(**{"tokenizer.ggml.pre": kind, "tokenizer.ggml.add_bos_token": False})
        )
        for text in TEXTS[:3]:
            assert converted.decode(converted(text).input_ids) == text


def test_beginnings_and_ends(tmp_path: Path) -> None:
    def ends(**keys: bool) -> list[int]:
        named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        ids = convert(tmp_path, "llama", byte_level(**{"tokenizer.ggml.pre": "qwen2"}, **named))("a").input_ids
        return [ids[0], ids[-1]]

    (letter,) = tiny_tokenizer()("a").input_ids
    assert ends() == [letter, letter]
    assert ends(add_bos_token=True) == [1, letter]
    assert ends(add_bos_token=True, add_eos_token=True) == [1, 2]
    assert convert(tmp_path, "llama", byte_level(**{"tokenizer.ggml.pre": "llama-bpe"}))("a").input_ids == [1, letter]


def test_qwen_composes_accents(tmp_path: Path) -> None:
    converted = convert(tmp_path, "qwen2", byte_level(**{"tokenizer.ggml.pre": "qwen2"}))
    assert converted("e\u0301").input_ids == converted("\u00e9").input_ids


def test_llama_sentencepiece(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", sentencepiece("llama"))
    assert pieces(converted, "hello world") == ["▁hello", "▁world"]
    assert pieces(converted, "hello  world") == ["▁hello", "▁", "▁world"]
    assert pieces(converted, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert pieces(converted, "hello<|end|>hello<table>") == ["▁hello", "<|end|>", "▁hello", "<table>"]
    assert converted("hello").input_ids == [1, converted.convert_tokens_to_ids("▁hello")]
    assert converted.decode(converted("hello world é").input_ids, skip_special_tokens=True) == "hello world é"
    assert converted.pad_token == converted.eos_token == "</s>"
    assert {"<s>", "</s>", "<unk>"} <= set(converted.all_special_tokens)


def test_no_control_token_comes_of_merging(tmp_path: Path) -> None:
    metadata = sentencepiece("llama")
    metadata["tokenizer.ggml.tokens"] += ["<", "s", ">", "s>"]
    metadata["tokenizer.ggml.scores"] += [-1.0] * 4
    metadata["tokenizer.ggml.token_type"] += [1] * 4
    converted = convert(tmp_path, "llama", metadata)
    ids = converted.backend_tokenizer.model.tokenize("<s>")
    assert [token.value for token in ids] == ["<", "s>"]


def test_without_a_blank_in_front(tmp_path: Path) -> None:
    converted = convert(tmp_path, "llama", sentencepiece("llama", **{"tokenizer.ggml.add_space_prefix": False}))
    assert pieces(converted, "hello world") == ["hello", "▁world"]
    assert converted.decode(converted(" hello").input_ids, skip_special_tokens=True) == " hello"


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_gemma_sentencepiece(tmp_path: Path, architecture: str) -> None:
    metadata = sentencepiece(architecture)
    metadata["tokenizer.ggml.tokens"] = [token.replace("▁▁", "  ") for token in metadata["tokenizer.ggml.tokens"]]
    converted = convert(tmp_path, architecture, metadata)
    assert pieces(converted, "hello world") == ["hello", "▁world"]
    assert pieces(converted, "hello  world") == ["hello", "▁", "▁world"]
    assert pieces(converted, "hello  ") == ["hello", "▁▁"]
    assert converted("hello").input_ids[0] == 1
    assert converted.decode(converted("hello  world é").input_ids, skip_special_tokens=True) == "hello  world é"


def test_phi3_drops_blanks_after_control_tokens(tmp_path: Path) -> None:
    converted = convert(tmp_path, "phi3", sentencepiece("phi3"))
    assert pieces(converted, "<|end|>\n hello") == ["<|end|>", "▁hello"]
    assert pieces(converted, "<s> hello") == ["<s>", "▁", "▁hello"]
    llama = convert(tmp_path, "llama", sentencepiece("llama"))
    assert pieces(llama, "<|end|> hello") == ["<|end|>", "▁", "▁hello"]


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "extra", "garbage", "forged", "file"])
def test_a_damaged_one_is_converted_again(tmp_path: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    first = convert(tmp_path, "llama", byte_level())
    (kept,) = (cache / "tokenizers").iterdir()
    file = kept / "tokenizer.json"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        (kept / "added_tokens.json").write_text("{}")
    elif damage == "file":
        discard(kept)
        kept.write_text("garbage")
    else:
        file.write_text("{" if damage == "garbage" else "{}")
        seal(kept)
    again = convert(tmp_path, "llama", byte_level())
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert f"The tokenizer kept in {kept} was damaged; it is removed and converted again." in caplog.text
    caplog.clear()
    convert(tmp_path, "llama", byte_level())
    assert caplog.text == ""


def test_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    first = load_tokenizer(str(path))
    assert len(list((cache / "tokenizers").iterdir())) == 1

    def must_not_run(_file: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(tokenizer_module, "build_tokenizer", must_not_run)
    other = write_gguf(tmp_path / "other.gguf", random_model("llama", seed=1), "llama")  # other weights, same vocabulary
    assert load_tokenizer(str(other))("Book").input_ids == first("Book").input_ids
    assert [path.name for path in (cache / "tokenizers").iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    monkeypatch.setenv("LUTHIER_CACHE", str(cache))
    changed = write_gguf(tmp_path / "changed.gguf", random_model("llama"), "llama", **{"tokenizer.chat_template": "{{ 1 }}"})
    assert load_tokenizer(str(changed)).chat_template == "{{ 1 }}"


def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    with pytest.raises(PreflightError, match=r"the cache must be a folder that can be written to; .* Set LUTHIER_CACHE"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "must be gpt2 or llama; got 'bert'"),
        ({"tokenizer.ggml.pre": "chatglm-bpe"}, "tokenizer.ggml.pre must be one of .*; got 'chatglm-bpe'"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "tokenizer.ggml.tokens must be a list of str"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokens, 2 types and"),
        ({"tokenizer.ggml.eos_token_id": 100_000}, "tokenizer.ggml.eos_token_id is 100000"),
        ({"tokenizer.ggml.merges": ["q zz"]}, "merge 'q zz' is not of tokens"),
        ({"tokenizer.ggml.merges": ["ab"]}, "merge 'ab' is not of tokens"),
    ],
)
def test_lists_that_make_no_tokenizer(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        convert(tmp_path, "llama", byte_level(**keys))


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the embedding only 100 rows"):
        convert(tmp_path, "llama", byte_level(), rows=100)


def test_a_token_twice(tmp_path: Path) -> None:
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"][-1] = metadata["tokenizer.ggml.tokens"][-2]
    with pytest.raises(ModelError, match="a token appears twice"):
        convert(tmp_path, "llama", metadata)
