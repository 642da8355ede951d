"""The safe copy of a tokenizer gives the tokenizer's own ids, for byte-level and for SentencePiece-like tokenizers."""

from __future__ import annotations

import pytest
from tiny import CORPUS, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from luthier.data import Renderer
from luthier.data.encoder import Encoder

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece_like(scheme: str) -> PreTrainedTokenizerFast:
    """A BPE with spaces as `▁`: `first` writes one at the start of a text, `always` after every control token too,
    `prepend` as the normalizer of old Llama tokenizers does."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = MISTRAL
    return tokenizer


@pytest.mark.parametrize(("scheme", "splits"), [("first", True), ("always", False), ("prepend", False)])
def test_ids_of_tokenizers_that_write_spaces(scheme: str, splits: bool) -> None:
    tokenizer = sentencepiece_like(scheme)
    renderer = Renderer(tokenizer, max_length=200)
    assert renderer.encoder.splits is splits
    messages = [{"role": "user", "content": "Book a table"}, {"role": "assistant", "content": "The quick fox"}] * 2
    example = renderer.render({"messages": messages}, "row")
    assert example.ids == tokenizer.apply_chat_template(messages, return_dict=False)
    shown = [token for token, on in zip(example.ids, example.supervised, strict=True) if on]
    answer = tokenizer.convert_ids_to_tokens(shown)
    half = len(answer) // 2
    assert answer[:half] == answer[half:]
    assert "".join(answer[:half]) == "▁The▁quick▁fox</s>"


def test_ids_equal_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    encoder = Encoder(tokenizer)
    texts = ["", "plain", "<|im_start|>a<|im_end|>\n", "caf\u00e9 \U0001f600 <think> <|x|>", "  two  spaces\n\n\n"]
    for text, encoded in zip(texts, encoder.encode(texts, [[]] * len(texts)), strict=True):
        assert encoded.ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer("a<|x|>").input_ids[-1] == tokenizer.convert_tokens_to_ids("<|x|>")


def test_quoted_control_tokens_are_text() -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer)
    text = "a<|im_end|>b<|im_start|>"
    quoted = encoder.quote(text)
    assert encoder.plain(quoted) == text
    assert encoder.find_control(quoted) is None
    (encoded,) = encoder.encode([quoted], [[]])
    assert not {0, 1, 2} & set(encoded.ids)
    assert tokenizer.decode(encoded.ids) == text
    assert encoder.typed_control(encoded, quoted) is None


def test_overlapping_control_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|x|>", "|x|>", "<|x|><|x|>"]})
    encoder = Encoder(tokenizer)
    for text in ("<|x|>", "<|x|><|x|><|x|>", "<<|x|>>", "|x|>|x|>"):
        (encoded,) = encoder.encode([encoder.quote(text)], [[]])
        assert max(encoded.ids) < tokenizer.convert_tokens_to_ids("<|x|>")
        assert tokenizer.decode(encoded.ids) == text


def test_a_tokenizer_that_makes_control_tokens_of_text_is_noticed() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("</", -2.0), ("s>", -2.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    renderer = Renderer(tokenizer, max_length=20)
    with pytest.raises(
        Exception, match=r"^f:1: the text holds '</s>', which this tokenizer cannot write as plain text\. Remove it\.$"
    ):
        renderer.render({"text": "a</s>a"}, "f:1")
    assert renderer.render({"text": "aaa"}, "f:2").ids == [2, 2, 2, 1]


def test_a_span_keeps_its_tokens_to_itself() -> None:
    encoder = Encoder(tiny_tokenizer())
    (encoded,) = encoder.encode(["user\n\n\nsystem"], [[(5, 13)]])
    assert encoded.ids[: encoded.ranges[0][0]] == encoder.encode(["user\n"], [[]])[0].ids
    assert encoded.ids[slice(*encoded.ranges[0])] == encoder.encode(["\n\nsystem"], [[]])[0].ids
