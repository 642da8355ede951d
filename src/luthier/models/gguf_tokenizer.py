"""The tokenizer of a GGUF file, from its metadata.

Two kinds: `gpt2`, byte-level BPE with the file's merges, and `llama`, SentencePiece's BPE, whose merges follow from the
scores. Source: gguf.md, "Tokenizer"; llama.cpp src/llama-vocab.cpp for how text is cut before merging.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier.errors import ModelError
from luthier.models.gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MAX_TOKEN_CHARACTERS = 4096
SPACE = "▁"

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"]

# How text is cut, by tokenizer.ggml.pre. "" stands for GPT-2's own pattern, which the byte-level step brings along.
GPT2 = ""
LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
GPT4O = rf"{_WORDS[0]}{_CONTRACTION}?|{_WORDS[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
PATTERNS = {
    **dict.fromkeys(("gpt-2", "default", "smollm", "starcoder", "refact", "command-r", "codeshell"), GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
    "tekken": TEKKEN,
    "gpt-4o": GPT4O,
}
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word in the vocabulary is taken without merging
BEGIN_BY_DEFAULT = WHOLE_WORDS_FIRST
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # Unicode NFC first

# Phi-3 drops the blanks after its control tokens, except after these.
PHI3_KEEPS_BLANKS = ("<unk>", "<s>", "<|endoftext|>")


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase:
    """The tokenizer with its special tokens and chat template. Raises ModelError naming what is missing or not supported."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"{file.path}: tokenizer.ggml.model must be gpt2 or llama; got {kind!r}. Try its Transformers folder.")
    vocabulary = _Vocabulary(file)
    backend = _byte_level(vocabulary) if kind == "gpt2" else _sentencepiece(vocabulary)
    backend.add_special_tokens(vocabulary.control_tokens())
    backend.add_tokens(vocabulary.user_tokens())
    by_default = file.metadata.get("tokenizer.ggml.pre") in BEGIN_BY_DEFAULT if kind == "gpt2" else True
    _add_ends(backend, vocabulary, by_default)
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {role: vocabulary.token_of(name) for role, name in roles.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{role: token for role, token in special.items() if token is not None},
    )
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


