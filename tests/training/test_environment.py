"""Facts about the machine, what they rule out, and what is said when memory runs out."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from luthier.config import RunConfig
from luthier.training import memory
from luthier.training.environment import describe_environment, numeric_differences, preflight_problems
from luthier.training.memory import (
    explain_out_of_memory,
    explain_out_of_memory_loading,
    explain_out_of_memory_resumed,
    is_out_of_memory,
)


def test_facts_are_complete_and_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 66: nothing of the environment's variables is told."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret_0123456789")
    facts = describe_environment()
    assert "hf_secret" not in json.dumps(facts)
    assert facts["memory_bytes"] >= facts["available_bytes"] > 0
    assert facts["packages"]["torch"]
    assert facts["threads"] >= 1
    assert facts["processor"]


def test_problems() -> None:
    facts = describe_environment()
    facts |= {"available_bytes": 8 << 30, "disk_free_bytes": 8 << 30}
    assert preflight_problems(facts) == []
    facts["packages"] = {"torch": "2.1.0+cpu", "transformers": None}
    facts |= {"available_bytes": 1 << 20, "disk_free_bytes": 1 << 20}
    problems = preflight_problems(facts)
    assert problems[0] == "torch must be 2.9 or newer; it is 2.1.0+cpu. Try `pip install --upgrade torch`."
    assert problems[1] == "transformers is not installed. Install luthier again."
    assert [problem.split(";")[1].split(" MiB")[0].strip() for problem in problems[2:]] == ["1", "1"]


def test_peak_is_at_least_what_is_held_now() -> None:
    assert memory.peak_rss_bytes() >= 0.9 * memory.rss_bytes() > 0


def test_out_of_memory_says_what_to_try() -> None:
    """Case 27, in the middle of training."""
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("unable to mmap 99 bytes from file <a>: Cannot allocate memory (12)"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    config = RunConfig(data="a", micro_batch_tokens=4096)
    assert "Try --set micro_batch_tokens=2048, with --overwrite where --out is" in explain_out_of_memory(config, 100)
    assert "Try --max-length 2500 --on-long truncate, with" in explain_out_of_memory(config, 5000)


def test_out_of_memory_while_loading() -> None:
    """A failed mapping is one too; what is quantized already is not told to be."""
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert not is_out_of_memory(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert "with --method qlora, or a smaller model." in explain_out_of_memory_loading(RunConfig(data="a"))
    assert explain_out_of_memory_loading(RunConfig(data="a", method="qlora")).endswith("start a new run with a smaller model.")


def test_out_of_memory_in_a_resumed_run() -> None:
    text = explain_out_of_memory_resumed(Path("run/config.resolved.yaml"), 1, 4)
    assert "Or set `recompute_layers: 4` in run/config.resolved.yaml" in text
    assert "recompute_layers" not in explain_out_of_memory_resumed(Path("run/config.resolved.yaml"), 4, 4)


def test_what_decides_the_last_bits() -> None:
    facts = describe_environment()
    assert numeric_differences(json.loads(json.dumps(facts)), facts) == []
    other = {**facts, "kernels": {**facts["kernels"], "mode": "other"}, "threads": 99, "python": "3"}
    assert numeric_differences(other, facts) == [
        f"kernels other then, {facts['kernels']['mode']} now",
        f"threads 99 then, {facts['threads']} now",
    ]
    assert len(numeric_differences({}, facts)) >= 4
    assert numeric_differences({"kernels": None}, facts)[0].startswith("kernels not known then")
