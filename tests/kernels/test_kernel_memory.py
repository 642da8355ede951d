"""What the kernels keep between calls: it is bounded, whatever the number of tokens."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RESIDENT_SCRIPT = """
import sys, torch
from luthier import kernels
from luthier.kernels.elementwise_ops import layer_norm_backward_op, rms_norm_backward_op
from luthier.kernels.head import linear_cross_entropy

torch.manual_seed(0)
storage = kernels.Storage.dense(torch.randn(700, 512).bfloat16())
A, B, w = torch.randn(16, 512, requires_grad=True), torch.randn(700, 16, requires_grad=True), torch.randn(512)

def run(tokens):
    x = torch.randn(tokens, 512, requires_grad=True)
    y = kernels.frozen_linear(x, storage, None, kernels.Term(A, B, 0.5))
    torch.autograd.grad(y, (x, A, B), torch.ones_like(y))
    row, plain = torch.ones(tokens), x.detach()
    rms_norm_backward_op(plain, None, plain, w, 0.0, row, True)
    layer_norm_backward_op(plain, plain, w, row, row, True)
    linear_cross_entropy(x, storage, torch.zeros(tokens, dtype=torch.int64))

def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmRSS"].split()[0])

for tokens in map(int, sys.argv[1:]):
    run(tokens), run(tokens)
    print(resident() * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_scratch_does_not_grow_from_1024_to_6400_tokens():
    """Linear layer, norms and head, forward and backward; with results freed, what is left is what the kernels keep."""
    # Blocks above the threshold go back to the system when they are freed.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", RESIDENT_SCRIPT, "8", "1024", "6400"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
    few, block, many = map(int, run.stdout.split())
    assert block - few <= 4 * 2**20
    assert many - block <= 2**19
