"""What the benchmarks share: the machine in the result, a process for each measurement, and peak memory."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROBES = 30
# Student's t for a 95 % interval of the mean of so many values.
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
WORDS = "the quick brown fox jumps over a lazy dog; play music tomorrow in paris, book a table for two please"


def describe_machine() -> dict[str, Any]:
    """Processor, memory and versions, what the processor was measured to reach, and how busy the machine was."""
    from luthier.training.environment import describe_environment

    facts = describe_environment()
    return {**facts, **measured_peaks(), "load_average": list(os.getloadavg()), "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def measured_peaks() -> dict[str, float | None]:
    """Flops a second in registers and bytes a second from memory, all threads; None where the native kernels are not in use."""
    from luthier.errors import ConfigError
    from luthier.kernels import probe

    try:
        # One probe of 3 ms may fall into a pause; the best of many is what the machine can do.
        peak = max(probe.fma_peak() for _ in range(PROBES))
        return {"fma_flops_per_second": peak, "read_bytes_per_second": probe.read_bandwidth()}
    except ConfigError:
        return {"fma_flops_per_second": None, "read_bytes_per_second": None}


def peak_rss_bytes() -> int:
    """The most memory this process has held (VmHWM), without importing anything that would add to it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise SystemExit("peak memory is read from VmHWM in /proc/self/status; this system does not tell it.")
    return int(found[1]) * 1024


def run_part(script: str, part: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `script --part part` in a process of its own and return the JSON object on the last line it prints."""
    started = time.perf_counter()
    command = [sys.executable, script, "--part", part, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the part {part!r} failed with exit code {done.returncode}; its message is above.")
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - started}


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """The mean, and Student's 95 % interval, None where STUDENT_95 has none for so many values."""
    mean, interval = statistics.fmean(values), None
    if len(values) in STUDENT_95:
        half = STUDENT_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
        interval = [mean - half, mean + half]
    return {"mean": mean, "interval": interval}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a run that is stopped while it writes leaves what was there."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
