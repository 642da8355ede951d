"""frozen_linear: against float64, for every storage, ragged shapes, groups; the same bits for every number of threads."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_same_for_all_threads, called, relative_error
from stored import KINDS, RAGGED_KINDS, random_storage
from torch import Tensor

from luthier import kernels
from luthier.errors import ShapeError
from luthier.kernels import Part, Term, linear_native, native
from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.linear_ops import (
    backward_input_op,
    column_sums,
    factor_product,
    flatten,
    forward_op,
    outer_op,
    rows_op,
)
from luthier.kernels.quantize import quantize_gguf
from luthier.kernels.storage import KINDS as NUMBERED_KINDS

# (T, out, in, rank): one token, few, a ragged sliver, several panels, ranks beside the panel's width, two blocks of rows,
# rows long enough that backward takes several groups of columns at once.
SHAPES = [
    (1, 40, 256, 0),
    (1, 33, 512, 5),
    (3, 33, 256, 5),
    (4, 64, 512, 16),
    (7, 30, 256, 1),
    (37, 100, 768, 40),
    (130, 64, 512, 8),
    (650, 32, 256, 16),
    (9, 40, 2304, 4),
]
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
RAGGED_SHAPES = [(1, 7, 50, 2), (2, 45, 77, 0), (19, 45, 77, 5), (5, 1, 1, 1), (64, 33, 95, 3), (5, 21, 2090, 2)]


def example(kind: str, tokens: int, out_features: int, in_features: int, rank: int) -> tuple[Part, Tensor]:
    torch.manual_seed(tokens + out_features)
    storage = random_storage(kind, out_features, in_features)
    factors = (torch.randn(rank, in_features, requires_grad=True), torch.randn(out_features, rank, requires_grad=True))
    term = Term(*factors, 0.5) if rank else None
    return Part(storage, torch.randn(out_features, requires_grad=True), term), torch.randn(
        tokens, in_features, requires_grad=True
    )


def run(part: Part, x: Tensor, grad: Tensor) -> list[Tensor]:
    """y and its gradients to x, bias, A and B."""
    leaves = [x, part.bias, *((part.term.A, part.term.B) if part.term else ())]
    y = kernels.frozen_linear(x, part.storage, part.bias, part.term)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def exact(part: Part, x: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in (x, part.bias, *((part.term.A, part.term.B) if part.term else ()))]
    y = leaves[0] @ dequantize_reference(part.storage).double().T + leaves[1]
    if part.term:
        y = y + part.term.scaling * (leaves[0] @ leaves[2].T) @ leaves[3].T
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]


def check(kind: str, shape: tuple[int, int, int, int]) -> None:
    part, x = example(kind, *shape)
    grad = torch.randn(shape[0], shape[1])
    expected = exact(part, x, grad)
    for mode in native.MODES:
        with native.forced(mode):
            results = run(part, x, grad)
        bound = 2e-6 * max(shape[2] / 1000, 0.1) ** 0.5
        assert relative_error(results[0], expected[0]) <= bound, f"{mode}: y"
        for name, got, want in zip(("x", "bias", "A", "B"), results[1:], expected[1:], strict=False):
            assert got.shape == want.shape
            assert relative_error(got, want) <= 1e-5, f"{mode}: gradient to {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_agree_with_float64(kind):
    for shape in SHAPES:
        check(kind, shape)


@pytest.mark.parametrize("kind", RAGGED_KINDS)
def test_ragged_shapes_agree_with_float64(kind):
    for shape in RAGGED_SHAPES:
        check(kind, shape)


@pytest.mark.parametrize("in_features", [1024, 4096])
def test_long_contractions_keep_the_error_bound(in_features):
    storage = random_storage("bf16", 48, in_features)
    x = torch.randn(70, in_features)
    for tokens in (1, 4, 70):
        got = kernels.frozen_linear(x[:tokens], storage)
        want = x[:tokens].double() @ dequantize_reference(storage).double().T
        assert relative_error(got, want) <= 2e-6 * (in_features / 1000) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_with_a_mean_far_above_its_spread_keeps_the_error_bound(kind):
    torch.manual_seed(1)
    storage = random_storage(kind, 64, 4096)
    x = 100 + torch.randn(1, 4096)
    want = x.double() @ dequantize_reference(storage).double().T
    assert relative_error(kernels.frozen_linear(x, storage), want) <= 2e-6 * 4.096**0.5


@pytest.mark.parametrize("kind", KINDS)
def test_2_to_32_tokens_with_a_mean_far_above_their_spread_keep_the_error_bound(kind):
    """Few tokens and tiles decode each weight before it is multiplied, whatever their number."""
    torch.manual_seed(1)
    storage = random_storage(kind, 64, 4096)
    x = 100 + torch.randn(32, 4096)
    want = x.double() @ dequantize_reference(storage).double().T
    for tokens in (2, 3, 4, 5, 8, 16, 32):
        got = kernels.frozen_linear(x[:tokens], storage)
        assert relative_error(got, want[:tokens]) <= 2e-6 * 4.096**0.5, tokens


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_one_token_with_a_mean_and_weights_about_zero_keeps_the_error_bound(kind):
    torch.manual_seed(1)
    storage = kernels.Storage(kind.lower(), (64, 4096), quantize_gguf(torch.randn(64, 4096), kind))
    x = 100 + torch.randn(1, 4096)
    want = x.double() @ dequantize_reference(storage).double().T
    assert relative_error(kernels.frozen_linear(x, storage), want) <= 2e-6 * 4.096**0.5


@pytest.mark.parametrize("kind", ["q4_0", "q5_0"])
def test_one_token_of_equal_values_keeps_the_error_bound(kind):
    storage = random_storage(kind, 64, 4096)
    x = torch.full((1, 4096), 1e4 / 3)
    want = x.double() @ dequantize_reference(storage).double().T
    assert relative_error(kernels.frozen_linear(x, storage), want) <= 2e-6 * 4.096**0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_one_token_that_is_not_finite_gives_what_the_dequantised_matrix_gives(kind, bad):
    torch.manual_seed(2)
    storage = random_storage(kind, 64, 512)
    x = torch.randn(1, 512)
    x[0, 300] = bad
    got, want = kernels.frozen_linear(x, storage), x.double() @ dequantize_reference(storage).double().T
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.float().nan_to_num())
    assert not got.isfinite().any()


@pytest.mark.parametrize("kind", ["f32", "bf16", "nf4-double", "q4_k"])
@pytest.mark.parametrize("tokens", [2, 70])
def test_results_do_not_depend_on_the_number_of_threads(kind, tokens):
    part, x = example(kind, tokens, 150, 512, 16)
    grad = torch.randn(tokens, 150)
    assert_same_for_all_threads(lambda: run(part, x, grad))


@pytest.mark.parametrize("tokens", [2, 70])
def test_the_first_layers_gradients_do_not_depend_on_the_number_of_threads(tokens):
    part, x = example("bf16", tokens, 150, 512, 16)
    grad = torch.randn(tokens, 150)

    def factors_and_bias() -> list[Tensor]:
        y = kernels.frozen_linear(x.detach(), part.storage, part.bias, part.term)
        return list(torch.autograd.grad(y, [part.bias, part.term.A, part.term.B], grad))

    assert_same_for_all_threads(factors_and_bias)


def test_sums_over_tokens_agree_with_float64_whatever_the_threads():
    torch.manual_seed(0)
    tokens = 4200  # more than are packed at once
    dy, B, u = torch.randn(tokens, 70), torch.randn(70, 5), torch.randn(tokens, 5)
    for mode in native.MODES:
        with native.forced(mode):
            assert relative_error(column_sums(dy), dy.double().sum(0)) <= 1e-6
            assert relative_error(factor_product(dy, B), dy.double() @ B.double()) <= 1e-6
            assert relative_error(outer_op(u, dy, 0.5, False), 0.5 * u.double().T @ dy.double()) <= 1e-6
            assert relative_error(outer_op(u, dy, 0.5, True), 0.5 * dy.double().T @ u.double()) <= 1e-6
    assert_same_for_all_threads(lambda: [column_sums(dy), factor_product(dy, B), outer_op(u, dy, 0.5, True)])
    assert torch.equal(column_sums(dy[:0]), torch.zeros(70))


@pytest.mark.parametrize("flush", [False, True])
def test_denormal_results_do_not_depend_on_the_number_of_threads(flush):
    """Threads that torch started before the flag was set must flush like the one that set it."""
    torch.manual_seed(0)
    weight, x = kernels.Storage.dense(torch.randn(300, 64)), torch.randn(40, 64) * 1e-38
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        kernels.frozen_linear(x, weight)
        torch.set_flush_denormal(flush)
        assert_same_for_all_threads(lambda: [kernels.frozen_linear(x, weight) * 1.0, kernels.frozen_linear(x[:1], weight)])
        y = kernels.frozen_linear(x * 1e-3, weight)
        assert bool((y == 0).all()) == flush
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_group_equals_its_layers(tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, 256, requires_grad=True)
    parts = [
        example(kind, tokens, size, 256, rank)[0] for kind, size, rank in (("nf4", 96, 16), ("q8_0", 40, 0), ("f32", 33, 4))
    ]
    grads = [torch.randn(tokens, part.storage.shape[0]) for part in parts]
    alone = [kernels.frozen_linear(x, part.storage, part.bias, part.term) for part in parts]
    together = kernels.frozen_linear_group(x, parts)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    leaves = [x, *(t for part in parts if part.term for t in (part.term.A, part.term.B))]
    expected = torch.autograd.grad(alone, leaves, grads)
    for got, want in zip(torch.autograd.grad(together, leaves, grads), expected, strict=True):
        assert relative_error(got, want) <= 1e-6


def test_leading_dimensions_and_empty_batches():
    storage = random_storage("bf16", 5, 64)
    assert kernels.frozen_linear(torch.randn(2, 3, 64), storage).shape == (2, 3, 5)
    x = torch.randn(0, 64, requires_grad=True)
    y = kernels.frozen_linear(x, storage)
    assert y.shape == (0, 5)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, 64)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_factors_of_any_layout_are_taken_with_and_without_gradients(tokens):
    torch.manual_seed(0)
    x, storage = torch.randn(tokens, 64), random_storage("bf16", 20, 64)
    bias, A, B = torch.randn(40)[::2], torch.randn(64, 4).T, torch.randn(4, 20).T
    want = kernels.frozen_linear(x, storage, bias.contiguous(), Term(A.contiguous(), B.contiguous(), 0.5))
    assert torch.equal(kernels.frozen_linear(x, storage, bias, Term(A, B, 0.5)), want)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, bias, A, B)]
    y = kernels.frozen_linear(leaves[0], storage, leaves[1], Term(leaves[2], leaves[3], 0.5))
    assert torch.equal(y, want)
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_transposed_matrix_are_a_copy(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    storage, before = kernels.Storage.dense(weight, transposed=True), weight.clone()
    ids = torch.arange(shape[1])
    for mode in native.MODES:
        with native.forced(mode):
            for got in (kernels.dequantize(storage), kernels.rows(storage, ids)):
                assert got.is_contiguous()
                assert torch.equal(got, before.T.float())
                got.zero_()
                assert torch.equal(weight, before)


def test_x_that_is_no_leaf_of_interest_gets_no_gradient():
    part, x = example("f32", 9, 20, 64, 4)
    y = kernels.frozen_linear(x.detach(), part.storage, None, part.term)
    got = torch.autograd.grad(y.sum(), [part.term.A, part.term.B])
    want = exact(part, x, torch.ones(9, 20))[3:]
    for one, other in zip(got, want, strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [3, 20])
def test_nan_and_inf_propagate(bad, tokens):
    storage = random_storage("bf16", 40, 70)
    x = torch.randn(tokens, 70)
    x[1, 69] = bad
    y = kernels.frozen_linear(x, storage)
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[0, 2]]).all()
    weight = torch.randn(40, 70)
    weight[5, 3] = bad
    y = kernels.frozen_linear(torch.ones(tokens, 70), kernels.Storage.dense(weight))
    assert not torch.isfinite(y[:, 5]).any()
    assert torch.isfinite(y[:, :5]).all()


def test_what_does_not_fit_is_refused():
    storage = random_storage("f32", 4, 8)
    for x, message in [(torch.zeros(2, 8).double(), "x must be float32"), (torch.zeros(2, 7), "x must have 8 features")]:
        with pytest.raises(ShapeError, match=message):
            kernels.frozen_linear(x, storage)
    with pytest.raises(ShapeError, match="bias must be float32 of shape"):
        kernels.frozen_linear(torch.zeros(2, 8), storage, torch.zeros(5))
    with pytest.raises(ShapeError, match=r"A must be \(r, 8\) and B \(4, r\)"):
        kernels.frozen_linear(torch.zeros(2, 8), storage, None, Term(torch.zeros(3, 8), torch.zeros(4, 2)))
    with pytest.raises(ShapeError, match="layers of a group share x"):
        kernels.frozen_linear_group(torch.zeros(2, 8), [Part(storage), Part(random_storage("f32", 4, 9))])


BF16, NF4, Q8_0 = (NUMBERED_KINDS.index(kind) for kind in ("bf16", "nf4", "q8_0"))


@pytest.mark.parametrize(
    ("stored", "layout", "message"),
    [
        ([torch.zeros(4, 32)], [BF16, 4, 32, 0, 1], "the bf16 matrix must be torch.bfloat16; got torch.float32"),
        ([torch.zeros(4, 32).bfloat16()], [BF16, 5, 32, 0, 1], r"the bf16 matrix must have shape \(5, 32\); got \(4, 32\)"),
        ([torch.zeros(32, 4).bfloat16()], [BF16, 4, 32, 0, 1], r"the bf16 matrix must have shape \(4, 32\)"),
        ([torch.zeros(32, 4).bfloat16().T], [BF16, 4, 32, 0, 1], "the bf16 matrix must be contiguous"),
        ([torch.zeros(4, 32).bfloat16()], [99, 4, 32, 0, 1], "a kind's number is below 12, transposed 0 or 1; got 99 and 0"),
        ([torch.zeros(4, 32).bfloat16()], [BF16, 4, 32, 2, 1], "transposed 0 or 1; got 1 and 2"),
        ([torch.zeros(4, 32).bfloat16()], [BF16, 4, 32, 0], "layout has 5 integers a matrix"),
        ([torch.zeros(4, 32).bfloat16()] * 2, [BF16, 4, 32, 0, 1], "for 2 tensors"),
        ([torch.zeros(4, 32).bfloat16()] * 2, [BF16, 4, 32, 0, 2], "only nf4 has scales beside its data; got 2 tensors"),
        ([torch.zeros(4 * 34 - 1, dtype=torch.uint8)], [Q8_0, 4, 32, 0, 1], "the q8_0 blocks must have elements 136"),
        ([torch.zeros(4 * 34, dtype=torch.uint8)], [Q8_0, 4, 32, 1, 1], "only dense matrices may lie transposed"),
        ([torch.zeros(64, dtype=torch.uint8)], [NF4, 4, 32, 0, 1], "nf4 storage needs absmax and code"),
        ([], [BF16, 4, 32, 0, 0], "a matrix is stored in 1 to 5 tensors; got 0"),
        ([torch.zeros(4, 32, device="meta").bfloat16()], [BF16, 4, 32, 0, 1], "a stored tensor must be on the CPU; got meta"),
    ],
)
def test_ops_called_past_the_front_end_check_what_is_stored(stored, layout, message):
    none = [None]
    with native.forced("native"):
        for call in (
            lambda: linear_native.forward(torch.zeros(2, 32), stored, layout, [0.0, 1.0], none, none, none),
            lambda: linear_native.backward_input([torch.zeros(2, 4)], stored, layout, [0.0, 1.0], none, none),
            lambda: linear_native.rows(stored, layout, [0.0, 1.0], None),
        ):
            with pytest.raises(ShapeError, match=message):
                call()


def test_ops_called_past_the_front_end_check_their_lists():
    stored, layout, numbers, *_ = flatten([Part(kernels.Storage.dense(torch.zeros(4, 8)))])
    x, none, A = torch.zeros(2, 8), [None], [torch.zeros(3, 8)]
    for arguments, message in [
        ((x, stored, layout, numbers, [], none, none), "bias must have one element for each of 1 matrices; got 0"),
        ((x, stored, layout, numbers, none, A, none), "a low-rank term has both A and B"),
        ((x, stored, layout, numbers, none, A, [torch.zeros(4, 2)]), r"B must have shape \(4, 3\)"),
        ((x[0], stored, layout, numbers, none, none, none), r"x must have shape \(\*, 8\)"),
        ((x, stored, layout, numbers[:1], none, none, none), "numbers 2; got 5 and 1"),
    ]:
        with native.forced("native"), pytest.raises(ShapeError, match=message):
            forward_op(*arguments)
    with native.forced("native"), pytest.raises(ShapeError, match=r"the inner result must have shape \(\*, \*\)"):
        outer_op(torch.zeros(2), x, 1.0, False)


@pytest.mark.parametrize("tests", [("test_schema", "test_faketensor"), pytest.param(ALL_CHECKS, marks=pytest.mark.slow)])
def test_ops_pass_opcheck_and_are_native(tests):
    part, x = example("nf4-double", 6, 20, 64, 4)
    stored, layout, numbers, bias, A, B = (
        [t.detach() if isinstance(t, Tensor) else t for t in values] for values in flatten([part, part])
    )
    x, dy = x.detach(), torch.randn(6, 20)
    single = flatten([Part(part.storage)])[:3]
    with called("frozen_linear", "frozen_linear_backward_input", "frozen_linear_backward_factor", "dequantize_rows"):
        for op, arguments in (
            (forward_op, (x, stored, layout, numbers, bias, A, B)),
            (backward_input_op, ([dy, dy], stored, layout, numbers, A, B)),
            (outer_op, (torch.randn(6, 4), dy, 0.5, True)),
            (rows_op, (*single, torch.tensor([1, 2]))),
            (rows_op, (*single, None)),
        ):
            torch.library.opcheck(op, arguments, test_utils=tests)
