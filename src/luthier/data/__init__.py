"""Data as people have it becomes token ids with a mask: read, recognise, render, mask, check."""

from luthier.data.check import DataReport, check_data
from luthier.data.example import Dataset, Example, overlap
from luthier.data.load import kept_examples, load_examples
from luthier.data.render import Renderer
from luthier.data.row_cache import RowCache

__all__ = [
    "DataReport", "Dataset", "Example", "Renderer", "RowCache", "check_data", "kept_examples", "load_examples", "overlap",
]  # fmt: skip
