"""Custom ops: a schema, a reference in plain torch, and where the machine has it a native kernel. See docs/kernels.md."""

from luthier.kernels.factored_linear import factored_linear
from luthier.kernels.frozen_linear import Part, Term, dequantize, frozen_linear, frozen_linear_group, rows
from luthier.kernels.native import Active, active
from luthier.kernels.storage import Storage

__all__ = [
    "Active", "Part", "Storage", "Term", "active", "dequantize", "factored_linear", "frozen_linear", "frozen_linear_group",
    "rows",
]  # fmt: skip
