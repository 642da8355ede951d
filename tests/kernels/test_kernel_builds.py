"""Other builds of the library: for another processor under an emulator, and with the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_checks import require_programs

from luthier.kernels import native

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
# Tests that start further processes are left out under the sanitizers.
STARTS_PROCESSES = (
    "test_kernel_builds.py",
    "test_kernel_native.py",
    "test_kernel_instruction_sets.py",
    "test_kernel_memory.py",
    "test_kernel_passes_neon.py",
)
# Tests of everything but the linear layer, which the driver runs on every instruction set; of factors it has small shapes.
PASSES = ("elementwise", "head", "attention", "quantize", "decoder", "factored")


def build(folder: Path, *options: str) -> Path:
    """Configure and build library and driver in `folder`."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, *generator, "-DLUTHIER_DRIVER=ON", *options], check=True, capture_output=True
    )
    subprocess.run(["cmake", "--build", folder, "--parallel", "2"], check=True, capture_output=True)
    return folder / "luthier_driver"


def run(command: list, **environment: str) -> list[str]:
    """The driver's lines about each kind."""
    finished = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return finished.stdout.splitlines()


def _runtime(name: str) -> str:
    """The path of a library of the compiler's."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine_sets() -> list[str]:
    """The instruction sets of this machine, by asking for each in turn."""
    probe = "from luthier import kernels; kernels.active()"
    environments = {name: {**os.environ, "LUTHIER_ISA": name} for name in native.INSTRUCTION_SETS}
    return [
        name
        for name, environment in environments.items()
        if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, check=False).returncode == 0
    ]


def test_neon_agrees_with_portable_under_an_emulator(tmp_path):
    require_programs()
    toolchain = tmp_path / "aarch64.cmake"
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\nset(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)\n"
    )
    driver = build(tmp_path / "build", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    command = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", driver]
    neon, portable = run(command, LUTHIER_ISA="neon"), run(command, LUTHIER_ISA="portable")
    assert neon[0].startswith("isa 3")
    assert portable[0].startswith("isa 0")
    assert neon[1:] == portable[1:]


def test_missing_programs_are_named_with_their_packages(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None if program.endswith(("g++", "64")) else program)
    with pytest.raises(pytest.fail.Exception, match=r"Try apt-get install g\+\+-aarch64-linux-gnu qemu-user\."):
        require_programs()


def test_sanitizers_find_nothing(tmp_path):
    assert shutil.which("cmake"), "the sanitizer build needs cmake. Try apt-get install cmake."
    driver = build(tmp_path / "build", "-DLUTHIER_SANITIZE=ON")
    sets = machine_sets()
    assert "portable" in sets
    outputs = [run([driver, "fork"], LUTHIER_ISA=name) for name in sets]
    assert all(lines[1:] == outputs[0][1:] for lines in outputs)
    # The C++ runtime goes first too: the sanitizer looks for its functions before Python has loaded it.
    runtimes = [_runtime("libasan.so"), _runtime("libstdc++.so")]
    tests = sorted(path for path in Path(__file__).parent.glob("test_kernel_*.py") if path.name not in STARTS_PROCESSES)
    most = "avx2" if "avx2" in sets else "portable"
    for name in sets:
        run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not opcheck and not glibc"]
            + [path for path in tests if name == most or path.stem.removeprefix("test_kernel_") in PASSES],
            LD_PRELOAD=" ".join(runtimes),
            ASAN_OPTIONS="detect_leaks=0",
            LUTHIER_KERNELS_LIBRARY=str(tmp_path / "build" / native.LIBRARY_NAME),
            LUTHIER_ISA=name,
        )
