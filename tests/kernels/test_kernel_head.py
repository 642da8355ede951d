"""The head's loss against float64 cross entropy, its memory, and its checks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_close_to_float64, assert_same_for_all_threads, called, relative_error

from luthier.errors import ShapeError
from luthier.kernels import head, native, quantize
from luthier.kernels.frozen_linear import dequantize
from luthier.kernels.storage import Storage


def exact(hidden, weight, targets, bias=None, softcap=None, label_smoothing=0.0, scale=1.0):
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return torch.randn(70, 64), torch.randn(333, 64) * 0.5, torch.randint(0, 333, (70,))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_loss_and_gradient(problem, softcap, label_smoothing, scale, biased, monkeypatch):
    hidden, weight, targets = problem
    bias = torch.randn(333) if biased else None
    monkeypatch.setattr(head, "LOGITS_BYTES", 32 * 4 * 333)
    monkeypatch.setattr(head, "FEWEST_ROWS", 32)
    options = {"bias": bias, "softcap": softcap, "label_smoothing": label_smoothing, "scale": scale}
    assert head.rows_at_once(70, 333) == 24
    assert_close_to_float64(
        lambda h: head.linear_cross_entropy(h, Storage.dense(weight), targets, **options)[0],
        lambda h: exact(h, weight, targets, **options),
        [hidden],
    )


def test_a_stored_head_in_any_format(problem):
    hidden, weight, targets = problem
    for storage in (Storage.dense(weight.bfloat16()), Storage("q8_0", (333, 64), quantize.quantize_gguf(weight, "Q8_0"))):
        assert_close_to_float64(
            lambda h, s=storage: head.linear_cross_entropy(h, s, targets)[0],
            lambda h, s=storage: exact(h, dequantize(s), targets),
            [hidden],
        )


def test_each_rows_loss_comes_with_the_sum(problem):
    hidden, weight, targets = problem
    with called("linear_cross_entropy"):
        total, losses = head.linear_cross_entropy(hidden, Storage.dense(weight), targets, softcap=4.0)
    logits = 4.0 * torch.tanh(hidden.double() @ weight.double().T / 4.0)
    assert relative_error(losses, F.cross_entropy(logits, targets, reduction="none")) < 1e-6
    assert relative_error(total, losses.double().sum()) < 1e-7
    assert not losses.requires_grad


def test_the_gradient_is_scaled_by_what_comes_from_above(problem):
    hidden, weight, targets = problem
    hidden.requires_grad_()
    (once,) = torch.autograd.grad(head.linear_cross_entropy(hidden, Storage.dense(weight), targets)[0], hidden)
    (thrice,) = torch.autograd.grad(head.linear_cross_entropy(hidden, Storage.dense(weight), targets)[0] * 3, hidden)
    assert torch.allclose(thrice, 3 * once)


def test_no_gradient_is_computed_where_none_is_wanted(problem):
    hidden, weight, targets = problem
    stored = Storage.dense(weight)
    with torch.no_grad():
        total, _ = head.linear_cross_entropy(hidden.requires_grad_(), stored, targets)
    assert not total.requires_grad


def test_logits_are_held_for_few_rows_at_a_time():
    assert head.rows_at_once(4096, 49152) * 49152 * 4 <= 24 * 2**20
    assert head.rows_at_once(1, 49152) == 1
    assert head.rows_at_once(0, 100) == 1
    assert head.rows_at_once(500, 256000) == 63
    assert head.rows_at_once(100, 10**7) == 50


def test_nan_and_inf_give_a_loss_that_is_not_finite(problem):
    hidden, weight, targets = problem
    for value in (float("nan"), float("inf")):
        spoilt = hidden.clone()
        spoilt[3, 4] = value
        for mode in native.MODES:
            with native.forced(mode):
                total, losses = head.linear_cross_entropy(spoilt, Storage.dense(weight), targets)
            assert not total.isfinite()
            assert losses.isfinite().sum() == 69


def test_results_do_not_depend_on_the_number_of_threads(problem):
    hidden, weight, targets = problem

    def run():
        leaf = hidden.clone().requires_grad_()
        total, losses = head.linear_cross_entropy(leaf, Storage.dense(weight), targets)
        return [total.detach(), losses, *torch.autograd.grad(total, leaf)]

    assert_same_for_all_threads(run)


def test_the_sum_of_many_losses_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    weight, hidden, targets = Storage.dense(torch.randn(7, 3)), torch.randn(40_000, 3), torch.randint(0, 7, (40_000,))
    assert_same_for_all_threads(lambda: list(head.linear_cross_entropy(hidden, weight, targets)))


def test_no_supervised_rows_is_a_loss_of_zero(problem):
    _, weight, _ = problem
    total, losses = head.linear_cross_entropy(torch.zeros(0, 64), Storage.dense(weight), torch.zeros(0, dtype=torch.int64))
    assert float(total) == 0.0
    assert losses.shape == (0,)


def test_bad_arguments_are_named(problem):
    hidden, weight, targets = problem
    stored = Storage.dense(weight)
    with pytest.raises(ShapeError, match=r"hidden must be float32 of shape \(S, 64\); got \(70, 64\) torch\.float64"):
        head.linear_cross_entropy(hidden.double(), stored, targets)
    with pytest.raises(ShapeError, match=r"targets must be int64 of shape \(70,\)"):
        head.linear_cross_entropy(hidden, stored, targets[:3])
    with pytest.raises(ShapeError, match=r"targets must lie in \[0, 333\); got -100 to .*no index that is ignored"):
        head.linear_cross_entropy(hidden, stored, targets.clone().index_fill_(0, torch.tensor([1]), -100))
    with pytest.raises(ShapeError, match=r"softcap must be above 0"):
        head.linear_cross_entropy(hidden, stored, targets, softcap=0.0)
    with pytest.raises(ShapeError, match=r"softcap must be above 0 and finite, or None for no cap; got inf"):
        head.linear_cross_entropy(hidden, stored, targets, softcap=float("inf"))
    with pytest.raises(ShapeError, match=r"label_smoothing must be in \[0, 1\); got 1\.0"):
        head.linear_cross_entropy(hidden, stored, targets, label_smoothing=1.0)


def test_the_op_has_an_honest_schema_and_fake(problem):
    hidden, weight, targets = problem
    for gradient in (False, True):
        arguments = (hidden, [weight], [0, 333, 64, 0, 1], [0.0, 1.0], None, targets, 1.0, 0.0, 0.0, gradient)
        torch.library.opcheck(torch.ops.luthier.linear_cross_entropy.default, arguments)


# VmHWM and not getrusage, whose maximum counts what the process that started this one held.
MEMORY_SCRIPT = """
import torch
from luthier.kernels.head import linear_cross_entropy
from luthier.kernels.storage import Storage
def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0])
head = Storage.dense(torch.randn(49152, 64).bfloat16())
hidden, targets = torch.randn(4096, 64, requires_grad=True), torch.randint(0, 49152, (4096,))
linear_cross_entropy(hidden[:8], head, targets[:8])[0].backward()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = peak()
linear_cross_entropy(hidden, head, targets)[0].backward()
print(peak() - before)
"""


def test_the_gradient_through_a_vocabulary_of_49152_agrees_with_float64():
    torch.manual_seed(0)
    weight, hidden, targets = torch.randn(49152, 96) / 5, torch.randn(7, 96), torch.randint(0, 49152, (7,))
    for options in ({}, {"softcap": 8.0, "label_smoothing": 0.1}):
        assert_close_to_float64(
            lambda h, o=options: head.linear_cross_entropy(h, Storage.dense(weight), targets, **o)[0],
            lambda h, o=options: exact(h, weight, targets, **o),
            [hidden],
        )


def test_widths_and_vocabularies_of_several_blocks_agree_with_float64():
    torch.manual_seed(0)
    weight, hidden = torch.randn(1700, 900) / 10, torch.randn(31, 900)
    targets = torch.tensor([0, 767, 768, 1535, 1536, 1699]).repeat(6)[:31]  # first and last of each block
    for options in ({"bias": torch.randn(1700)}, {"softcap": 8.0, "label_smoothing": 0.1}):
        assert_close_to_float64(
            lambda h, o=options: head.linear_cross_entropy(h, Storage.dense(weight), targets, **o)[0],
            lambda h, o=options: exact(h, weight, targets, **o),
            [hidden],
        )


@pytest.mark.slow
def test_peak_extra_memory_at_4096_rows_and_49152_tokens():
    run = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert 2**20 <= int(run.stdout) * 1024 <= 64 * 10**6


def test_a_logit_of_minus_infinity_is_a_token_that_never_comes(problem):
    hidden, weight, targets = problem
    bias = torch.zeros(333)
    bias[targets.max() + 1 :] = float("-inf")
    bias[0], targets = float("-inf"), targets.clamp_min(1)
    assert_close_to_float64(
        lambda h: head.linear_cross_entropy(h, Storage.dense(weight), targets, bias=bias)[0],
        lambda h: exact(h, weight, targets, bias=bias),
        [hidden],
    )
