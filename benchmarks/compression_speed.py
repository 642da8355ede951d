"""Layers as two factors at half their numbers beside the dense layers: how many times faster, for a prompt and for one token.

    python benchmarks/compression_speed.py [--tokens 512,1] [--share 0.5] [--kinds bf16,nf4] [--rounds 15] [--json FILE]

Dense, plain factors and the pivoted form take turns in one process; a round lasts a hundredth of a second or more, and the
best round of each counts. Weights are random, x is float32, ranks are multiples of 16 as `compress` gives them. Promised: the
dense layer's multiply-adds over the factors', which is one over the share.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import describe_machine, write_json

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

SHAPES = ((576, 1536), (1536, 576), (576, 576), (2048, 2048))
ROUND_SECONDS = 0.01
STEP = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="512,1")
    parser.add_argument("--share", type=float, default=0.5, help="of the matrix's numbers that its factors have")
    parser.add_argument("--kinds", default="bf16,nf4")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for kind in options.kinds.split(","):
        for tokens in (int(one) for one in options.tokens.split(",")):
            for shape in SHAPES:
                rows.append(measured(shape, kind, tokens, options.share, options.rounds))
                print_row(rows[-1])
    if options.json:
        write_json(options.json, {"benchmark": "compression_speed", "environment": describe_machine(), "rows": rows})


def print_row(row: dict[str, Any]) -> None:
    faster = {name: row["dense"] / row[name] for name in ("factors", "pivoted")}
    print(
        f"{row['shape'][0]:5d} x {row['shape'][1]:<5d} {row['kind']:5s} T = {row['tokens']:<4d} dense {1e6 * row['dense']:9.1f}"
        f" us   two factors {faster['factors']:5.2f}x   pivoted {faster['pivoted']:5.2f}x",
        flush=True,
    )


def measured(shape: tuple[int, int], kind: str, tokens: int, share: float, rounds: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, shape[1], generator=generator)
    with torch.no_grad():
        runs = {name: (lambda own=matrix: own.matmul(x)) for name, matrix in matrices(shape, kind, share, generator).items()}
        best = alternating(runs, rounds)
    return {"shape": shape, "kind": kind, "tokens": tokens, **best}


def matrices(shape: tuple[int, int], kind: str, share: float, generator: Any) -> dict[str, Any]:
    import torch

    from luthier.compression.specs import rank_at
    from luthier.matrices import FactoredMatrix, stored

    def random(rows: int, columns: int) -> Any:
        return stored(torch.randn(rows, columns, generator=generator) / 16, kind)

    rows, columns = shape
    rank, pivots = int(share * rows * columns / (rows + columns)) // STEP * STEP, int(rank_at(shape, share)) // STEP * STEP
    places = torch.randperm(rows, generator=generator).to(torch.int32)
    return {
        "dense": random(rows, columns),
        "factors": FactoredMatrix(random(rows, rank), random(rank, columns)),
        "pivoted": FactoredMatrix(random(rows - pivots, pivots), random(pivots, columns), places=places),
    }


def alternating(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of one call of each, the best of `rounds`, taking turns."""
    repeats = {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(ROUND_SECONDS / (time.perf_counter() - start)))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats[name])
    return best


if __name__ == "__main__":
    main()
