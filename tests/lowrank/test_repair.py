"""Repairs and starting points against their definitions in float64, and against PEFT's own where it has one."""

from __future__ import annotations

import pytest
import torch

from luthier.errors import NumericError, ShapeError
from luthier.lowrank import eva, loftq, pissa, qera, top_singular
from luthier.matrices import GGUFMatrix, NF4Matrix

SHAPES = [(48, 80), (80, 48), (64, 64)]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall, as those of weights do."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(2.0, 0.2, columns)
    return torch.randn(rows, columns, generator=generator) * scale


def moments(columns: int, tokens: int = 400) -> torch.Tensor:
    x = matrix(tokens, columns, seed=3).to(torch.float64)
    x[:, 0] *= 20
    return x.T @ x


def root_of(symmetric: torch.Tensor, power: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values**power) @ vectors.T


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return NF4Matrix.quantize(weight.contiguous()).dequantize()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_leading_singular_vectors_are_those_of_a_whole_svd(rows: int, columns: int):
    W = matrix(rows, columns)
    U, S, V = top_singular(W, 7)
    u, s, vt = torch.linalg.svd(W.to(torch.float64), full_matrices=False)
    assert torch.allclose(S, s[:7], rtol=1e-10)
    assert torch.allclose((U * S) @ V.T, (u[:, :7] * s[:7]) @ vt[:7], atol=1e-9)
    assert torch.allclose(U.T @ U, torch.eye(7, dtype=torch.float64), atol=1e-9)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_rank_beyond_that_of_the_matrix_leaves_the_product_right():
    W = matrix(20, 3) @ matrix(3, 30)
    U, S, V = top_singular(W, 8)
    assert torch.allclose(((U * S) @ V.T).to(torch.float32), W, atol=1e-4)
    assert S[3:].max() < 1e-6 * S[0]
    assert torch.equal(top_singular(torch.zeros(4, 5), 2)[1], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_qera_is_its_definition(rows: int, columns: int):
    W, R = matrix(rows, columns), moments(columns)
    Q = nf4(W)
    factors = qera(W, Q, R, 6)
    error = W.to(torch.float64) - Q.to(torch.float64)
    U, S, Vt = torch.linalg.svd(error @ root_of(R, 0.5), full_matrices=False)
    expected = (U[:, :6] * S[:6]) @ Vt[:6] @ root_of(R, -0.5)
    got = factors.B.to(torch.float64) @ factors.A.to(torch.float64)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    left = error - got
    assert float(torch.trace(left @ R @ left.T)) == pytest.approx(float((S[6:] ** 2).sum()), rel=1e-5)
    assert torch.allclose(factors.A.norm(dim=1), factors.B.norm(dim=0), rtol=1e-4)


def test_qera_repairs_outputs_better_than_an_svd_of_the_error():
    W, R = matrix(48, 80), moments(80)
    Q = nf4(W)

    def output_error(B_A: torch.Tensor) -> float:
        left = (W - Q - B_A).to(torch.float64)
        return float(torch.trace(left @ R @ left.T))

    exact, plain = qera(W, Q, R, 4), pissa(W - Q, 4)
    assert output_error(exact.B @ exact.A) < 0.8 * output_error(plain.B @ plain.A)


def test_qera_with_fewer_tokens_than_features_repairs_what_they_reach_and_stays_small():
    W, x = matrix(48, 80), matrix(5, 80, seed=9).to(torch.float64)
    Q = nf4(W)
    factors = qera(W, Q, x.T @ x, 6)
    error = (W - Q).to(torch.float64)
    left = (error - factors.B.to(torch.float64) @ factors.A.to(torch.float64)) @ x.T
    assert float(left.norm() / (error @ x.T).norm()) < 1e-5
    assert float((factors.B @ factors.A).norm()) <= float(error.norm())


def test_nothing_to_repair_gives_zero():
    W = matrix(48, 80)
    factors = qera(W, W, moments(80), 4)
    assert torch.equal(factors.B @ factors.A, torch.zeros(48, 80))


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_is_what_peft_and_bitsandbytes_make(iterations: int):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    decompose = pytest.importorskip("peft.utils.loftq_utils")._low_rank_decomposition
    W = matrix(64, 128)
    rest = W.clone()
    for _ in range(iterations):
        packed, state = bitsandbytes.functional.quantize_4bit(rest, quant_type="nf4", compress_statistics=False)
        stored = bitsandbytes.functional.dequantize_4bit(packed, state)
        parts = decompose(W - stored, reduced_rank=5)
        rest = W - parts["L"] @ parts["R"]
    Q, factors = loftq(W, 5, lambda weight: NF4Matrix.quantize(weight, double=False).dequantize(), iterations)
    if iterations == 1:
        assert torch.allclose(Q, stored, rtol=1e-6, atol=0)
        assert float((factors.B @ factors.A - parts["L"] @ parts["R"]).norm() / (W - stored).norm()) < 1e-4
    assert float((W - Q - factors.B @ factors.A).norm()) == pytest.approx(
        float((W - stored - parts["L"] @ parts["R"]).norm()), rel=0.02
    )


def test_loftq_takes_any_quantiser_and_more_turns_leave_less():
    from luthier.kernels.quantize import quantize_gguf

    def q4_0(weight: torch.Tensor) -> torch.Tensor:
        return GGUFMatrix(quantize_gguf(weight, "Q4_0"), "q4_0").dequantize()

    W = matrix(64, 96)
    Q, _ = loftq(W, 8, q4_0, 1)
    assert torch.equal(Q, q4_0(W))
    left = []
    for iterations in (1, 4):
        Q, factors = loftq(W, 8, q4_0, iterations)
        left.append(float((W - Q - factors.B @ factors.A).norm()))
    assert left[1] < left[0] < float((W - q4_0(W)).norm())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_pissa_is_what_peft_makes(rows: int, columns: int):
    peft = pytest.importorskip("peft")
    layer = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False))
    W = matrix(rows, columns)
    layer[0].weight.data = W.clone()
    config = peft.LoraConfig(target_modules=["0"], r=5, lora_alpha=5, init_lora_weights="pissa")
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    factors = pissa(W, 5)
    expected = (theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight).detach()
    assert float((factors.B @ factors.A - expected).norm() / expected.norm()) < 1e-5
    assert float((W - factors.B @ factors.A - theirs.base_layer.weight).norm() / W.norm()) < 1e-5
    assert torch.allclose(factors.A.norm(dim=1), factors.B.norm(dim=0), rtol=1e-4)


