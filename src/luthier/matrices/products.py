"""The product with a stored matrix: by the kernels, or by plain torch where they cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier import kernels

if TYPE_CHECKING:
    from luthier.matrices.frozen import StoredMatrix

HALF_DTYPES = (torch.bfloat16, torch.float16)


def product(matrix: StoredMatrix, x: Tensor, bias: Tensor | None = None, term: kernels.Term | None = None) -> Tensor:
    """x W^T + bias + s (x A^T) B^T in x's dtype. x: (..., in_features) -> (..., out_features).

    The one place that decides how: the kernel for float32 on the CPU and a frozen W, plain torch for all else and for no rows.
    Where x is in 16 bits and W on the CPU is stored otherwise, x is widened for the kernel: the other way would hold the
    whole of W in x's dtype.
    """
    frozen_on_cpu = x.device.type == "cpu" and not matrix.weight.requires_grad and x.numel() > 0
    if frozen_on_cpu and x.dtype == torch.float32:
        return kernels.frozen_linear(x, matrix.storage(), bias, term)
    if frozen_on_cpu and x.dtype in HALF_DTYPES and matrix.weight.dtype != x.dtype:
        return kernels.frozen_linear(x.to(torch.float32), matrix.storage(), bias, term).to(x.dtype)
    y = _plain_product(matrix, x)
    if term is not None:
        y = y + (term.scaling * F.linear(F.linear(x.to(term.A.dtype), term.A), term.B)).to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _plain_product(matrix: StoredMatrix, x: Tensor) -> Tensor:
    if matrix.weight.requires_grad or matrix.weight.dtype == x.dtype:
        return F.linear(x, matrix.dequantize(x.dtype))
    return _WidenedProduct.apply(x, matrix)


class _WidenedProduct(torch.autograd.Function):
    """y = x W^T with W stored in fewer bits: widened for the product, and again in backward, never kept widened."""

    @staticmethod
    def forward(ctx, x: Tensor, matrix: StoredMatrix) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.matrix.dequantize(grad_output.dtype), None
