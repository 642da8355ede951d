"""What a piece of tensor code holds in memory while it runs, counted at the tensors themselves."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within it, `now` is the size of all tensor memory made since it began that is still held, `peak` the most of it.

    Counts every storage once, from the operation that makes it until the last tensor or saved activation lets go of it.
    Scratch memory inside one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _key(leaf) not in inputs:
                self._add(leaf)
        self.peak = max(self.peak, self.now)
        return result

    def restart_peak(self) -> None:
        """Forget the highest point so far."""
        self.peak = self.now

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size_bytes = storage.nbytes()
        self.now += size_bytes
        weakref.finalize(storage, self._freed, key, size_bytes)

    def _freed(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.now -= size_bytes


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