def test_eva_is_the_svd_of_the_inputs():
    x = matrix(300, 40, seed=5).to(torch.float64)
    A = eva(x.T @ x, 6).to(torch.float64)
    vt = torch.linalg.svd(x, full_matrices=False)[2][:6]
    assert torch.allclose((A @ vt.T).abs(), torch.eye(6, dtype=torch.float64), atol=1e-5)


def test_eva_finds_the_components_that_pefts_finds_in_inputs_of_mean_zero():
    pca = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA
    x = matrix(300, 40, seed=5)
    x -= x.mean(0)
    theirs = pca(n_components=6, batch_size=300).fit(x).components_
    ours = eva((x.T @ x).to(torch.float64), 6)
    assert torch.allclose((ours @ theirs.T.to(torch.float32)).abs(), torch.eye(6), atol=1e-3)


def test_what_does_not_fit_is_refused():
    W = matrix(48, 80)
    with pytest.raises(ShapeError, match=r"rank must be between 1 and min\(m, n\) = 48; got 49"):
        pissa(W, 49)
    with pytest.raises(ShapeError, match="number of eigenvectors"):
        eva(moments(8), 9)
    with pytest.raises(ShapeError, match="second moments"):
        qera(W, W, moments(48), 4)
    with pytest.raises(ShapeError, match="iterations must be at least 1"):
        loftq(W, 4, nf4, 0)
    with pytest.raises(NumericError, match="must be finite"):
        pissa(W * float("nan"), 4)
