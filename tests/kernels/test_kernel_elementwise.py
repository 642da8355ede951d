"""Norms, rotary embedding and gated activations against float64, over ragged shapes and all layouts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_close_to_float64, assert_same_for_all_threads, called, values_and_gradients

from luthier.errors import ShapeError
from luthier.kernels import elementwise, native

SHAPES = ((1, 5), (7, 67), (33, 576), (300, 64), (3, 4096))


def exact_rms_norm(x, weight, plus):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (weight + plus)


def exact_rotary(x, cos, sin):
    size = cos.shape[-1]
    turned = torch.cat([-x[..., size // 2 : size], x[..., : size // 2]], -1)
    return torch.cat([x[..., :size] * cos.unsqueeze(1) + turned * sin.unsqueeze(1), x[..., size:]], -1)


def tables(tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(tokens, size // 2)
    return torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()


def test_the_library_is_called_forward_and_backward():
    assert native.use_native()
    x, w = torch.randn(4, 32), torch.randn(32)
    with called("rms_norm", "rms_norm_backward", "layer_norm", "layer_norm_backward", "gated", "gated_backward"):
        values_and_gradients(lambda x, w: elementwise.rms_norm(x, w, 1e-6), [x, w])
        values_and_gradients(lambda x, w: elementwise.layer_norm(x, w, None, 1e-6), [x, w])
        values_and_gradients(elementwise.swiglu, [x, x])
    cos, sin = tables(4, 8)
    with called("rotary_", "rotary"):
        values_and_gradients(lambda q, k: elementwise.rotary_(q + 0, k + 0, cos, sin), [x.view(4, 4, 8), x.view(4, 4, 8)])


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, plus_one):
    torch.manual_seed(0)
    x, residual, w = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    plus = float(plus_one)
    assert_close_to_float64(
        lambda x, w: elementwise.rms_norm(x, w, 1e-6, plus_one=plus_one), lambda x, w: exact_rms_norm(x, w, plus), [x, w]
    )
    assert_close_to_float64(
        lambda x, r, w: elementwise.add_rms_norm(x, r, w, 1e-6, plus_one=plus_one),
        lambda x, r, w: (x + r, exact_rms_norm(x + r, w, plus)),
        [x, residual, w],
    )


def test_only_one_result_of_add_rms_norm_may_be_used():
    x, r, w = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    for used in (0, 1):
        assert_close_to_float64(
            lambda x, r, used=used: elementwise.add_rms_norm(x, r, w, 1e-6)[used],
            lambda x, r, used=used: (x + r, exact_rms_norm(x + r, w.double(), 0.0))[used],
            [x, r],
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape):
    torch.manual_seed(0)
    width = shape[1]
    x, w, b = torch.randn(shape) + 3, torch.randn(width), torch.randn(width)
    assert_close_to_float64(
        lambda x, w, b: elementwise.layer_norm(x, w, b, 1e-5), lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-5), [x, w, b]
    )
    assert_close_to_float64(
        lambda x, w: elementwise.layer_norm(x, w, None, 1e-5), lambda x, w: F.layer_norm(x, (width,), w, None, 1e-5), [x, w]
    )


def test_weight_gradients_of_many_rows_are_added_from_a_bounded_number_of_parts():
    torch.manual_seed(0)
    x, w = torch.randn(70, 16400), torch.randn(16400)
    assert_close_to_float64(lambda x, w: elementwise.rms_norm(x, w, 1e-6), lambda x, w: exact_rms_norm(x, w, 0.0), [x, w])
    assert_same_for_all_threads(lambda: values_and_gradients(lambda x, w: elementwise.layer_norm(x, w, w, 1e-6), [x, w]))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "turned"), [(9, 3, 64, 64), (4, 2, 80, 20), (2, 1, 16, 6), (3, 3, 128, 2)]
)
def test_rotary(heads, kv_heads, size, turned):
    torch.manual_seed(0)
    cos, sin = tables(13, turned)
    assert_close_to_float64(
        lambda q, k: elementwise.rotary_(q * 1, k * 1, cos, sin),
        lambda q, k: (exact_rotary(q, cos.double(), sin.double()), exact_rotary(k, cos.double(), sin.double())),
        [torch.randn(13, heads, size), torch.randn(13, kv_heads, size)],
    )


def test_rotary_works_in_place_and_on_rows_that_lie_apart():
    fused = torch.randn(6, 5 * 16)
    q, k = fused[:, :48].view(6, 3, 16), fused[:, 48:].view(6, 2, 16)
    cos, sin = tables(6, 16)
    expected = exact_rotary(q, cos, sin), exact_rotary(k, cos, sin)
    turned = elementwise.rotary_(q, k, cos, sin)
    assert turned[0].data_ptr() == q.data_ptr()
    assert torch.allclose(q, expected[0], atol=1e-6)
    assert torch.allclose(k, expected[1], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_gated(op, shape):
    torch.manual_seed(0)
    act = F.silu if op == "swiglu" else lambda x: F.gelu(x, approximate="tanh")
    gate, up = torch.randn(shape) * 4, torch.randn(shape)
    assert_close_to_float64(getattr(elementwise, op), lambda g, u: act(g) * u, [gate, up])
    fused = torch.randn(shape[0], 2 * shape[1])
    assert_close_to_float64(
        lambda x: getattr(elementwise, op)(*x.chunk(2, -1)), lambda x: act(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [fused]
    )


def test_activations_keep_their_relative_accuracy_far_out():
    x = torch.linspace(-80, 80, 4001)
    one = torch.ones_like(x)
    for op, act in ((elementwise.swiglu, F.silu), (elementwise.geglu, lambda x: F.gelu(x, approximate="tanh"))):
        exact = act(x.double())
        near = (x.abs() < 4) if op is elementwise.geglu else torch.ones_like(x, dtype=torch.bool)
        assert bool(((op(x, one) - exact).abs() <= 2e-6 * exact.abs() + 1e-30)[near].all())


def test_nan_and_inf_spread_as_in_torch():
    x = torch.randn(4, 40)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("inf")
    w, up = torch.ones(40), torch.ones(4, 40)
    for got, expected in (
        (elementwise.rms_norm(x, w, 1e-6), exact_rms_norm(x, w, 0.0)),
        (elementwise.layer_norm(x, w, None, 1e-6), F.layer_norm(x, (40,), w, None, 1e-6)),
        (elementwise.swiglu(x, up), F.silu(x) * up),
        (elementwise.geglu(x, up), F.gelu(x, approximate="tanh") * up),
    ):
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert torch.allclose(got[3], expected[3], rtol=1e-5, atol=1e-6)


def test_large_results_that_go_past_the_caches_are_the_same():
    torch.manual_seed(0)
    x, w = torch.randn(2100, 2048), torch.randn(2048)
    assert torch.equal(elementwise.rms_norm(x, w, 1e-6)[:5], elementwise.rms_norm(x[:5], w, 1e-6))
    assert torch.equal(elementwise.swiglu(x, x)[-5:], elementwise.swiglu(x[-5:], x[-5:]))


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, w = torch.randn(1000, 96), torch.randn(96)
    cos, sin = tables(1000, 32)
    assert_same_for_all_threads(
        lambda: values_and_gradients(lambda x, r, w: elementwise.add_rms_norm(x, r, w, 1e-6), [x, x, w])
    )
    assert_same_for_all_threads(lambda: values_and_gradients(elementwise.geglu, [x, x]))
    heads = x.view(1000, 3, 32)
    assert_same_for_all_threads(
        lambda: values_and_gradients(lambda q, k: elementwise.rotary_(q + 0, k + 0, cos, sin), [heads, heads])
    )


def test_empty_packs_are_fine():
    x, w = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = elementwise.swiglu(elementwise.rms_norm(x, w, 1e-6), elementwise.layer_norm(x, w, None, 1e-6))
    y.sum().backward()
    assert torch.equal(w.grad, torch.zeros(8))


def test_bad_arguments_are_named():
    x = torch.randn(3, 8)
    with pytest.raises(ShapeError, match=r"one weight for each of the last dimension; got \(3, 8\), \(7,\)"):
        elementwise.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ShapeError, match=r"x must be torch\.float32; got torch\.bfloat16"):
        elementwise.rms_norm(x.bfloat16(), torch.ones(8), 1e-6)
    with pytest.raises(ShapeError, match=r"x and residual must have one shape"):
        elementwise.add_rms_norm(x, x[:2], torch.ones(8), 1e-6)
    with pytest.raises(ShapeError, match=r"gate and up must have one shape; got \(3, 8\) and \(3, 7\)"):
        elementwise.swiglu(x, x[:, :7])
    with pytest.raises(ShapeError, match=r"gate must be a float32 matrix"):
        elementwise.swiglu(x.double(), x.double())
    q = torch.randn(3, 2, 8)
    with pytest.raises(ShapeError, match=r"even width of at most the head size 8; got 10"):
        elementwise.rotary_(q, q.clone(), torch.ones(3, 10), torch.ones(3, 10))
    with pytest.raises(ShapeError, match=r"cos must have shape \(3, 8\); got \(2, 8\)"):
        elementwise.rotary_(q, q.clone(), torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(ShapeError, match=r"q must be \(T, heads, D\) with contiguous rows"):
        elementwise.rotary_(q.transpose(0, 1), q.clone(), torch.ones(2, 8), torch.ones(2, 8))


def misaligned(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(4 * count + 4), dtype=torch.float32, offset=1, count=count).view(shape)


def test_rows_whose_elements_or_heads_lie_apart_are_refused():
    cos, sin = tables(3, 8)
    apart = torch.randn(3, 1, 16)[..., ::2]
    crossed = torch.randn(3, 8, 2).transpose(1, 2)
    with native.forced("native"):
        for bad in (apart, crossed, torch.randn(3, 4, 8)[:, ::2]):
            with pytest.raises(ShapeError, match=r"q must be \(T, heads, D\) with contiguous rows"):
                torch.ops.luthier.rotary_(bad, torch.randn(3, 1, 8), cos, sin, False)
            with pytest.raises(ShapeError, match=r"x must be \(T, heads, D\) with contiguous rows"):
                torch.ops.luthier.rotary(bad, cos, sin, False)
        one_head = torch.randn(3, 2, 8)[:, :1]
        assert torch.allclose(torch.ops.luthier.rotary(one_head, cos, sin, False), exact_rotary(one_head, cos, sin), atol=1e-6)


def test_rows_that_overlap_are_read_but_not_turned_in_place():
    cos, sin = tables(3, 8)
    for shared in (torch.randn(1, 2, 8).expand(3, 2, 8), torch.randn(32).as_strided((3, 2, 8), (8, 8, 1))):
        with native.forced("native"):
            turned = torch.ops.luthier.rotary(shared, cos, sin, False)
            assert torch.allclose(turned, exact_rotary(shared, cos, sin), atol=1e-6)
            with pytest.raises(ShapeError, match=r"q is turned in place, so its rows must not overlap; got strides"):
                torch.ops.luthier.rotary_(shared, torch.randn(3, 2, 8), cos, sin, False)


def test_nothing_is_turned_before_everything_is_checked():
    cos, sin = tables(3, 8)
    q = torch.randn(3, 2, 8)
    before = q.clone()
    for k in (torch.randn(2, 1, 8), torch.randn(3, 1, 6), torch.randn(3, 1, 8).double(), misaligned(3, 1, 8)):
        with native.forced("native"), pytest.raises(ShapeError):
            torch.ops.luthier.rotary_(q, k, cos, sin, False)
        assert torch.equal(q, before)


def test_addresses_off_their_elements_are_refused():
    cos, sin = tables(3, 8)
    with native.forced("native"):
        with pytest.raises(ShapeError, match=r"x must be aligned to its 4-byte elements"):
            torch.ops.luthier.rotary(misaligned(3, 2, 8), cos, sin, False)
        with pytest.raises(ShapeError, match=r"up must be aligned to its 4-byte elements"):
            elementwise.swiglu(torch.randn(3, 8), misaligned(3, 8))


def test_ops_have_honest_schemas_and_fakes():
    ops = torch.ops.luthier
    x, w = torch.randn(4, 16), torch.randn(16)
    row, heads = torch.rand(4), torch.randn(4, 2, 8)
    cos, sin = tables(4, 8)
    for op, arguments in (
        (ops.rms_norm, (x, x, w, 1.0, 1e-6)),
        (ops.rms_norm, (x, None, w, 0.0, 1e-6)),
        (ops.rms_norm_backward, (x, x, x, w, 0.0, row, True)),
        (ops.rms_norm_backward, (x, None, x, w, 0.0, row, False)),
        (ops.layer_norm, (x, w, None, 1e-6)),
        (ops.layer_norm_backward, (x, x, w, row, row, True)),
        (ops.rotary, (heads, cos, sin, True)),
        (ops.rotary_, (heads, heads.clone(), cos, sin, False)),
        (ops.gated, (x, x, 1)),
        (ops.gated_backward, (x, x, x, 0)),
    ):
        torch.library.opcheck(op.default, arguments)
