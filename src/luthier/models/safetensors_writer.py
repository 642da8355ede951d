"""Write a safetensors file tensor by tensor: nothing is copied, so writing a model takes no memory beside the model.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMES = {
    **{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"},
    **{torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64"},
}
ALIGNMENT = 64


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, written: Callable[[int], None] | None = None) -> None:
    """tensors: on the CPU, of the dtypes in NAMES. Wide dtypes come first, so that each tensor lies at a multiple of its
    element's size. written(bytes) is called after each tensor."""
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for name in order:
            file.write(_bytes_of(tensors[name]))
            if written is not None:
                written(tensors[name].numel() * tensors[name].element_size())


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
