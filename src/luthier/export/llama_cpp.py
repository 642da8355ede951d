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

    Raises ModelError if llama.cpp does not open them.
    """

    def __init__(self, path: Path, positions: int, *, adapter: Path | None = None):
        from llama_cpp import GGML_TYPE_F32, Llama

        self.name = f"llama.cpp (llama-cpp-python {version('llama_cpp_python')})"
        try:
            self._llama: Any = Llama(
                model_path=str(path),
                lora_path=None if adapter is None else str(adapter),
                n_ctx=positions,
                n_threads=torch.get_num_threads(),
                logits_all=True,
                type_k=GGML_TYPE_F32,
                type_v=GGML_TYPE_F32,
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
        self._llama.reset()
        self._llama.eval(list(ids))
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
        self._llama.reset()
        self._llama.eval(list(prompt))
        answer: list[int] = []
        for token in self._likeliest(max_new_tokens):
            if token in stops:
                break
            answer.append(token)
            if len(answer) < max_new_tokens:
                self._llama.eval([token])
        return answer

    def _likeliest(self, count: int) -> Iterator[int]:
        for _ in range(count):
            yield int(np.argmax(self._llama.scores[self._llama.n_tokens - 1]))

    def close(self) -> None:
        self._llama.close()
