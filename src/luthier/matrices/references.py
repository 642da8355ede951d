"""4-bit formats that NF4 is compared with. They exist to be measured: a weight goes to the format and comes back dense.

Source: QLoRA, arXiv:2305.14314, table 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.errors import ShapeError, nearest
from luthier.kernels.quantize_reference import NF4_CODES

BLOCK = 64

# The values of each format, divided by the largest. Int4: evenly spread. E2M1: one sign, two exponent bits, one mantissa bit,
# the float of QLoRA's table 2. FP4: bitsandbytes' table, E2M1 but for its least value, 1/192 of the largest in place of 1/12.
TABLES = {
    "e2m1": tuple(value / 6 for value in (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)),
    "fp4": tuple(value / 12 for value in (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12)),
    "int4": tuple(value / 7 for value in range(-7, 8)),
    "nf4": NF4_CODES,
}


def round_trip(weight: Tensor, table: str) -> Tensor:
    """The weight after each block of 64 (flat, row-major) was divided by its absmax and rounded to the nearest table value.

    weight: any shape, float; -> float32, the same shape. Scales stay float32. Raises ShapeError for an unknown table.
    """
    if table not in TABLES:
        raise ShapeError(f"a 4-bit table is one of {', '.join(TABLES)}; got {table!r}.{nearest(table, list(TABLES))}")
    levels = torch.tensor(TABLES[table], dtype=torch.float32, device=weight.device)
    flat = weight.detach().to(torch.float32).reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))
    nearest_level = levels[torch.bucketize(scaled.clamp(-1, 1), (levels[1:] + levels[:-1]) / 2)]
    return (nearest_level * absmax).reshape(-1)[: len(flat)].reshape(weight.shape)
