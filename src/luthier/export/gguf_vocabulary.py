"""A tokenizer as the metadata of a GGUF file: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).

Source: gguf.md, "Tokenizer". How text is cut before merging is known by name in llama.cpp; here the name follows from the
tokenizer's own steps, and a tokenizer whose steps have no name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from luthier.errors import ModelError
from luthier.models.gguf_file import read_gguf
from luthier.models.gguf_tokenizer import (
    BYTE,
    COMPOSED,
    CONTROL,
    GPT2,
    NORMAL,
    PATTERNS,
    SINGLE_DIGITS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    WHOLE_WORDS_FIRST,
    build_tokenizer,
)

NO_MERGE_SCORE = -1e6
# Text that tokenizers are apt to cut differently.
PROBES = (
    "Hello world", " two  spaces   three", "tab\tand\nnew\n\nlines\r\n", "12345 3.14 1,000", "it's they'll I'M",
    "naïve café Ünïcödé", "日本語 中文 한국어", "emoji 🙂👍🏽", "{\"key\": [1, 2.5e-3]}", "x_1 += foo(bar)/2;", "", "a",
)  # fmt: skip


def gguf_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, end_of_turn: int | None) -> dict[str, Any]:
    """The tokenizer.* keys of a model whose embedding has `rows` rows; rows beyond the vocabulary become unused tokens.

    end_of_turn: the id that ends an answer, where that is another than the tokenizer's end-of-sequence token.
    Raises ModelError for a tokenizer that GGUF files cannot hold, saying why.
    """
    state = _state(tokenizer)
    kind = _kind(state)
    tokens, types = _tokens(tokenizer, state, rows, kind)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": _pre_name(state) if kind == "gpt2" else "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if kind == "gpt2":
        metadata["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(state)]
    else:
        metadata["tokenizer.ggml.scores"] = _scores(state, tokens, types)
    metadata |= _special_ids(tokenizer, end_of_turn) | _flags(tokenizer, kind)
    template = tokenizer.chat_template
    if isinstance(template, str):
        metadata["tokenizer.chat_template"] = template
    return metadata


def copied_vocabulary(path: Path) -> dict[str, Any]:
    """The tokenizer.* keys of a GGUF file, as they are."""
    return {key: value for key, value in read_gguf(path).metadata.items() if key.startswith("tokenizer.")}


def check_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Raise ModelError if the tokenizer in the GGUF file cuts one of `texts` or of PROBES otherwise than `tokenizer`, has
    another end of sequence, or another chat template."""
    ours = build_tokenizer(read_gguf(path))
    for text in (*PROBES, *texts):
        for special in (False, True):
            got, wanted = (one(text, add_special_tokens=special).input_ids for one in (ours, tokenizer))
            if got != wanted:
                raise ModelError(
                    f"the file's tokenizer must cut text as the model's does; on {text[:60]!r} it gives {got[:12]}, the "
                    f"model's {wanted[:12]}. The model's tokenizer has steps that GGUF cannot hold; try --to merged."
                )
    for role in ("eos_token_id", "bos_token_id"):
        if getattr(ours, role) != getattr(tokenizer, role):
            raise ModelError(f"{role} must stay {getattr(tokenizer, role)}; in the file it is {getattr(ours, role)}.")
    template = tokenizer.chat_template
    if isinstance(template, str) and ours.chat_template != template:
        raise ModelError("the chat template must stay as it is; in the file it is another.")


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("a GGUF file is made from a fast tokenizer (tokenizer.json); this model has none. Try --to merged.")
    return json.loads(backend.to_str())


def _kind(state: dict[str, Any]) -> str:
    model = state["model"]
    if model["type"] != "BPE":
        raise ModelError(f"GGUF files hold BPE tokenizers; this one is {model['type']}. Try --to merged.")
    if any(step["type"] == "ByteLevel" for step in _steps(state["pre_tokenizer"])):
        return "gpt2"
    if model.get("byte_fallback"):
        return "llama"
    raise ModelError("GGUF files hold byte-level BPE, or BPE that falls back to bytes; this one does neither. Try --to merged.")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences laid flat."""
    if part is None:
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [step for one in inner for step in _steps(one)] if inner else [part]


def _pre_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for how text is cut: found by the patterns and flags of the steps."""
    steps = _steps(state["pre_tokenizer"])
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    digits = any(step["type"] == "Digits" and step["individual_digits"] for step in steps)
    known = {"Split", "Digits", "ByteLevel"}
    whole = bool(state["model"].get("ignore_merges"))
    composed = any(step["type"] == "NFC" for step in _steps(state["normalizer"]))
    pattern = patterns[0] if patterns else GPT2
    for name, text in PATTERNS.items():
        fits = text == pattern and (name in SINGLE_DIGITS) == digits and (name in WHOLE_WORDS_FIRST) == whole
        if fits and (name in COMPOSED) == composed and len(patterns) < 2 and {step["type"] for step in steps} <= known:
            return name
    raise ModelError(
        f"llama.cpp knows how to cut text by name, and none fits this tokenizer: {patterns or 'GPT-2 rules'}, digits apart "
        f"{digits}, whole words first {whole}. Try --to merged."
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], rows: int, kind: str) -> tuple[list[str], list[int]]:
    """Text and type of each id from 0 to rows - 1."""
    token_of = {index: token for token, index in tokenizer.get_vocab().items()}
    largest = max(token_of, default=-1)
    if largest >= rows:
        raise ModelError(
            f"a token must have a row in the embedding; the last one is {largest}, of {rows} rows. Use the tokenizer that "
            "belongs to the model."
        )
    added = {token["id"]: token for token in state["added_tokens"]}
    unknown = state["model"].get("unk_token")
    tokens, types = [], []
    for index in range(rows):
        token = token_of.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(UNUSED)
            continue
        if kind == "llama" and token == unknown:
            types.append(UNKNOWN)
        elif index in added:
            types.append(CONTROL if added[index]["special"] else USER_DEFINED)
            token = token.replace(SPACE, " ") if kind == "llama" and types[-1] == USER_DEFINED else token
        else:
            types.append(BYTE if kind == "llama" and _is_byte(token) else NORMAL)
        tokens.append(token)
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(state: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges in their order; older tokenizer files write each as one string."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in state["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _scores(state: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """llama.cpp merges the pair whose token has the highest score: minus the rank of the first merge that makes it."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(_merges(state)):
        rank.setdefault(left + right, number)
    return [
        float(-rank[token]) if kind in (NORMAL, USER_DEFINED) and token in rank else (NO_MERGE_SCORE if kind == NORMAL else 0.0)
        for token, kind in zip(tokens, types, strict=True)
    ]


def _special_ids(tokenizer: PreTrainedTokenizerBase, end_of_turn: int | None) -> dict[str, Any]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "eot": end_of_turn,
    }
    return {f"tokenizer.ggml.{role}_token_id": index for role, index in ids.items() if index is not None}


def _flags(tokenizer: PreTrainedTokenizerBase, kind: str) -> dict[str, Any]:
    """Whether a text gets bos before it and eos after it, and whether a blank is put before it: asked of the tokenizer."""
    bare, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    flags = {
        "tokenizer.ggml.add_bos_token": len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id,
        "tokenizer.ggml.add_eos_token": len(whole) > len(bare) and whole[-1] == tokenizer.eos_token_id,
    }
    first = tokenizer.convert_ids_to_tokens(bare)[0]
    flags["tokenizer.ggml.add_space_prefix"] = first.startswith(SPACE if kind == "llama" else "Ġ")
    return flags
