"""The same tests on every instruction set of this machine that is not the one in use, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from luthier.kernels import native

PARTS = ("linear", "factored", "storage", "quantize", "elementwise", "head", "attention", "decoder")
TESTS = [Path(__file__).with_name(f"test_kernel_{part}.py") for part in PARTS]


def others() -> list[str]:
    best = {"AVX512": ["portable", "avx2", "avx512"], "AVX2": ["portable", "avx2"]}
    available = best.get(torch.backends.cpu.get_cpu_capability(), ["portable"])
    return [name for name in available if name != native.active().instruction_set]


@pytest.mark.skipif("LUTHIER_ISA" in os.environ, reason="this process is one of those that the test starts")
def test_every_other_instruction_set_passes():
    for name in others():
        environment = {**os.environ, "LUTHIER_ISA": name, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, TESTS)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, f"{name}:\n{run.stdout[-3000:]}\n{run.stderr[-1000:]}"
        assert "100%" in run.stdout
