"""A state of the model for the length of a block: evaluation mode, or embeddings that gradients reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode; afterwards every module is in the mode it was found in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def inputs_require_grads(model: Any) -> Iterator[list[Tensor]]:
    """Within the block the embeddings' output requires gradients, so that they reach every layer of a frozen model.

    Yields the list that each such output is put in: a leaf, below which nothing gets a gradient.
    """
    outputs: list[Tensor] = []

    # By the name of Transformers' own hook of this kind, which fused blocks let pass.
    def make_inputs_require_grads(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    handle = model.get_input_embeddings().register_forward_hook(make_inputs_require_grads)
    try:
        yield outputs
    finally:
        handle.remove()
