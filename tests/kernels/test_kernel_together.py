"""Kernels that wait for each other: the same bits as one by one, and never where somebody looks on."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from luthier.kernels import native
from luthier.kernels.elementwise_ops import gated_op, rms_norm_op
from luthier.kernels.linear_ops import Part, Term, backward_input_op, flatten, forward_op
from luthier.kernels.storage import Storage
from luthier.training.live_bytes import LiveBytes

pytestmark = pytest.mark.skipif(not native.use_native(), reason="references run at once")


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(50, 64)


def waiting() -> int:
    return len(native._waiting.calls or [])


def chain(x: torch.Tensor) -> list[torch.Tensor]:
    """Five kernels, each on the results of those before; what lies between them is let go of and its memory asked for again."""
    torch.manual_seed(1)
    term = Term(torch.randn(4, 64), torch.randn(96, 4), 0.5)
    stored, layout, numbers, bias, A, B = flatten([Part(Storage.dense(torch.randn(96, 64)), None, term)])
    _, normed, inverse = rms_norm_op(x, None, torch.ones(64), 0.0, 1e-6)
    (y,), (u,) = forward_op(normed, stored, layout, numbers, bias, A, B)
    act = gated_op(y, y, 0)
    del normed, y
    held = [torch.full_like(x, torch.nan), torch.full((50, 96), torch.nan)]
    dx, (v,) = backward_input_op([act], stored, layout, numbers, A, B)
    _, last, _ = rms_norm_op(dx, None, torch.ones(64), 0.0, 1e-6)
    return [inverse, u, act, dx, v, last, *held]


def test_the_same_bits_as_one_by_one(x):
    expected = chain(x)
    with native.together():
        results = chain(x)
        assert waiting() == 5
    assert native._waiting.calls is None
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_what_waits_can_be_run_before_the_end(x):
    with native.together():
        results = chain(x)
        native.run_waiting()
        assert waiting() == 0
        early = results[5].clone()
    assert torch.equal(early, chain(x)[5])


def test_one_within_another_runs_what_waits_and_its_own(x):
    with native.together():
        outer = chain(x)
        with native.together():
            assert torch.equal(outer[5], results_of(x)[5])
            inner = chain(x)
        assert torch.equal(inner[5], outer[5])
        assert native._waiting.calls == []
        again = chain(x)
    assert torch.equal(again[5], outer[5])


def results_of(x: torch.Tensor) -> list[torch.Tensor]:
    results = chain(x)
    native.run_waiting()
    return results


def test_an_error_lets_go_of_what_waits(x):
    @native.together()
    def stopped():
        chain(x)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert native._waiting.calls is None
    assert torch.equal(chain(x)[5], chain(x)[5])


def test_nothing_waits_under_a_profiler_or_a_dispatch_mode(x):
    with profile(activities=[ProfilerActivity.CPU]), native.together():
        chain(x)
        assert native._waiting.calls is None
    with LiveBytes(), native.together():
        chain(x)
        assert native._waiting.calls is None


def test_other_threads_do_not_wait(x):
    seen = []
    with native.together():
        thread = threading.Thread(target=lambda: seen.append((chain(x)[5], native._waiting.calls)))
        thread.start()
        thread.join()
    assert seen[0][1] is None
    assert torch.equal(seen[0][0], chain(x)[5])
