"""llama.cpp as the judge of a GGUF file, through llama-cpp-python (extra `llamacpp`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.data.packing import Pack
from luthier.errors import ModelError


def is_installed() -> bool:
    """Whether the extra `llamacpp` is there. Nothing is imported."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCpp:
    """A GGUF file, and an adapter file on it, opened by llama.cpp on the CPU. positions: tokens in the longest row.

    exact_cache: keys and values are kept in float32, which tells a wrong file from rounding; llama.cpp's default is float16.
    Raises ModelError if llama.cpp does not open them.
    """

    def __init__(self, path: Path, positions: int, *, adapter: Path | None = None, exact_cache: bool = True):
        from llama_cpp import GGML_TYPE_F32, Llama

        cache_type = GGML_TYPE_F32 if exact_cache else None
        self.name = f"llama.cpp (llama-cpp-python {version('llama_cpp_python')})"
        try:
            self._llama: Any = Llama(
                model_path=str(path),
                lora_path=None if adapter is None else str(adapter),
                n_ctx=positions,
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                logits_all=True,
                type_k=cache_type,
                type_v=cache_type,
                n_gpu_layers=0,
                verbose=False,
            )
        except (ValueError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"llama.cpp must open {path.name}; it said: {reason}. Export it again.") from error

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """How llama.cpp cuts a text. special: begin and end tokens are added, and control tokens in it are recognised."""
        return self._llama.tokenize(text.encode(), add_bos=special, special=special)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, vocabulary) float32 of one text."""
        self._evaluate(ids)
        return torch.from_numpy(np.array(self._llama.scores[: len(ids)], dtype=np.float32))

    def pack_logits(self, pack: Pack) -> Tensor:
        """Logits at the pack's predicting positions, (S, vocabulary), each of its texts alone."""
        bounds = pack.starts.tolist()
        found = []
        for first, end in pairwise(bounds):
            own = pack.predict[(pack.predict >= first) & (pack.predict < end)] - first
            if len(own):
                found.append(self.logits(pack.ids[first:end].tolist())[own])
        return torch.cat(found)

    def answer(self, prompt: Sequence[int], max_new_tokens: int, stops: Collection[int]) -> list[int]:
        """The likeliest next token again and again, end tokens left out."""
        self._evaluate(prompt)
        answer: list[int] = []
        for token in self._likeliest(max_new_tokens):
            if token in stops:
                break
            answer.append(token)
            if len(answer) < max_new_tokens:
                self._llama.eval([token])
        return answer

    def _evaluate(self, ids: Sequence[int]) -> None:
        """Make `ids` the text so far. What it begins with in common with the text before is not computed again."""
        before = self._llama.input_ids[: self._llama.n_tokens].tolist()
        shared = next(
            (n for n, (old, new) in enumerate(zip(before, ids, strict=False)) if old != new), min(len(before), len(ids))
        )
        self._llama.n_tokens = shared
        self._llama.eval(list(ids[shared:]))

    def _likeliest(self, count: int) -> Iterator[int]:
        for _ in range(count):
            yield int(np.argmax(self._llama.scores[self._llama.n_tokens - 1]))

    def close(self) -> None:
        self._llama.close()
