"""NF4Matrix: bytes and numbers are those of bitsandbytes; products, rows, norms, state dicts, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from luthier.errors import NumericError, ShapeError
from luthier.linear import LowRankLinear
from luthier.matrices import DenseMatrix, NF4Matrix, cuda, nf4, stored
from luthier.matrices.nf4 import STATE_KEY

CASES = {
    "random": lambda: torch.randn(96, 128, generator=torch.Generator().manual_seed(0)),
    "many scales": lambda: torch.randn(300, 700, generator=torch.Generator().manual_seed(1)),
    "ragged": lambda: torch.randn(33, 47, generator=torch.Generator().manual_seed(2)),
    "one": lambda: torch.tensor([[0.3]]),
    "heavy tails": lambda: torch.randn(64, 64, generator=torch.Generator().manual_seed(3)) ** 5,
    "constant": lambda: torch.full((8, 64), 0.7),
    "zero": lambda: torch.zeros(8, 64),
    "zero blocks": lambda: torch.cat([torch.zeros(4, 64), torch.randn(4, 64, generator=torch.Generator().manual_seed(4))]),
    "denormal": lambda: torch.randn(8, 64, generator=torch.Generator().manual_seed(5)) * 1e-41,
}


def make(double: bool = True, shape: tuple[int, int] = (24, 40), dtype: torch.dtype = torch.float32) -> NF4Matrix:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    return NF4Matrix.quantize(weight, double=double)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_bytes_and_numbers_are_those_of_bitsandbytes(case: str, dtype: torch.dtype, double: bool) -> None:
    assert_as_bitsandbytes(CASES[case]().to(dtype), double)


@pytest.mark.model
@pytest.mark.parametrize("double", [False, True])
def test_bytes_of_real_weights_are_those_of_bitsandbytes(double: bool) -> None:
    from luthier.models.load import load

    model = load("smollm2-135m", base="f32", offline=True).model
    for name in ("layers.0.self_attn.k_proj", "layers.7.self_attn.q_proj", "layers.15.mlp.down_proj", "layers.29.mlp.up_proj"):
        assert_as_bitsandbytes(model.model.get_submodule(name).matrix.dequantize(), double)


def assert_as_bitsandbytes(weight: Tensor, double: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    dtype = weight.dtype
    matrix = NF4Matrix.quantize(weight, double=double)
    codes, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    assert torch.equal(matrix.weight, codes)
    stored = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    ours = matrix.tensors()
    assert sorted(ours) == sorted(["weight", *stored])
    for key, tensor in stored.items():
        assert torch.equal(ours[key], tensor), key
    assert torch.equal(matrix.dequantize(dtype), theirs.dequantize_4bit(codes, state))
    parts = {key.removeprefix("weight."): tensor for key, tensor in ours.items() if key != "weight"}
    read = theirs.QuantState.from_dict(parts, torch.device("cpu"))
    assert torch.equal(theirs.dequantize_4bit(matrix.weight.detach(), read), matrix.dequantize(dtype))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_reads_a_matrix_that_is_handed_to_it(dtype: torch.dtype, double: bool) -> None:
    """What a GPU would call, with bitsandbytes' version for the CPU in the place of its kernel."""
    pytest.importorskip("bitsandbytes")
    matrix = make(double, (24, 128))
    assert torch.equal(cuda.dequantize_nf4(matrix, dtype), matrix.dequantize(dtype))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"), [("q8_0", (200, 96)), ("q4_0", (65, 32)), ("q4_k", (130, 256)), ("bf16", (129, 33))]
)
def test_a_matrix_that_is_stored_otherwise_gets_the_same_bytes_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: str, shape: tuple[int, int], double: bool
) -> None:
    monkeypatch.setattr(nf4, "CONVERTED_ELEMENTS", 1)
    before = stored(torch.randn(shape, generator=torch.Generator().manual_seed(8)), kind)
    whole, seen = before.dequantize(), []
    rows = before.row_range
    monkeypatch.setattr(before, "row_range", lambda start, stop: (seen.append(stop - start), rows(start, stop))[1])
    converted, expected = NF4Matrix.converted(before, double=double), NF4Matrix.quantize(whole, double=double)
    assert sum(seen) == shape[0]
    assert len(seen) > 1
    assert set(seen[:-1]) == {64}
    assert converted.tensors().keys() == expected.tensors().keys()
    assert all(torch.equal(tensor, expected.tensors()[key]) for key, tensor in converted.tensors().items())


