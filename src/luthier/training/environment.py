"""What this machine and this installation are: for env.json and `luthier doctor`. No paths, names or settings of the person."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

import luthier
from luthier import kernels
from luthier.config import DEFAULT_MODEL
from luthier.errors import LuthierError
from luthier.models.cache import cache_root
from luthier.models.source import resolve
from luthier.training.memory import available_bytes, total_bytes

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy", "pyarrow", "pydantic")
PEERS = ("peft", "bitsandbytes", "trl", "datasets", "llama-cpp-python")
OLDEST = {"torch": (2, 9), "transformers": (5, 0)}
LEAST_MEMORY_BYTES = 2 << 30
LEAST_DISK_BYTES = 1 << 30
# What decides the last bits of a result, and where `describe_environment` says it.
NUMERIC_FACTS = {
    "kernels": ("kernels", "mode"),
    "their instruction set": ("kernels", "instruction_set"),
    "threads": ("threads",),
    "torch": ("packages", "torch"),
    "its instruction set": ("torch_cpu_capability",),
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


def describe_environment() -> dict[str, Any]:
    """Facts as JSON-able values; sizes in bytes. A package that is not installed is None. Nothing of the environment's
    variables is read, so that no token or key can end up in a run directory."""
    return {
        "luthier": luthier.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "peers": {name: _version(name) for name in PEERS},
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        "logical_cores": psutil.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "instructions": _instructions(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": total_bytes(),
        "available_bytes": available_bytes(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "device": "cpu" if not torch.cuda.is_available() else "cpu (a CUDA device is here; only paged_adamw uses it)",
        "kernels": kernels_in_use(),
    }


def numeric_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two machines or installations and decides the last bits of a result: one phrase each.

    then, now: what `describe_environment` gives. What `then` does not say counts as different.
    """
    found = []
    for name, path in NUMERIC_FACTS.items():
        was, is_now = _fact(then, path), _fact(now, path)
        if was != is_now:
            found.append(f"{name} {was if was is not None else 'not known'} then, {is_now} now")
    return found


def _fact(facts: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = facts
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def preflight_problems(facts: dict[str, Any]) -> list[str]:
    """What would keep the main job from running, given `describe_environment`'s facts: one sentence each."""
    problems = []
    for name, oldest in OLDEST.items():
        version = facts["packages"].get(name)
        wanted = ".".join(map(str, oldest))
        if version is None:
            problems.append(f"{name} is not installed. Install luthier again.")
        elif _numbers(version) < oldest:
            problems.append(f"{name} must be {wanted} or newer; it is {version}. Try `pip install --upgrade {name}`.")
    if facts["available_bytes"] < LEAST_MEMORY_BYTES:
        free = facts["available_bytes"] / 2**20
        problems.append(f"training the default model takes about 2 GiB of memory; {free:,.0f} MiB are free. Close something.")
    if facts["disk_free_bytes"] < LEAST_DISK_BYTES:
        free = facts["disk_free_bytes"] / 2**20
        problems.append(
            f"a run and the default model take about 1 GiB of disk; {free:,.0f} MiB are free here. Free some space."
        )
    return problems


def describe_cache() -> dict[str, Any]:
    """Where the cache is and whether the default model can be used without a network."""
    try:
        default_model = resolve(DEFAULT_MODEL, offline=True).identity
    except LuthierError:
        default_model = "not here; it is fetched when first used"
    return {"folder": str(cache_root()), "default_model": default_model}


def kernels_in_use() -> dict[str, Any]:
    """Which implementation multiplies in this process: the compiled kernels, or their references in torch, and why."""
    active = kernels.active()
    return {"mode": active.mode, "reason": active.reason, "instruction_set": active.instruction_set}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _cpuinfo() -> dict[str, str]:
    """The first value of every key of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def _processor() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """The instruction sets that matter for matrix products, as the system names them."""
    facts = _cpuinfo()
    have = (facts.get("flags") or facts.get("Features") or "").split()
    return [flag for flag in CPU_FLAGS if flag in have]
