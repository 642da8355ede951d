"""packed_attention against attention over a dense mask in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.models import attention
from luthier.models.attention import packed_attention

STARTS = [0, 1, 8, 8, 31]


def dense(q, k, v, starts, scale, window, softcap, sinks) -> Tensor:
    """The definition, with one mask over the whole row."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    where = torch.arange(len(q))
    document = torch.bucketize(where, torch.tensor(starts), right=True)
    distance = where[:, None] - where
    visible = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(heads, 1, 1).expand(heads, len(q), 1)], 2)
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores, 2)[..., : len(q)], v)


@pytest.mark.parametrize("block_rows", [4, 256])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (3.0, False), (None, True), (2.0, True)])
def test_equals_the_definition(window, softcap, with_sinks, key_heads, block_rows, monkeypatch) -> None:
    monkeypatch.setattr(attention, "BLOCK_ROWS", block_rows)
    torch.manual_seed(0)
    shapes = [(31, 4, 8), (31, key_heads, 8), (31, key_heads, 8)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    grad = torch.randn(31, 4, 8, dtype=torch.float64)
    exact = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = dense(*exact, STARTS, 0.3, window, softcap, sinks)
    expected.backward(grad)
    got = [tensor.to(torch.float32).requires_grad_() for tensor in tensors]
    output = packed_attention(*got, STARTS, 0.3, window, softcap, sinks=None if sinks is None else sinks.to(torch.float32))
    output.backward(grad.to(torch.float32))
    assert torch.allclose(output.to(torch.float64), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got, exact, strict=True):
        assert torch.allclose(mine.grad.to(torch.float64), theirs.grad, rtol=1e-5, atol=2e-5)


def test_values_may_be_of_another_size_than_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(31, 4, 8), torch.randn(31, 2, 8), torch.randn(31, 2, 12)
    output = packed_attention(q, k, v, STARTS, 0.3)
    expected = dense(q.double(), k.double(), v.double(), STARTS, 0.3, None, None, None)
    assert torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_dropout_keeps_the_mean_and_follows_the_seed(softcap) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(8, 2, 8), torch.randn(8, 2, 8)
    v = torch.ones(8, 2, 8)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(packed_attention(q, k, v, [0, 8], 0.3, None, softcap, dropout=0.5))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert set((runs[0][0, 0] * 2).round().tolist()) <= {0.0, 4.0}


def test_dropout_is_drawn_again_in_backward() -> None:
    """The output is linear in v, so its gradient must show the same dropped weights as its value."""
    torch.manual_seed(0)
    q, k = torch.randn(8, 2, 8), torch.randn(8, 2, 8)
    v = torch.randn(8, 2, 8, requires_grad=True)
    output = packed_attention(q, k, v, [0, 8], 0.3, None, 3.0, dropout=0.5)
    (output * output.detach()).sum().backward()
    assert torch.allclose((v.grad * v.detach()).sum(), output.detach().square().sum(), rtol=1e-5)
