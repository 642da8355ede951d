"""Data as people have it becomes token ids with a mask: read, recognise, render, mask, check."""

from luthier.data.check import DataReport, check_data
from luthier.data.example import Dataset, Example, overlap
from luthier.data.load import load_examples
from luthier.data.render import Renderer

__all__ = ["DataReport", "Dataset", "Example", "Renderer", "check_data", "load_examples", "overlap"]
