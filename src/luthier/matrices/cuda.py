"""bitsandbytes' kernels on CUDA, where it is installed. Not tested: the project's machines have no GPU."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from luthier.matrices.nf4 import NF4Matrix


@functools.cache
def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed; without it the reference dequantises, several times slower."""
    return importlib.util.find_spec("bitsandbytes") is not None


def dequantize_nf4(matrix: NF4Matrix, dtype: torch.dtype) -> Tensor:
    """W (out_features, in_features) in `dtype` by bitsandbytes' kernel. The scales are widened first, in float32."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    from luthier.kernels.dequantize import nf4_scales

    state = QuantState(
        absmax=nf4_scales(matrix.storage()),
        shape=torch.Size(matrix.shape),
        code=matrix.quant_map,
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
    )
    return dequantize_4bit(matrix.weight.detach(), state)
