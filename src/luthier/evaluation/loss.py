"""Cross entropy over supervised tokens, the head applied to nothing else and its logits never whole."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from luthier.data.packing import Pack
from luthier.kernels.head import linear_cross_entropy as kernel_cross_entropy
from luthier.linear import LowRankLinear, enabled_terms
from luthier.matrices import StoredMatrix
from luthier.models.blocks import Entry
from luthier.models.packed import Head, head_of, packed_hidden, packed_logits

LOGITS_AT_ONCE = 1 << 23
MIN_CHUNK_ROWS = 128


def supervised_loss(model: PreTrainedModel, pack: Pack, entry: Entry | None = None) -> Tensor:
    """Sum over the pack's S supervised tokens of -log p(target), a float32 scalar that can be differentiated.

    The head runs on the S hidden states that predict a supervised token. Tokens that examples share are computed once,
    for models that `shares_prefixes` names; others need packs made without sharing. A model whose head is not known
    (`head_of` gives None) computes those S logits itself, all at once. Without supervised tokens the sum is 0.
    entry: begin at a decoder layer, for models whose `entry_obstacle` is None.
    """
    pack = pack.on(model.device)
    if pack.supervised_tokens == 0:
        return torch.zeros((), device=pack.ids.device, requires_grad=torch.is_grad_enabled())
    head = head_of(model)
    if head is None:
        logits = packed_logits(model, pack.ids, pack.starts, pack.predict)
        return F.cross_entropy(logits, pack.targets, reduction="sum")
    return linear_cross_entropy(predicting_hidden(model, pack, entry), head, pack.targets)


def predicting_hidden(model: PreTrainedModel, pack: Pack, entry: Entry | None = None) -> Tensor:
    """The hidden state before each supervised token, (S, hidden). One that predicts several tokens is computed once."""
    if not pack.is_shared:
        return packed_hidden(model, pack.ids, pack.starts, pack.predict, entry=entry)
    # Not by indexing, whose backward adds to a state that rows share in no fixed order.
    rows, which = pack.predict.unique(return_inverse=True)
    return packed_hidden(model, pack.ids, pack.starts, rows, pack.parents, entry).index_select(0, which)


def linear_cross_entropy(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """sum_i -log softmax(head(hidden_i))[targets_i], with only a chunk of rows of logits alive at any time.

    hidden: (S, hidden) float32; targets: (S,) int64 -> scalar float32.
    With a frozen head the gradient to `hidden` is made in the same pass as the loss, so that logits are computed once:
    by the kernel for a bare matrix in float32 on the CPU, in torch for any other. With a trainable head (unfrozen, or
    with an adapter) each chunk is computed again in backward.
    """
    linear = head.linear
    if suits_the_kernel(linear, hidden):
        assert isinstance(linear.matrix, StoredMatrix)
        storage, bias = linear.matrix.storage(), linear.bias
        return kernel_cross_entropy(hidden, storage, targets, bias=bias, softcap=head.softcap, scale=head.scale)[0]
    rows = max(MIN_CHUNK_ROWS, LOGITS_AT_ONCE // head.vocabulary)
    chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    if not torch.is_grad_enabled():
        return torch.stack([_chunk_loss(head, *chunk) for chunk in chunks]).sum()
    if any(parameter.requires_grad for parameter in head.linear.parameters()):
        return torch.stack([checkpoint(_chunk_loss, head, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return _FrozenHeadLoss.apply(hidden, targets, head, rows)


def suits_the_kernel(linear: nn.Module, hidden: Tensor) -> TypeGuard[LowRankLinear]:
    """Whether the head is one frozen matrix and nothing else, and the numbers are those that the kernel takes."""
    bare = isinstance(linear, LowRankLinear) and not enabled_terms(linear) and isinstance(linear.matrix, StoredMatrix)
    frozen = not any(parameter.requires_grad for parameter in linear.parameters())
    return bare and frozen and hidden.dtype == torch.float32 and hidden.device.type == "cpu"


def _chunk_loss(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head.logits(hidden), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss and, in the same pass, d loss / d hidden = (softmax(logits) - onehot) (d logits / d hidden)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: Head, chunk_rows: int) -> Tensor:
        grad_hidden = torch.empty_like(hidden)
        losses = []
        for first in range(0, len(hidden), chunk_rows):
            rows = slice(first, first + chunk_rows)
            loss, grad_hidden[rows] = _loss_and_gradient(head, hidden[rows], targets[rows])
            losses.append(loss)
        ctx.save_for_backward(grad_hidden)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_output, None, None, None


def _loss_and_gradient(head: Head, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of one chunk and its gradient to `hidden`, (rows, hidden). One tensor (rows, vocabulary) lives at once."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = head.logits(leaf)
    scores = logits.detach()
    picked, largest = scores.gather(1, targets[:, None]), scores.amax(1, keepdim=True)
    # In place, since nothing saves the logits: the one tensor (rows, vocabulary) becomes its own gradient.
    grad_logits = scores.sub_(largest).exp_()
    total = grad_logits.sum(1, keepdim=True)
    loss = (largest + total.log() - picked).sum()
    grad_logits.div_(total).scatter_add_(1, targets[:, None], grad_logits.new_full((len(targets), 1), -1.0))
    (gradient,) = torch.autograd.grad(logits, leaf, grad_logits)
    return loss, gradient
