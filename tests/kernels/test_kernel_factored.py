"""factored_linear: against float64, for every storage, ragged shapes, any places; the same bits for every number of threads."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_same_for_all_threads, called, relative_error
from stored import random_storage
from torch import Tensor

from luthier import kernels
from luthier.errors import ShapeError
from luthier.kernels import Storage, native
from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.factored_linear import backward_input_op, factored_linear, forward_op
from luthier.kernels.linear_ops import Part, flatten
from luthier.kernels.storage import GGUF_BLOCKS

KINDS = ("f32", "bf16", "f16", "nf4", "nf4-double", *GGUF_BLOCKS)
RAGGED_KINDS = KINDS[:5]
OPS = ("factored_linear", "factored_linear_backward_input")
FORMS = ("plain", "pivoted", "repeated")
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

# (T, rows of L, in, rank). One token, few, one short panel, a full one, several; ranks and rows beside a sliver's.
SHAPES = [(1, 40, 256, 256), (4, 33, 512, 256), (5, 30, 256, 256), (40, 100, 768, 256), (130, 45, 256, 512)]
RAGGED_SHAPES = [
    (1, 7, 50, 3), (2, 45, 77, 5), (5, 1, 1, 1), (15, 20, 33, 31), (16, 20, 33, 32), (17, 45, 77, 48), (33, 64, 95, 144),
    (64, 13, 14, 15), (95, 29, 61, 16), (513, 19, 27, 17), (9, 40, 2304, 4), (5, 2090, 21, 2),
]  # fmt: skip


def places_of(form: str, rows: int, rank: int, generator: torch.Generator) -> Tensor | None:
    """None; each row once, in any order; or some rows twice and others never."""
    if form == "plain":
        return None
    if form == "pivoted":
        return torch.randperm(rows + rank, generator=generator).to(torch.int32)
    return torch.randint(0, rows + rank, (rows + rank // 2 + 1,), generator=generator).to(torch.int32)


def example(kinds: tuple[str, str], shape: tuple[int, int, int, int], form: str):
    tokens, rows, columns, rank = shape
    generator = torch.Generator().manual_seed(tokens + rows)
    left, right = random_storage(kinds[0], rows, rank, seed=1), random_storage(kinds[1], rank, columns, seed=2)
    places = places_of(form, rows, rank, generator)
    outputs = rows if places is None else len(places)
    x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(outputs, generator=generator)
    return left, right, places, x, bias, torch.randn(tokens, outputs, generator=generator)


def dense(left: Storage, right: Storage, places: Tensor | None) -> Tensor:
    R = dequantize_reference(right).double()
    W = dequantize_reference(left).double() @ R
    return W if places is None else torch.cat([R, W])[places.long()]


def results(left: Storage, right: Storage, places: Tensor | None, x: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """y and its gradients to x and bias."""
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = factored_linear(x, left, right, places, bias)
    return [y.detach(), *torch.autograd.grad(y, [x, bias], dy)]


def check(kinds: tuple[str, str], shape: tuple[int, int, int, int], form: str, modes: tuple[str, ...] = native.MODES) -> None:
    left, right, places, x, bias, dy = example(kinds, shape, form)
    W = dense(left, right, places)
    expected = [x.double() @ W.T + bias.double(), dy.double() @ W, dy.double().sum(0)]
    for mode in modes:
        with native.forced(mode):
            got = results(left, right, places, x, bias, dy)
        for name, one, want in zip(("y", "dx", "dbias"), got, expected, strict=True):
            assert one.shape == want.shape
            assert relative_error(one, want) <= 3e-6, f"{mode} {shape} {form}: {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_agree_with_float64(kind):
    with called(*OPS):
        for shape in SHAPES:
            for form in FORMS:
                check((kind, kind), shape, form)


@pytest.mark.parametrize("kind", RAGGED_KINDS)
def test_ragged_shapes_agree_with_float64(kind):
    for shape in RAGGED_SHAPES:
        for form in FORMS:
            check((kind, kind), shape, form)


@pytest.mark.parametrize("kinds", [("nf4", "bf16"), ("q4_0", "f32"), ("f16", "q8_0")])
def test_factors_may_be_stored_differently(kinds):
    for form in FORMS:
        check(kinds, (70, 50, 64, 32), form)


# x whose rows are whole pages apart; weights that are not decoded at once, in each of the four products; more tokens than a
# block; results of so many outputs that a block has few tokens.
LARGE_SHAPES = [(70, 1024, 1024, 40), (40, 1500, 1536, 1400), (1100, 20, 16, 8), (200, 20000, 32, 8)]


@pytest.mark.parametrize("shape", LARGE_SHAPES)
def test_work_in_several_pieces_agrees_with_float64(shape):
    for form in FORMS:
        check(("bf16", "bf16"), shape, form, ("native",))


def test_every_number_of_tokens_gives_the_rows_of_all():
    left, right, places, x, bias, _ = example(("bf16", "nf4"), (70, 50, 64, 30), "pivoted")
    whole = factored_linear(x, left, right, places, bias)
    for tokens in range(5, 70):
        assert torch.equal(factored_linear(x[:tokens], left, right, places, bias), whole[:tokens])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [3, 20, 300])
def test_threads_do_not_change_results(form, tokens):
    example_of_form = example(("nf4", "bf16"), (tokens, 150, 96, 80), form)
    assert_same_for_all_threads(lambda: results(*example_of_form))


def test_places_may_name_only_pivots_or_none():
    left, right, _, x, _, _ = example(("f32", "f32"), (37, 20, 24, 30), "plain")
    for places in (torch.arange(29, -1, -1), torch.arange(30, 50)):
        shift, grad = torch.randn(len(places)), torch.randn(37, len(places))
        got = results(left, right, places.to(torch.int32), x, shift, grad)
        W = dense(left, right, places)
        assert relative_error(got[0], x.double() @ W.T + shift) <= 3e-6
        assert relative_error(got[1], grad.double() @ W) <= 3e-6


def test_leading_dimensions_no_bias_and_strided_inputs():
    left, right, places, x, _, dy = example(("bf16", "bf16"), (12, 20, 64, 30), "pivoted")
    expected = x.double() @ dense(left, right, places).T
    y = factored_linear(x.reshape(3, 4, 64), left, right, places)
    assert y.shape == (3, 4, 50)
    assert relative_error(y.reshape(12, 50), expected) <= 3e-6
    strided = x.T.contiguous().T.requires_grad_()
    factored_linear(strided, left, right, places).backward(dy.T.contiguous().T)
    assert relative_error(strided.grad, dy.double() @ dense(left, right, places)) <= 3e-6
    assert factored_linear(torch.zeros(0, 64), left, right, places).shape == (0, 50)


def described(storage: Storage):
    return flatten([Part(storage)])[:3]


@pytest.mark.parametrize("form", FORMS)
def test_ops_are_registered_as_torch_wants_them(form):
    left, right, places, x, bias, dy = example(("nf4", "bf16"), (6, 20, 32, 8), form)
    factors = (*described(left), *described(right))
    torch.library.opcheck(forward_op, (x, *factors, places, bias), test_utils=ALL_CHECKS)
    torch.library.opcheck(backward_input_op, (dy, *factors, places), test_utils=ALL_CHECKS)


def test_what_does_not_fit_is_refused():
    left, right, places, x, _, _ = example(("f32", "f32"), (6, 20, 32, 8), "pivoted")
    with pytest.raises(ShapeError, match=r"x must be float32, in which all products are computed; got torch.float64"):
        factored_linear(x.double(), left, right)
    with pytest.raises(
        ShapeError, match=r"factors are \(out, rank\) and \(rank, in\), not transposed; got \(8, 32\) and \(20, 8\)"
    ):
        factored_linear(x, right, left)
    with pytest.raises(ShapeError, match="not transposed"):
        factored_linear(x, Storage.dense(torch.zeros(8, 20), transposed=True), right)
    with pytest.raises(ShapeError, match=r"x must have 32 features in its last dimension; got shape \(6, 31\)"):
        factored_linear(x[:, :31], left, right)
    with pytest.raises(ShapeError, match=r"bias must be float32 of shape \(28,\); got \(20,\)"):
        factored_linear(x, left, right, places, torch.zeros(20))
    for mode in native.MODES:
        for wrong, came in ((places.long(), r"\(28,\) torch.int64"), (places[0], r"\(\) torch.int32")):
            with (
                native.forced(mode),
                pytest.raises(ShapeError, match=rf"places must be torch.int32 of shape \(out_features,\); got {came}"),
            ):
                factored_linear(x, left, right, wrong)
    with pytest.raises(ShapeError, match="lt_factored_forward refused its arguments"):
        factored_linear(x, left, right, places + 1)


def test_nf4_rows_that_begin_anywhere_are_read_alike():
    """Rows of 1 to 140 weights: most begin in the middle of a scale, a vector or a byte."""
    for columns in (1, 7, 16, 33, 48, 63, 90, 100, 140):
        for kind in ("nf4", "nf4-double"):
            storage = random_storage(kind, 37, columns)
            assert torch.equal(kernels.dequantize(storage), dequantize_reference(storage))
            x = torch.randn(40, columns)
            y = kernels.frozen_linear(x, storage)
            assert relative_error(y, x.double() @ dequantize_reference(storage).double().T) <= 3e-6
