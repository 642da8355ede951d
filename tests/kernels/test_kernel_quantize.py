"""Quantisers: native gives the reference's bytes, and those are bitsandbytes' and gguf-py's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from kernel_checks import assert_same_for_all_threads, called, relative_error

from luthier.errors import ConfigError, NumericError, ShapeError
from luthier.kernels import native, quantize
from luthier.kernels import quantize_reference as reference

SIZES = (1, 2, 63, 64, 65, 129, 4096, 70003)
SCALES = (1.0, 1e-3, 1e-20, 1e-40, 0.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GGUF_KINDS = tuple(quantize.GGUF_FORMATS)


def awkward_matrix(scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, and constant, zero, one-sided, alternating and partly constant ones."""
    torch.manual_seed(3)
    w = torch.randn(24, 512)
    w[3], w[4], w[6] = 1.5, 0.0, -1.0
    w[5, :100] = -2.0
    w[7] = w[7].abs()
    w[8] = -w[8].abs()
    w[9, ::2], w[9, 1::2] = 1.0, -1.0
    w[10] = 1.0
    w[10, 200] = 1000.0
    return (w * scale).to(dtype)


def test_the_library_quantises():
    assert native.use_native()
    with called("nf4_quantize", "gguf_quantize"):
        stored = quantize.quantize_nf4(torch.randn(4, 64))
        quantize.quantize_gguf(torch.randn(4, 64), "Q4_0")
    assert stored.codes.shape == (128, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_native_nf4_gives_the_bytes_of_the_reference(size, dtype):
    for scale in SCALES:
        weight = (torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale).to(dtype)
        codes, absmax = torch.ops.luthier.nf4_quantize(weight)
        expected_codes, expected_absmax = reference.nf4_quantize(weight)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_nf4_is_bit_identical_to_bitsandbytes(size, double):
    bnb = pytest.importorskip("bitsandbytes.functional")
    for scale in SCALES:
        weight = torch.randn(size, generator=torch.Generator().manual_seed(size + 1)) * scale
        packed, state = bnb.quantize_4bit(weight.clone(), quant_type="nf4", compress_statistics=double)
        ours = quantize.quantize_nf4(weight, double=double)
        assert torch.equal(ours.codes, packed)
        assert torch.equal(ours.absmax, state.absmax)
        if double:
            assert torch.equal(ours.nested_absmax, state.state2.absmax)
            assert torch.equal(ours.nested_offset, state.offset)
        assert torch.equal(quantize.dequantize_nf4(ours, weight.shape), bnb.dequantize_4bit(packed, state).reshape(-1))


def test_constant_tensors_and_half_precision_match_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    for weight in (torch.full((64, 64), -0.25), torch.zeros(3, 64), torch.randn(30, 70).bfloat16(), torch.randn(30, 70).half()):
        packed, state = bnb.quantize_4bit(weight.clone(), quant_type="nf4", compress_statistics=True)
        ours = quantize.quantize_nf4(weight)
        assert torch.equal(ours.codes, packed)
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(quantize.scales_of(ours), bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)


def test_the_tables_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(reference.dynamic_map(), bnb.create_dynamic_map())
    assert torch.equal(reference.nf4_codes(), bnb.get_4bit_type("nf4", device="cpu"))


def test_nf4_error_is_within_the_stated_bound():
    weight = torch.randn(50, 130)
    stored = quantize.quantize_nf4(weight, double=False)
    error = (quantize.dequantize_nf4(stored, weight.shape) - weight).abs().reshape(-1)
    assert bool((error <= 0.15191 * stored.absmax.repeat_interleave(64)[: error.numel()]).all())


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_native_gguf_gives_the_bytes_of_the_reference(kind):
    for scale in SCALES:
        for dtype in DTYPES:
            weight = awkward_matrix(scale, dtype)
            assert torch.equal(torch.ops.luthier.gguf_quantize(weight, kind), reference.gguf_quantize(weight, kind))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_simple_formats_are_bit_identical_to_gguf_py(kind):
    for scale in (1.0, 1e-3, 30.0):
        weight = awkward_matrix(scale, torch.float32)
        weight[weight == 0] = 0.0
        expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        assert np.array_equal(quantize.quantize_gguf(weight, kind).numpy(), expected)


def naive_k_quant(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Each sub-block's range in equal steps, with unrounded scales: what the search has to beat."""
    size, top = (32, 15) if kind == "Q4_K" else (16, 31)
    blocks = weight.reshape(-1, size)
    if kind == "Q4_K":
        low = blocks.amin(1, keepdim=True).clamp(max=0)
        step = (blocks.amax(1, keepdim=True) - low) / top
        return ((blocks - low) / step).round().mul(step).add(low).view_as(weight)
    step = blocks.abs().amax(1, keepdim=True) / top
    return (blocks / step).round().mul(step).view_as(weight)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_k_quants_are_read_back_better_than_a_naive_scheme(kind):
    for heavy_tails in (False, True):
        weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(9))
        weight = weight * weight.abs() if heavy_tails else weight
        stored = quantize.quantize_gguf(weight, kind)
        back = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[kind]))
        assert relative_error(back, weight) <= relative_error(naive_k_quant(weight, kind), weight)


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_blocks_are_read_back_close_to_the_weights(kind):
    weight = awkward_matrix(0.1, torch.float32)[:9]
    back = torch.from_numpy(
        gguf.quants.dequantize(quantize.quantize_gguf(weight, kind).numpy(), gguf.GGMLQuantizationType[kind])
    )
    assert relative_error(back, weight) < {"Q8_0": 0.006, "Q6_K": 0.02}.get(kind, 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["NF4", *GGUF_KINDS])
