"""Facts about the machine, what they rule out, and what is said when memory runs out."""

from __future__ import annotations

import json

import pytest

from luthier.config import RunConfig
from luthier.training import memory
from luthier.training.environment import describe_environment, preflight_problems
from luthier.training.memory import explain_out_of_memory, is_out_of_memory


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
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    config = RunConfig(data="a", micro_batch_tokens=4096)
    assert "Try --set micro_batch_tokens=2048." in explain_out_of_memory(config, 100)
    assert "Try --max-length 2500 --on-long truncate." in explain_out_of_memory(config, 5000)
