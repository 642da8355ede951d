"""Where a compression's memory goes: the most that the process held in each stage, and in all.

    python benchmarks/compression_memory.py --data c4.jsonl --text test.raw [--model M] [--budget 45%] [--heal STEPS]
                                            [--windows 48] [--json FILE]

Runs `luthier compress` as it is, in this process, into a folder that is removed. The limit beside it is three times the model
in 16 bits. After each stage the system's high-water mark (VmHWM) is read and set back, which Linux alone allows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import peak_rss_bytes, write_json

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--budget", default="45%")
    parser.add_argument("--heal", type=int, default=0)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--eval-windows", type=int, default=24)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, Path(folder) / "out", marks)
    marks.end()
    limit = 3 * report.candidates[0].size_bytes
    print(f"{'in all':50s} {marks.most / 1e6:8.1f} MB; three times the model in 16 bits: {limit / 1e6:.1f} MB")
    if options.json:
        write_json(options.json, {"benchmark": "compression_memory", "stages": marks.stages, "limit_bytes": limit})


def run(options: argparse.Namespace, out: Path, marks: Marks):
    from luthier.compression.runner import compress
    from luthier.compression.settings import Budget, CompressSettings

    marks.seen("importing", 0, 0)
    settings = CompressSettings(
        options.model, Budget.parse(options.budget), out, options.data, options.text, heal=options.heal,
        windows=options.windows, eval_windows=options.eval_windows, offline=True,
    )  # fmt: skip
    return compress(settings, marks.seen)


class Marks:
    """The peak of every stage, from the first time that its name is heard to the first time of another."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self._stage = ""

    @property
    def most(self) -> int:
        return max(peak for _, peak in self.stages)

    def seen(self, stage: str, _done: int, _total: int) -> None:
        if stage != self._stage:
            self.end()
            self._stage = stage

    def end(self) -> None:
        peak = peak_rss_bytes()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if self._stage:
            self.stages.append((self._stage, peak))
            print(f"{self._stage:50s} {peak / 1e6:8.1f} MB", flush=True)


if __name__ == "__main__":
    main()