class _Vocabulary:
    """The checked lists of one file. Raises ModelError where they contradict each other or the embedding."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.architecture = file.metadata.get("general.architecture")
        self.tokens: list[str] = self._list("tokens", str, None)
        self.types: list[int] = self._list("token_type", int, [NORMAL] * len(self.tokens))
        self.scores: list[float] = self._list("scores", float, [0.0] * len(self.tokens))
        if self.architecture in ("gemma2", "gemma3"):
            # Runs of blanks stand as blanks in the file, where text has them as the mark by the time it is looked up.
            self.tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in self.tokens]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        embedding = file.tensors.get("token_embd.weight")
        if len(self.types) != len(self.tokens) or len(self.scores) != len(self.tokens):
            raise self._broken(
                f"{len(self.tokens)} tokens, {len(self.types)} types and {len(self.scores)} scores do not go together"
            )
        if len(self.ids) != len(self.tokens):
            raise self._broken("a token appears twice")
        longest = max(map(len, self.tokens), default=0)
        if longest > MAX_TOKEN_CHARACTERS:
            raise self._broken(f"a token has {longest} characters, more than {MAX_TOKEN_CHARACTERS}")
        if embedding is not None and len(self.tokens) > embedding.shape[0]:
            raise self._broken(f"it has {len(self.tokens)} tokens, the embedding only {embedding.shape[0]} rows")

    def _list(self, key: str, kind: type, default: list | None) -> list[Any]:
        values = self.file.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(values, list) or not all(type(value) is kind for value in values) or (default is None and not values):
            raise self._broken(f"tokenizer.ggml.{key} must be a list of {kind.__name__}")
        return values

    def _broken(self, what: str) -> ModelError:
        return ModelError(f"{self.file.path} does not hold a whole tokenizer: {what}. Download it again.")

    def token_of(self, role: str) -> str | None:
        """The token whose id is tokenizer.ggml.<role>_token_id, or None."""
        index = self.file.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if type(index) is not int or not 0 <= index < len(self.tokens):
            raise self._broken(f"tokenizer.ggml.{role}_token_id is {index!r}, of {len(self.tokens)} tokens")
        return self.tokens[index]

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.file.metadata.get(f"tokenizer.ggml.{name}", default))

    def control_tokens(self) -> list[AddedToken]:
        eats_blanks = self.architecture == "phi3" and self.file.metadata.get("tokenizer.ggml.model") == "llama"
        return [
            AddedToken(token, special=True, normalized=False, rstrip=eats_blanks and token not in PHI3_KEEPS_BLANKS)
            for token, kind in zip(self.tokens, self.types, strict=True)
            if token and kind in (CONTROL, UNKNOWN)
        ]

    def user_tokens(self) -> list[AddedToken]:
        pairs = zip(self.tokens, self.types, strict=True)
        return [AddedToken(token, special=False, normalized=False) for token, kind in pairs if token and kind == USER_DEFINED]

    def stated_merges(self) -> list[tuple[str, str]]:
        """The merges of a byte-level file, each `left right`, both in the vocabulary and so what they make."""
        merges = []
        for merge in self._list("merges", str, None):
            left, _, right = merge.partition(" ")
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise self._broken(f"merge {merge[:80]!r} is not of tokens")
            merges.append((left, right))
        return merges

    def derived_merges(self) -> list[tuple[str, str]]:
        """The merges of a SentencePiece vocabulary: every split of a token into two tokens, best token first.

        Gemma's scores do not follow the order of its merges; the order of its tokens does.
        """
        by_order = self.architecture in ("gemma2", "gemma3")
        ranked = []
        for index, token in enumerate(self.tokens):
            if self.types[index] not in (NORMAL, USER_DEFINED):
                continue
            rank = float(index) if by_order else -self.scores[index]
            for cut in range(1, len(token)):
                left, right = self.ids.get(token[:cut]), self.ids.get(token[cut:])
                if left is not None and right is not None:
                    ranked.append((rank, left, right))
        return [(self.tokens[left], self.tokens[right]) for _, left, right in sorted(ranked)]


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    kind = vocabulary.file.metadata.get("tokenizer.ggml.pre", "default")
    pattern = PATTERNS.get(kind) if isinstance(kind, str) else None
    if pattern is None:
        known = ", ".join(PATTERNS)
        raise ModelError(
            f"{vocabulary.file.path}: tokenizer.ggml.pre must be one of {known}; got {kind!r}. Try its Transformers folder."
        )
    backend = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=vocabulary.stated_merges(), ignore_merges=kind in WHOLE_WORDS_FIRST)
    )
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if kind in SINGLE_DIGITS else []
    if pattern != GPT2:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=vocabulary.flag("add_space_prefix", False), use_regex=pattern == GPT2)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if kind in COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    prefix = vocabulary.flag("add_space_prefix", vocabulary.architecture not in ("gemma2", "gemma3"))
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=vocabulary.derived_merges(),
            unk_token=vocabulary.token_of("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blanks = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), blanks]) if prefix else blanks
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _add_ends(backend: Tokenizer, vocabulary: _Vocabulary, begin_by_default: bool) -> None:
    """Put bos before and eos after a text where the file says so. By default bos only, where `begin_by_default`."""
    first = vocabulary.token_of("bos") if vocabulary.flag("add_bos_token", begin_by_default) else None
    last = vocabulary.token_of("eos") if vocabulary.flag("add_eos_token", False) else None
    if first is None and last is None:
        return
    ends = [(token, vocabulary.ids[token]) for token in dict.fromkeys((first, last)) if token is not None]
    single = [*([first] if first else []), "$A", *([last] if last else [])]
    pair = [*single, *([f"{first}:1"] if first else []), "$B:1", *([f"{last}:1"] if last else [])]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
