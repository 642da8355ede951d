"""The passes on NEON, under an emulator: a driver runs them on numbers from here, and the references judge the results."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_checks import relative_error, require_programs

from luthier.kernels import attention, head, quantize
from luthier.kernels import elementwise_reference as passes
from luthier.kernels import quantize_reference as quantisers

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow
TOKENS, WIDTH = 70, 37


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and passes_driver.cpp for AArch64."""
    require_programs()
    folder = tmp_path_factory.mktemp("aarch64")
    toolchain = folder / "aarch64.cmake"
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\nset(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)\n"
    )
    configure = ["cmake", "-S", HERE.parents[1], "-B", folder / "build", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder / "build", "--parallel", "2"], check=True, capture_output=True)
    link = ["-L", folder / "build", "-lluthier_kernels", f"-Wl,-rpath,{folder / 'build'}"]
    program = folder / "passes_driver"
    compile_driver = ["aarch64-linux-gnu-g++", "-std=c++17", "-O1", HERE / "passes_driver.cpp", "-o", program, *link]
    subprocess.run(compile_driver, check=True, capture_output=True)
    return program


def inputs_and_expected() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the driver takes and what it has to put, both in its order."""
    torch.manual_seed(0)
    x, r, d = (torch.randn(TOKENS, WIDTH) for _ in range(3))
    w, b = torch.randn(WIDTH), torch.randn(WIDTH)
    total, normed, inverse = passes.rms_norm(x, r, w, 1.0, 1e-6)
    expected = [total, normed, *passes.rms_norm_backward(d, r, total, w, 1.0, inverse, True)]
    normed, mean, inverse = passes.layer_norm(x, w, b, 1e-6)
    expected += [normed, *passes.layer_norm_backward(d, x, w, mean, inverse, True)]
    for kind in range(len(passes.GATES)):
        expected += [passes.gated(x, r, kind), *passes.gated_backward(d, x, r, kind)]
    turned, cos, sin = torch.randn(TOKENS, 2, 16), torch.randn(TOKENS, 10), torch.randn(TOKENS, 10)
    expected += [passes.rotary(turned, cos, sin, False), passes.rotary(turned, cos, sin, True)]
    hidden, weight = torch.randn(9, 32), torch.randn(50, 32)
    targets = torch.arange(9) * 7 % 50
    expected += head._reference(hidden, [weight], [0, 50, 32, 0, 1], [0.0, 1.0], None, targets, 0.7, 5.0, 0.1, True)
    q, k, v, dout = (torch.randn(130, heads, 16) for heads in (4, 2, 2, 4))
    segments = torch.tensor([0, 10, 90, 95, 130]), torch.tensor([-1, 0, 1, 0])
    for rows, window in ((None, 40), (torch.tensor([2, 3, 9, 40, 93, 94, 129]), 0)):
        own, options = slice(None if rows is None else len(rows)), (0.25, 3.0, window)
        out, lse = attention._forward_reference(q[own], k, v, *segments, rows, *options)
        gradients = attention._backward_reference(dout[own], q[own], k, v, *segments, rows, out, lse, *options)
        expected += [out, lse, *gradients]
    matrix = torch.randn(4, 256)
    expected += [*quantisers.nf4_quantize(matrix)]
    expected += [quantisers.gguf_quantize(matrix, kind) for kind in quantize.GGUF_FORMATS]
    return [x, r, d, w, b, turned, cos, sin, hidden, weight, q, k, v, dout, matrix], expected


@pytest.mark.parametrize("instruction_set", ["neon", "portable"])
def test_passes_agree_with_their_references(driver, instruction_set, tmp_path):
    inputs, expected = inputs_and_expected()
    (tmp_path / "input").write_bytes(b"".join(tensor.numpy().tobytes() for tensor in inputs))
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", driver, tmp_path / "input", tmp_path / "output"]
    environment = {**os.environ, "LUTHIER_ISA": instruction_set}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("isa 3" if instruction_set == "neon" else "isa 0")
    content, at = (tmp_path / "output").read_bytes(), 0
    for index, want in enumerate(expected):
        size = want.numel() * want.element_size()
        values = np.frombuffer(content[at : at + size], dtype=want.numpy().dtype)
        got = torch.from_numpy(values.copy()).view(want.shape)
        at += size
        if want.dtype == torch.uint8:
            assert torch.equal(got, want), f"result {index}"
        else:
            assert relative_error(got, want) < 2e-6, f"result {index}"
    assert at == len(content)
