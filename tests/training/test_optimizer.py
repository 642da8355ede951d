"""AdamW against a float64 reference, clipping, decay, state, denormals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from luthier.config import RunConfig
from luthier.errors import CheckpointError, ConfigError
from luthier.training import optimizer as optimizer_module
from luthier.training.optimizer import Optimizer, check_optimizer, device_of, flushed_denormals

PAGED = RunConfig(data="a", optimizer="paged_adamw", weight_decay=0.1)


def parameters(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ("matrix", nn.Parameter(torch.randn(5, 3, generator=generator))),
        ("vector", nn.Parameter(torch.randn(4, generator=generator))),
    ]


def set_gradients(named: list[tuple[str, nn.Parameter]], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, parameter in named:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_steps_equal_a_float64_reference() -> None:
    config = RunConfig(data="a", weight_decay=0.1, max_grad_norm=1.0, beta2=0.99)
    named = parameters()
    optimizer = Optimizer(named, config)
    reference = {name: parameter.detach().double() for name, parameter in named}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in reference.items()}
    for step in range(1, 6):
        set_gradients(named, step)
        gradients = {name: parameter.grad.double() for name, parameter in named}
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert optimizer.clip() == pytest.approx(norm, rel=1e-6)
        optimizer.step(0.01)
        for name, value in reference.items():
            gradient = gradients[name] * min(1.0, 1.0 / norm)
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.99).add_(0.01 * gradient**2)
            value.mul_(1 - 0.01 * (0.1 if value.ndim == 2 else 0.0))
            value.sub_(0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8))
    for name, parameter in named:
        assert torch.allclose(parameter.double(), reference[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_leaves_gradients_alone(bad: float) -> None:
    named = parameters()
    optimizer = Optimizer(named, RunConfig(data="a"))
    set_gradients(named, 0)
    kept = named[1][1].grad.clone()
    named[0][1].grad[0, 0] = bad
    assert not math.isfinite(optimizer.clip())
    assert torch.equal(named[1][1].grad, kept)


def test_state_goes_on_bit_for_bit() -> None:
    config = RunConfig(data="a")
    straight, first, second = parameters(), parameters(), parameters()
    one, two = Optimizer(straight, config), Optimizer(first, config)
    for step in range(3):
        for optimizer, named in ((one, straight), (two, first)):
            set_gradients(named, step)
            optimizer.step(0.1)
    three = Optimizer(second, config)
    with torch.no_grad():
        for (_, target), (_, source) in zip(second, first, strict=True):
            target.copy_(source)
    three.load_state(two.state())
    for optimizer, named in ((one, straight), (three, second)):
        set_gradients(named, 9)
        optimizer.step(0.1)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(straight, second, strict=True))


def test_state_that_does_not_fit_names_every_problem() -> None:
    named = parameters()
    optimizer = Optimizer(named, RunConfig(data="a"))
    set_gradients(named, 0)
    optimizer.step(0.1)
    state = dict(optimizer.state())
    del state["vector.step"]
    state["matrix.exp_avg"] = torch.zeros(2)
    state["other.step"] = torch.zeros(())
    with pytest.raises(CheckpointError) as caught:
        Optimizer(parameters(), RunConfig(data="a")).load_state(state)
    assert "other.step belongs to no trainable parameter" in str(caught.value)
    assert "matrix is (5, 3), its moments (2,)" in str(caught.value)
    assert "vector has only exp_avg, exp_avg_sq" in str(caught.value)


def test_denormals_are_flushed_inside_and_kept_outside() -> None:
    tiny = torch.full((1000,), 1e-40)
    with flushed_denormals() as supported:
        assert supported == (not bool((tiny * 1.0).any()))
    assert bool((tiny * 1.0).all())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_the_paged_optimizer_takes_the_same_steps_and_goes_on_from_its_state() -> None:
    """bitsandbytes' version for the CPU, which pages nothing, has the same states and the same arithmetic."""
    pytest.importorskip("bitsandbytes")
    ours, theirs, resumed = parameters(), parameters(), parameters()
    one, two = Optimizer(ours, PAGED.model_copy(update={"optimizer": "adamw"})), Optimizer(theirs, PAGED)
    for step in range(4):
        for optimizer, named in ((one, ours), (two, theirs)):
            set_gradients(named, step)
            assert optimizer.clip() > 0
            optimizer.step(0.05)
            optimizer.zero_grad()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    state = two.state()
    assert state.keys() == one.state().keys()
    assert float(state["matrix.step"]) == 4
    torch.testing.assert_close(state["matrix.exp_avg"], one.state()["matrix.exp_avg"], rtol=1e-5, atol=1e-7)
    three = Optimizer(resumed, PAGED)
    with torch.no_grad():
        for (_, target), (_, source) in zip(resumed, theirs, strict=True):
            target.copy_(source)
    three.load_state({name: tensor.clone() for name, tensor in state.items()})
    for optimizer, named in ((two, theirs), (three, resumed)):
        set_gradients(named, 9)
        optimizer.step(0.05)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(theirs, resumed, strict=True))


def test_the_paged_optimizer_needs_a_gpu_and_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_optimizer(RunConfig(data="a"))
    assert (device_of(RunConfig(data="a")), device_of(PAGED)) == ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"so it needs CUDA; there is none here\. Use --optimizer adamw\."):
        check_optimizer(PAGED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(optimizer_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes' own, which is not installed\. Run `pip install bitsandbytes`\."):
        check_optimizer(PAGED)
