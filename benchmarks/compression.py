"""Low rank at several ratios by several methods, and 4 bits with and without repair: perplexity of each.

    python benchmarks/compression.py --data c4.jsonl --text test.raw [--model M] [--ratios 10,20,40,60] [--methods ...]
                                     [--four-bit] [--bits-average 3] [--windows 48] [--eval-windows 24] [--heal STEPS]
                                     [--json FILE] [--plot FILE.svg]

A ratio is the share of the linear layers' numbers that is removed; head and embedding stay in 16 bits. Methods, each with all
that stands before it except where it says otherwise:

    svd          the best approximation of the weights, each layer alone, the same share of ranks everywhere
    asvd         inputs scaled by the root of their mean size (arXiv:2312.05821)
    whitened     the best approximation of the outputs on the calibration text, inputs of the original model (SVD-LLM)
    sequential   inputs as the compressed layers below give them; the pivoted form, which has room for more ranks
    weighted     tokens weighed by how much the loss feels them
    allocated    ranks given to where the loss feels them, by the knapsack

4-bit lines: NF4 at nearest codes, rounded in the metric, and repaired with factors of rank 8 to 64. `--heal` trains the last
method of each ratio, and NF4 repaired with factors in NF4, and prints each before and after. --bits-average: all linear
layers in so many bits a weight, by the allocator with every storage there is, and in one storage throughout.
Each line is built on a fresh copy of the model and calibrated on the same windows; those of `--text` are never calibrated on.
--json is written after every line. It keeps what is in FILE from earlier runs, so that the table can be made in parts: a line
replaces one of the same name, model, texts and windows. --plot draws those that have this run's model, texts and windows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import describe_machine, write_json
from compression_lines import METHODS, Bench, lines
from compression_plot import write_plot

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

# Of a row what is measured; all else says what it is of.
FIGURES = {"bits", "size_bytes", "loss", "perplexity", "seconds"}


def main() -> None:
    options = parse_options()
    kept, conditions, environment = rows_of(options.json), conditions_of(options), describe_machine()
    for row in lines(Bench(options), options):
        print_row(row)
        kept = merged(kept, {**row, **conditions})
        if options.json:
            write_json(options.json, {"benchmark": "compression", "environment": environment, "rows": kept})
    if options.plot:
        write_plot(options.plot, [row for row in kept if row.items() >= conditions.items()])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="calibration text, or rows")
    parser.add_argument("--text", required=True, help="text to measure perplexity on")
    parser.add_argument("--ratios", default="10,20,40,60", help="per cent of the linear layers' numbers removed")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--four-bit", action="store_true", help="the 4-bit lines too")
    parser.add_argument("--bits-average", type=float, help="lines for so many bits a weight of the linear layers")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--eval-windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--heal", type=int, default=0, help="steps of healing of the last method and the repairs in NF4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="perplexity over ratio")
    options = parser.parse_args()
    options.ratios = [float(one) / 100 for one in options.ratios.split(",") if one]
    return options


def conditions_of(options: argparse.Namespace) -> dict[str, Any]:
    """What a line's figures depend on beside its name and its ratio."""
    return {
        "model": options.model, "data": Path(options.data).name, "text": Path(options.text).name,
        "windows": options.windows, "window": options.window, "eval_windows": options.eval_windows,
    }  # fmt: skip


def rows_of(path: Path | None) -> list[dict[str, Any]]:
    """What earlier runs kept."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path is not None and path.exists() else []


def merged(kept: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with one more, in the place of that of the same line, ratio and conditions where there is one."""
    by_conditions = {tuple(sorted((key, one[key]) for key in one.keys() - FIGURES)): one for one in [*kept, row]}
    return list(by_conditions.values())


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['line']:34s} {100 * row['removed']:5.1f} % removed  {row['bits']:5.2f} bits  {row['size_bytes'] / 1e6:7.1f} MB  "
        f"perplexity {row['perplexity']:10.2f}  {row['seconds']:6.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