def test_a_weight_that_is_not_finite_is_named_by_its_place_in_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "CONVERTED_ELEMENTS", 1)
    weight = torch.randn(100, 8)
    weight[70, 3] = torch.nan
    with pytest.raises(NumericError, match=r"got nan at \[70, 3\], 1 in all"):
        NF4Matrix.converted(DenseMatrix(weight))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_that_bitsandbytes_keeps_in_another_dtype(storage: torch.dtype) -> None:
    """`bnb_4bit_quant_storage`, which FSDP asks for, says in what dtype the same bytes are kept."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    codes, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True, quant_storage=storage)
    assert codes.dtype == storage
    parts = {"weight": codes} | {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    assert torch.equal(NF4Matrix.from_tensors(parts).dequantize(), NF4Matrix.quantize(weight).dequantize())


def test_the_error_is_bounded_and_the_size_is_that_of_the_paper() -> None:
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    plain, double = NF4Matrix.quantize(weight, double=False), NF4Matrix.quantize(weight)
    absmax = plain.absmax.repeat_interleave(64).view_as(weight)
    assert ((weight - plain.dequantize()).abs() <= 0.1519 * absmax).all()
    assert plain.size_bytes == weight.numel() * 4.5 / 8 + 16 * 4
    assert double.size_bytes == weight.numel() * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + (16 + 256) * 4


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (33, 47), (5, 1)])
def test_products_rows_and_norms_are_those_of_the_dequantized_matrix(double: bool, shape: tuple[int, int]) -> None:
    matrix = make(double, shape)
    wide = matrix.dequantize().to(torch.float64)
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    y = matrix.matmul(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(y, x @ wide.T.float(), **close)
    torch.testing.assert_close(x.grad, upstream @ wide.float(), **close)
    ids = torch.tensor([[shape[0] - 1, 0], [1, 2]])
    assert torch.equal(matrix.rows(ids), wide[ids].float())
    assert torch.equal(matrix.row_range(1, 4), wide[1:4].float())
    torch.testing.assert_close(matrix.row_norms_squared(), wide.square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(matrix.column_norms_squared(), wide.square().sum(0), rtol=1e-12, atol=0)
    assert torch.equal(matrix.dequantize(torch.bfloat16), wide.bfloat16())
    copied = matrix.float32_copy()
    assert torch.equal(copied.weight, wide.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_activations_of_other_dtypes(dtype: torch.dtype) -> None:
    matrix, x = make(), torch.randn(3, 40).to(dtype).requires_grad_()
    y = matrix.matmul(x, torch.ones(24))
    assert y.dtype == dtype
    y.sum().backward()
    wide = matrix.dequantize(torch.float64)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float64 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y.double(), x.double() @ wide.T + 1, **tolerance)
    torch.testing.assert_close(x.grad.double(), wide.sum(0).expand(3, 40), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("double", [False, True])
def test_a_state_dict_goes_round_under_bitsandbytes_names(double: bool) -> None:
    layer = LowRankLinear(make(double, dtype=torch.bfloat16), torch.ones(24))
    state = layer.state_dict()
    nested = ["weight.nested_absmax", "weight.nested_quant_map"] if double else []
    assert sorted(state) == sorted(["bias", "weight", "weight.absmax", "weight.quant_map", STATE_KEY, *nested])
    other = LowRankLinear(NF4Matrix.quantize(torch.randn(24, 40), double=double), torch.zeros(24))
    other.load_state_dict(state)
    x = torch.randn(2, 40)
    assert torch.equal(other(x), layer(x))
    assert other.matrix.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"weight must be 24x40, nf4.*; it is 24x48, nf4"):
        other.load_state_dict(LowRankLinear(make(double, (24, 48)), torch.zeros(24)).state_dict())


def test_moving_and_casting_the_model_leaves_codes_and_scales_alone() -> None:
    layer = nn.Sequential(LowRankLinear(make(), torch.ones(24)))
    before = layer[0].matrix.dequantize()
    layer.to(torch.bfloat16).half().to("cpu")
    assert layer[0].matrix.nested_absmax.dtype == torch.float32
    assert torch.equal(layer[0].matrix.dequantize(), before)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied[0].matrix.dequantize(), before)
    assert copied[0].matrix.weight.data_ptr() != layer[0].matrix.weight.data_ptr()


def test_what_is_not_finite_is_counted_or_refused() -> None:
    weight = torch.randn(4, 64)
    weight[2, 5] = float("nan")
    with pytest.raises(NumericError, match=r"got nan at \[2, 5\]"):
        NF4Matrix.quantize(weight)
    plain, double = make(double=False), make()
    assert plain.not_finite() == double.not_finite() == 0
    plain.absmax[1] = float("inf")
    assert plain.not_finite() == 64
    double.nested_absmax[0] = float("nan")
    assert double.not_finite() == 24 * 40


def test_finite_parts_whose_product_is_not_are_counted() -> None:
    """The weights that come out are what counts: 2e38 times a code of 1, or with an offset of 2e38 beside it."""
    plain, double = make(double=False), make()
    plain.absmax[1:3] = torch.tensor([2e38, torch.inf])
    assert plain.not_finite() == int((~plain.dequantize().isfinite()).sum()) == 64
    plain.absmax[2], plain.quant_map[:] = 2e38, plain.quant_map * 2
    assert 0 < plain.not_finite() == int((~plain.dequantize().isfinite()).sum()) < 128
    for offset in (1e300, float("nan"), -float("inf")):
        double.nested_offset = offset
        assert double.not_finite() == 24 * 40
    double.nested_offset, double.nested_absmax[0] = 3e38, 3e38
    assert 0 < double.not_finite() == int((~double.dequantize().isfinite()).sum())


def changed_state(**changes: object) -> dict[str, Tensor]:
    parts = dict(make().tensors())
    state = json.loads(bytes(parts[STATE_KEY].tolist())) | changes
    return parts | {STATE_KEY: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            lambda: changed_state(quant_type="fp4"),
            "must be nf4 in blocks of 64, scales in blocks of 256; got 'fp4', 64 and 256",
        ),
        (lambda: changed_state(blocksize=128), "got 'nf4', 128 and 256"),
        (lambda: changed_state(nested_blocksize=64), "got 'nf4', 64 and 64"),
        (lambda: changed_state(shape=[24, -40]), r"must give shape, dtype and, .* their offset; got \[24, -40\]"),
        (lambda: changed_state(shape=[24, 1 << 40]), "must give shape, dtype and, with nested scales alone, their offset"),
        (lambda: changed_state(shape=[24, 41]), "the nf4 nibbles must have elements 492"),
        (lambda: changed_state(dtype="int8"), "'int8'"),
        (lambda: changed_state(dtype=["float32"]), r"\['float32'\]"),
        (lambda: changed_state(nested_offset=None), "None"),
        (lambda: changed_state(nested_offset=True), "True"),
        (lambda: changed_state(nested_offset=10**400), "10{400}"),
        (lambda: changed_state(nested_blocksize=None), "with nested scales alone"),
        (lambda: make().tensors() | {STATE_KEY: torch.tensor([255, 1], dtype=torch.uint8)}, "must be JSON"),
        (lambda: make().tensors() | {STATE_KEY: torch.zeros(9000, dtype=torch.uint8)}, "at most 4096 bytes"),
        (lambda: {k: v for k, v in make().tensors().items() if k != "weight.absmax"}, r"missing: weight\.absmax"),
        (lambda: make().tensors() | {"weight.nested_quant_map": torch.zeros(16)}, "nested_map must have shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        NF4Matrix.from_tensors(parts())
