"""The loader: which kernels run and why, what is said when they cannot, and threads beside torch's own and after fork."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from luthier import kernels
from luthier.errors import ConfigError, LuthierError, ShapeError
from luthier.kernels import attention, native, probe, registry
from luthier.kernels.linear_native import Matrix
from luthier.kernels.storage import KINDS

EXPECTED_NATIVE = {"frozen_linear", "frozen_linear_backward_input", "frozen_linear_backward_factor", "dequantize_rows"}


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a process of its own with these variables set; after 100 seconds it and its children are killed.

    A child that it forked holds its pipes too, so killing the process alone would not end the wait for its output.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "2", **environment}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        try:
            stdout, stderr = run.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            stdout, stderr = run.communicate()
            pytest.fail(f"still running after 100 seconds.\n{stdout[-1000:]}\n{stderr[-1000:]}")
    return subprocess.CompletedProcess(command, run.returncode, stdout, stderr)


def test_the_library_is_installed_and_in_use():
    active = kernels.active()
    assert active.mode == "native"
    assert active.instruction_set in native.INSTRUCTION_SETS
    assert Path(str(active.library)).is_file()


def test_every_expected_op_has_a_native_version():
    assert {op.name for op in registry.registered_ops() if op.has_native} >= EXPECTED_NATIVE


def test_forced_reference_calls_no_native_kernel():
    op = next(op for op in registry.registered_ops() if op.name == "frozen_linear")
    before = op.native_calls
    storage = kernels.Storage.dense(torch.ones(2, 3))
    with native.forced("reference"):
        assert kernels.active().mode == "reference"
        kernels.frozen_linear(torch.ones(1, 3), storage)
    assert op.native_calls == before
    kernels.frozen_linear(torch.ones(1, 3), storage)
    assert op.native_calls == before + 1


def test_forcing_an_unknown_mode_is_refused():
    with (
        pytest.raises(ConfigError, match=r"kernels are one of native, reference; got 'nativ'. Did you mean 'native'"),
        native.forced("nativ"),
    ):
        pass


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), r"x must be torch.float32; got torch.float64. Try .to\(torch.float32\)"),
        (torch.zeros(3, 2), r"x must have shape \(\*, 3\); got \(3, 2\)"),
        (torch.zeros(3, 2).T, r"x must be contiguous; got strides \(1, 2\)"),
        (torch.zeros(2, 3, device="meta"), "x must be on the CPU; got meta"),
        (torch.zeros(25, dtype=torch.uint8)[1:].view(torch.uint8), "x must be torch.float32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(tensor, message):
    with pytest.raises(ShapeError, match=message):
        native.check_tensor(tensor, "x", torch.float32, (None, 3))


def test_the_library_refuses_what_the_binding_should_have():
    call = native.entry("lt_fma_peak", native.ctypes.c_int64, native.ctypes.c_int, native.ctypes.c_void_p)
    with pytest.raises(ShapeError, match=r"lt_fma_peak refused its arguments \(status 1\)"):
        call(0, 1, None)


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        ("lt_linear_forward", [None, 3, None, 1, 1]),
        ("lt_linear_backward_input", [None, 3, None, 1, 1]),
        ("lt_factored_forward", [None, 3, None, None, None, 1]),
        ("lt_factored_backward_input", [None, 3, None, None, 1]),
        ("lt_outer", [None, 4, None, 8, 3, 1.0, None, 0, 1]),
        ("lt_dequantize_rows", [None, None, 2, None, 1]),
        ("lt_linear_cross_entropy", [None, 3, None, None, None, 1.0, 0.0, 0.0, None, 1, None, None, 1]),
        ("lt_rms_norm", [None, None, None, 0.0, 1e-6, 3, 8, None, None, None, 1]),
        ("lt_rms_norm_backward", [None, None, None, None, 0.0, None, 3, 8, None, None, 1]),
        ("lt_layer_norm", [None, None, None, 1e-6, 3, 8, None, None, None, 1]),
        ("lt_layer_norm_backward", [None, None, None, None, None, 3, 8, None, None, None, 1]),
        ("lt_rotary", [None, 8, None, 8, 1, 8, None, None, 8, 3, 0, 1]),
        ("lt_gated", [0, None, 8, None, 8, 3, 8, None, 1]),
        ("lt_gated_backward", [0, None, None, 8, None, 8, 3, 8, None, None, 1]),
        ("lt_nf4_quantize", [None, 0, 64, None, None, 1]),
        ("lt_gguf_quantize", [None, 0, 1, 0, None, 1]),
        ("lt_attention_forward", [None, None, None, None, None, None, 1]),
        ("lt_attention_backward", [None, None, None, None, None, None, None, None, None, None, 1]),
        ("lt_fma_peak", [10, 1, None]),
        ("lt_read_bandwidth", [None, 10, 1, None]),
    ],
)
def test_entries_refuse_null_pointers(entry, arguments):
    types = {type(None): c_void_p, int: c_int64, float: c_float}
    function = native.library()[entry]
    function.argtypes = [types[type(value)] for value in arguments]
    assert function(*arguments) == native.STATUS_BAD_ARGUMENT


@pytest.mark.parametrize(("entry", "pointers"), [("lt_attention_forward", 5), ("lt_attention_backward", 9)])
def test_attention_refuses_each_null_pointer_unless_the_pack_is_empty(entry, pointers):
    starts, parents, room = torch.tensor([0, 3]), torch.tensor([-1]), torch.zeros(3 * 16)
    function = native.library()[entry]
    function.argtypes = [c_void_p] * (pointers + 1) + [c_int64]

    def status(starts: torch.Tensor, *absent: int) -> int:
        pack = attention._Attention(1, 1, 16, 0.25, 0.0, 0, 1, starts.data_ptr(), parents.data_ptr(), 0, None)
        addresses = [None if i in absent else room.data_ptr() for i in range(pointers)]
        return function(ctypes.addressof(pack), *addresses, 1)

    for absent in range(pointers):
        assert status(starts, absent) == native.STATUS_BAD_ARGUMENT
    assert status(torch.zeros_like(starts), *range(pointers)) == native.STATUS_OK


@pytest.mark.parametrize(
    ("changed", "fits"),
    [
        ({}, True),
        ({"kind": 12}, False),
        ({"kind": -1}, False),
        ({"data": None}, False),
        ({"rows": 0}, False),
        ({"cols": 33}, True),
        ({"kind": KINDS.index("q8_0"), "cols": 33}, False),
        ({"kind": KINDS.index("q4_k"), "cols": 32}, False),
        ({"kind": KINDS.index("nf4")}, False),
    ],
)
def test_entries_refuse_a_matrix_that_they_cannot_read(changed, fits):
    data, out = torch.zeros(4, 40), torch.zeros(4, 40)
    matrix = Matrix(0, 0, 4, 32, data.data_ptr())
    for name, value in changed.items():
        setattr(matrix, name, value)
    function = native.library()["lt_dequantize_rows"]
    function.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64]
    status = function(ctypes.addressof(matrix), None, 4, out.data_ptr(), 1)
    assert status == (native.STATUS_OK if fits else native.STATUS_BAD_ARGUMENT)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (native.STATUS_NO_MEMORY, MemoryError, "lt_stub could not allocate its scratch memory."),
        (
            native.STATUS_BAD_ARGUMENT,
            ShapeError,
            r"lt_stub refused its arguments \(status 1\); the binding let a size or pointer",
        ),
        (
            native.STATUS_FAILED,
            LuthierError,
            "lt_stub failed inside the library, for want of something that the system would not",
        ),
    ],
)
def test_each_status_is_an_error_of_its_own(status, error, message, monkeypatch):
    class Entry:
        def __call__(self, *arguments):
            return status

    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(lt_stub=Entry()))
    call = native.entry.__wrapped__("lt_stub", c_int64)
    with pytest.raises(error, match=message) as raised:
        call(1)
    assert type(raised.value) is error


def test_probes_measure_something():
    assert probe.fma_peak(1, steps=10_000) > 1e8
    assert probe.read_bandwidth(1, buffer=torch.ones(1 << 16)) > 1e7


def test_environment_chooses_the_kernels():
    """One process a setting would take seconds each; the messages come from functions that read the environment anew."""
    run = python(
        """
        import os, warnings
        from luthier.errors import ConfigError
        from luthier.kernels import native
        def said(**environment):
            os.environ.update(environment)
            native._default_mode.cache_clear(), native._load.cache_clear()
            try:
                return str(native.active())
            except ConfigError as error:
                return str(error)
        print(said(LUTHIER_KERNELS="reference"))
        print(said(LUTHIER_KERNELS="fast"))
        print(said(LUTHIER_KERNELS="native", LUTHIER_KERNELS_LIBRARY="/none.so"))
        os.environ["LUTHIER_KERNELS_LIBRARY"] = ""
        native.ABI_VERSION += 1
        print(said())
        native.ABI_VERSION -= 1
        native.LIBRARY_NAME = "absent.so"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(said())
            native.active(), native.active()
            print(len(caught), caught[0].message)
        """
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("Active(mode='reference', reason='LUTHIER_KERNELS=reference'")
    assert lines[1].startswith("LUTHIER_KERNELS is one of native, reference; got 'fast'.")
    assert lines[2] == "LUTHIER_KERNELS_LIBRARY names a file; /none.so is none. Unset it to use the installed library."
    wrong = (
        rf"{native.LIBRARY_NAME} must have version {native.ABI_VERSION + 1}; got {native.ABI_VERSION} in /.*. Try reinstalling"
    )
    assert re.match(wrong, lines[3])
    assert lines[4].startswith("Active(mode='reference', reason='absent.so is not installed'")
    assert lines[5] == "1 absent.so is not installed, so every op runs in plain torch, several times slower."


def test_an_instruction_set_that_the_machine_lacks_is_an_error():
    run = python("from luthier import kernels; kernels.active()", LUTHIER_ISA="avx3")
    assert run.returncode == 1
    expected = "LUTHIER_ISA is one of portable, avx2, avx512, neon that this machine has; got 'avx3'. Did you mean 'avx2'?"
    assert expected in run.stderr


def test_threads_beside_torch_and_after_fork():
    run = python(
        """
        import os, resource, torch
        from luthier import kernels
        torch.manual_seed(0)
        storage = kernels.Storage.dense(torch.randn(300, 256).bfloat16())
        x = torch.randn(70, 256)
        denormal = x * 1e-39
        expected = kernels.frozen_linear(x, storage)
        for _ in range(50):
            torch.randn(256, 256) @ torch.randn(256, 256)
            assert torch.equal(kernels.frozen_linear(x, storage), expected)
        child = os.fork()
        if child == 0:
            same = all(torch.equal(kernels.frozen_linear(x, storage), expected) for _ in range(3))
            os._exit(0 if same and kernels.active().threads_from == "its own pool" else 1)
        assert os.waitpid(child, 0)[1] == 0
        child = os.fork()
        if child == 0:  # threads that run already flush denormal numbers when the caller begins to
            kernels.frozen_linear(x, storage)
            torch.set_flush_denormal(True)
            results = [kernels.frozen_linear(denormal, storage).view(torch.int32) for _ in range(20)]
            os._exit(0 if not any(int(bits.abs().max()) for bits in results) else 1)
        assert os.waitpid(child, 0)[1] == 0
        child = os.fork()
        if child == 0:  # no memory for another thread's stack: the calling one does all the work
            pages = int(open("/proc/self/statm").read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 6 * 2**20,) * 2)
            os._exit(0 if torch.equal(kernels.frozen_linear(x, storage), expected) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(kernels.frozen_linear(x, storage), expected)
        print("done", kernels.active().threads_from)
        """
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("done")


def test_two_threads_of_python_at_once():
    """Calls leave the interpreter's lock, so they run side by side: beside libgomp, and in a forked child beside its own pool.

    What torch computes for itself in a forked child must come from threads begun there: in the thread that called fork its
    libgomp waits for threads that the child lacks (`x.bfloat16()` of 76,800 numbers hangs there without these kernels too).
    """
    run = python(
        """
        import os, signal, threading, torch
        from luthier import kernels
        from luthier.kernels.elementwise_ops import rms_norm_op
        from luthier.kernels.head import linear_cross_entropy
        def work(seed):
            torch.set_num_threads(2)
            generator = torch.Generator().manual_seed(seed)
            weight, x = torch.randn(300, 256, generator=generator), torch.randn(70, 256, generator=generator)
            storage, targets = kernels.Storage.dense(weight.bfloat16()), torch.arange(70)
            term = kernels.Term(weight[:5].contiguous(), weight[:, :5].contiguous().requires_grad_(), 0.5)
            leaf = x.requires_grad_()
            y = kernels.frozen_linear(leaf, storage, None, term)
            loss, losses = linear_cross_entropy(leaf, storage, targets)
            gradients = torch.autograd.grad((y.sum(), loss), (leaf, term.B))
            few = kernels.frozen_linear(x[:1].detach(), storage)
            return [y, few, losses, *gradients, *rms_norm_op(x.detach(), None, weight[0], 0.0, 1e-6)]
        def both():
            results, start = {}, threading.Barrier(2)
            def repeat(seed):
                start.wait(timeout=60)
                results[seed] = [work(seed) for _ in range(15)]
            workers = [threading.Thread(target=repeat, args=(seed,)) for seed in expected]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return all(
                torch.equal(got, want)
                for seed, wanted in expected.items()
                for result in results[seed]
                for got, want in zip(result, wanted, strict=True)
            )
        expected = {seed: work(seed) for seed in (1, 2)}
        assert both()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if both() and kernels.active().threads_from == "its own pool" else 1)
        assert os.waitpid(child, 0)[1] == 0
        print("done")
        """
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "done\n"
