"""How much memory this process uses, how much there is, and what to say when it runs out."""

from __future__ import annotations

import errno
import re
import resource
import sys
from pathlib import Path

import psutil

from luthier.config import RunConfig

CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def rss_bytes() -> int:
    """Memory this process holds now."""
    return psutil.Process().memory_info().rss


def peak_rss_bytes() -> int:
    """The most memory this process has held since it began."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else rss_bytes()


def total_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    return min([psutil.virtual_memory().total, *_cgroup_limits()])


def available_bytes() -> int:
    """Memory that can still be had without swapping."""
    return min([psutil.virtual_memory().available, *(limit - rss_bytes() for limit in _cgroup_limits())])


def _cgroup_limits() -> list[int]:
    limits = []
    for path in CGROUP_LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return limits


def explain_out_of_memory(config: RunConfig, longest: int) -> str:
    """What to say when an allocation has failed in the middle of a new run. longest: tokens of the longest row."""
    at_once = config.micro_batch_tokens or longest
    tokens, half = max(at_once, longest), max(longest, at_once // 2)
    advice = f"--set micro_batch_tokens={half}" if half < tokens else f"--max-length {max(8, longest // 2)} --on-long truncate"
    return (
        f"memory ran out with packs of {tokens} tokens; {_held()} were in use. "
        f"Try {advice}, with --overwrite where --out is the same folder."
    )


def explain_out_of_memory_resumed(config_file: Path, recomputed: int, layers: int) -> str:
    """The same in a run that goes on, which may change nothing that its numbers depend on.

    config_file: the run's; recomputed, layers: how many of the model's layers are computed again in backward already.
    """
    more = (
        f" Or set `recompute_layers: {layers}` in {config_file}: slower, with the same result." if recomputed < layers else ""
    )
    return (
        f"memory ran out in a run that goes on; {_held()} were in use. Close other programs, then resume it again.{more} "
        "A new run with smaller packs (--set micro_batch_tokens) takes less."
    )


def explain_out_of_memory_loading(config: RunConfig) -> str:
    """What to say when it fails while the model is loaded."""
    smaller = "a smaller model" if config.storage in ("nf4", "asis") else "--method qlora, or a smaller model"
    return (
        f"memory ran out while {config.model} was loaded; {_held()} were in use. "
        f"Close other programs, or start a new run with {smaller}."
    )


def _held() -> str:
    return f"{rss_bytes() / 2**20:,.0f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation or mapping; torch raises a plain RuntimeError for both, Python an OSError."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "Cannot allocate memory"))
