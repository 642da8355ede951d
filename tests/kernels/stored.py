"""Random storages of every kind, of any shape the kind allows."""

from __future__ import annotations

import torch

from luthier.kernels import Storage
from luthier.kernels.storage import GGUF_BLOCKS

NF4_CODE = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
DENSE = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# "nf4-double" has double-quantised scales, "bf16-turned" and "f32-turned" lie (in, out).
KINDS = (*DENSE, "f32-turned", "bf16-turned", "nf4", "nf4-double", *GGUF_BLOCKS)
RAGGED_KINDS = KINDS[:7]


def random_storage(kind: str, out_features: int, in_features: int, seed: int = 0) -> Storage:
    generator = torch.Generator().manual_seed(seed)
    weights = out_features * in_features
    name, _, turned = kind.partition("-")
    if name in DENSE:
        shape = (in_features, out_features) if turned else (out_features, in_features)
        return Storage.dense(torch.randn(shape, generator=generator).to(DENSE[name]), transposed=bool(turned))
    if name == "nf4":
        return _nf4(weights, (out_features, in_features), turned == "double", generator)
    block, size = GGUF_BLOCKS[kind]
    data = torch.randint(0, 256, (weights // block, size), dtype=torch.uint8, generator=generator)
    for site in _half_sites(kind):
        halves = torch.rand(weights // block, 1, generator=generator).to(torch.float16)
        data[:, site : site + 2] = halves.view(torch.uint8)
    return Storage(kind, (out_features, in_features), data)


def _nf4(weights: int, shape: tuple[int, int], double: bool, generator: torch.Generator) -> Storage:
    data = torch.randint(0, 256, ((weights + 1) // 2, 1), dtype=torch.uint8, generator=generator)
    blocks = (weights + 63) // 64
    if not double:
        return Storage("nf4", shape, data, absmax=torch.rand(blocks, generator=generator), code=NF4_CODE)
    return Storage(
        "nf4",
        shape,
        data,
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator),
        code=NF4_CODE,
        nested_absmax=torch.rand((blocks + 255) // 256, generator=generator),
        nested_map=torch.randn(256, generator=generator),
        offset=0.3,
    )


def _half_sites(kind: str) -> tuple[int, ...]:
    if kind == "q6_k":
        return (208,)
    return (0, 2) if kind in ("q4_1", "q5_1", "q4_k", "q5_k") else (0,)
