"""Which examples make up a step, and the seed of its randomness: pure functions of (seed, number), whatever runs them."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(purpose: str, seed: int, number: int) -> int:
    """A seed of 63 bits from sha256("purpose:seed:number"), so that neighbouring numbers share nothing."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def epoch_order(seed: int, epoch: int, rows: int) -> list[int]:
    """The permutation of range(rows) in which epoch `epoch` (from 0) draws the rows."""
    generator = torch.Generator().manual_seed(derived_seed("order", seed, epoch))
    return torch.randperm(rows, generator=generator).tolist()


class Order:
    """The endless stream of rows: one permutation after another. Position p is row p % rows of epoch p // rows."""

    def __init__(self, seed: int, rows: int):
        self.seed = seed
        self.rows = rows
        self._epoch = -1
        self._permutation: list[int] = []

    def row_numbers(self, start: int, stop: int) -> list[int]:
        """The rows at positions start .. stop - 1. Keeps only the permutation used last."""
        numbers = []
        for position in range(start, stop):
            epoch, index = divmod(position, self.rows)
            if epoch != self._epoch:
                self._epoch, self._permutation = epoch, epoch_order(self.seed, epoch, self.rows)
            numbers.append(self._permutation[index])
        return numbers
