"""What the benchmarks share: the machine in the result, a process for each measurement, and peak memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROBES = 30


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