def test_what_is_not_finite_is_named_with_its_place(kind, value):
    weight = torch.randn(20, 256)
    weight[7, 11] = value
    for mode in native.MODES:
        with native.forced(mode), pytest.raises(NumericError, match=r"must be finite; got -?(nan|inf) at \[7, 11\], 1 in all"):
            quantize.quantize_nf4(weight) if kind == "NF4" else quantize.quantize_gguf(weight, kind)


def test_a_scale_beyond_float16_is_an_error():
    with pytest.raises(NumericError, match=r"at most 65504; got a weight of 1e\+08"):
        quantize.quantize_gguf(torch.full((1, 256), 1e8), "Q4_0")


@pytest.mark.parametrize(("kind", "value"), [("Q4_1", 1e5), ("Q4_1", -1e5), ("Q4_K", -5e6)])
def test_a_minimum_beyond_float16_is_an_error(kind, value):
    """Weights that are all equal have a scale of zero, so that the minimum alone overflows."""
    for mode in native.MODES:
        with (
            native.forced(mode),
            pytest.raises(NumericError, match=r"scales and minima are float16, at most 65504; got a weight"),
        ):
            quantize.quantize_gguf(torch.full((1, 256), value), kind)


def test_ops_called_past_the_front_end_check_what_they_quantise():
    gguf_op, nf4_op = torch.ops.luthier.gguf_quantize, torch.ops.luthier.nf4_quantize
    with native.forced("native"):
        for shape in ((64, 33), (4, 288), (1024,), (2, 2, 256)):
            with pytest.raises(ShapeError, match=r"Q4_K holds rows in blocks of 256"):
                gguf_op(torch.zeros(shape), "Q4_K")
        with pytest.raises(ShapeError, match=r"Q4_0 holds rows in blocks of 32.*got \(64, 33\)"):
            gguf_op(torch.zeros(64, 33), "Q4_0")
        with pytest.raises(ConfigError, match=r"got 'Q9_0'"):
            gguf_op(torch.zeros(4, 32), "Q9_0")
        for call in (lambda w: gguf_op(w, "Q4_0"), nf4_op):
            with pytest.raises(ShapeError, match=r"must be float32, bfloat16 or float16; got torch\.float64"):
                call(torch.zeros(4, 32, dtype=torch.float64))
            with pytest.raises(ShapeError, match=r"must not be empty; got \(0, 32\)"):
                call(torch.zeros(0, 32))


def test_bad_arguments_are_named():
    with pytest.raises(ShapeError, match=r"must be float32, bfloat16 or float16; got torch\.float64"):
        quantize.quantize_nf4(torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ShapeError, match=r"must not be empty; got \(0, 64\)"):
        quantize.quantize_nf4(torch.zeros(0, 64))
    with pytest.raises(ShapeError, match=r"weight must be contiguous"):
        quantize.quantize_nf4(torch.randn(64, 64).T)
    with pytest.raises(ShapeError, match=r"Q4_K holds rows in blocks of 256.*got \(4, 288\)"):
        quantize.quantize_gguf(torch.zeros(4, 288), "Q4_K")
    with pytest.raises(ConfigError, match=r"got 'Q4_k'\. Did you mean 'Q4_K'\?"):
        quantize.quantize_gguf(torch.zeros(4, 256), "Q4_k")
    with pytest.raises(ShapeError, match=r"the nf4 nibbles must have elements 64; got \(32, 1\)"):
        quantize.dequantize_nf4(quantize.quantize_nf4(torch.randn(64)), (2, 64))


def test_results_do_not_depend_on_the_number_of_threads():
    weight = torch.randn(300, 512)
    assert_same_for_all_threads(lambda: [*torch.ops.luthier.nf4_quantize(weight), quantize.quantize_gguf(weight, "Q4_K")])


def test_double_quantisation_does_not_depend_on_the_number_of_threads():
    """Above 32768 scales torch's mean does, and bitsandbytes takes it; ours is always that of one thread."""
    weight = torch.randn(64 * 70_003, generator=torch.Generator().manual_seed(4))
    assert_same_for_all_threads(lambda: list(quantize.quantize_nf4(weight)))


def test_many_scales_are_bit_identical_to_bitsandbytes_on_one_thread():
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64 * 70_003, generator=torch.Generator().manual_seed(4))
    ours = quantize.quantize_nf4(weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ours.codes, packed)
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_offset, state.offset)


def test_ops_have_honest_schemas_and_fakes():
    weight = torch.randn(3, 256)
    torch.library.opcheck(torch.ops.luthier.nf4_quantize.default, (weight,))
    torch.library.opcheck(torch.ops.luthier.gguf_quantize.default, (weight, "Q6_K"))
