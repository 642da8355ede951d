"""The native decoder over layers in factors: logits of prompts and of further tokens, beside the same matrices dense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tiny import compressed_folder

from luthier.adapters import AdapterSpec, attach
from luthier.adapters.targets import low_rank_layers
from luthier.errors import ShapeError
from luthier.generation.generator import Generator, generation_obstacle
from luthier.generation.native_session import NativeSession
from luthier.generation.stack import Stack
from luthier.kernels import native
from luthier.kernels.decoder import FactoredPart
from luthier.linear import LowRankTerm
from luthier.matrices import DenseMatrix
from luthier.models.load import load

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 7, 20], [40, 41], [11] * 9]
needs_native = pytest.mark.skipif(not native.use_native(), reason="the decoder is compiled")


def twins(folder: Path, family: str, *, adapted: bool):
    """A compressed model and the same with dense matrices, both with the same adapter where `adapted`."""
    path, _ = compressed_folder(folder, family)
    model, dense = load(str(path)).model, load(str(path)).model
    for layer in low_rank_layers(dense).values():
        layer.matrix = DenseMatrix(layer.matrix.dequantize())
    for one in (model, dense):
        if adapted:
            attach(one, AdapterSpec(rank=3), seed=1)
            torch.manual_seed(2)
            for module in one.modules():
                if isinstance(module, LowRankTerm):
                    torch.nn.init.normal_(module.lora_B, std=0.05)
        one.eval()
    return model, dense


@needs_native
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_logits_are_those_of_the_dense_matrices(tmp_path: Path, family: str, adapted: bool, rows: int) -> None:
    model, dense = twins(tmp_path, family, adapted=adapted)
    assert generation_obstacle(model) is None
    texts = [list(prompt) for prompt in PROMPTS[:rows]]
    with torch.no_grad():
        session = NativeSession(model)
        states, logits = session.start(texts)
        for step in range(3):
            for text, own in zip(texts, logits, strict=True):
                expected = dense(torch.tensor([text])).logits[0, -1]
                assert (own - expected).abs().max() < 3e-4 * expected.abs().max()
                text.append(13 + step)
            logits = session.extend(states, [13 + step] * len(states))


@needs_native
def test_what_is_generated_is_what_the_dense_model_generates(tmp_path: Path) -> None:
    model, dense = twins(tmp_path, "llama", adapted=False)
    assert Generator(model).generate(PROMPTS, 8) == Generator(dense).generate(PROMPTS, 8)


@needs_native
def test_factors_that_do_not_fit_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    model, _ = twins(tmp_path, "llama", adapted=False)
    matrix = model.model.layers[0].mlp.gate_proj.matrix
    part = FactoredPart(matrix.left.storage(), matrix.right.storage(), None, matrix.places)
    assert part.shape == matrix.shape
    pool = torch.zeros(1, 512 * 1024)
    stack = Stack(model)
    matrix.places += 1000  # in the memory that the decoder reads
    pages = torch.full((1, 1), pool.data_ptr())
    hidden, rows = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64)
    stack._reach(1)
    with pytest.raises(ShapeError, match="lt_decode_step refused its arguments"):
        stack.decoder.step(hidden, torch.zeros(1, dtype=torch.int64), pages, stack._tables, rows)
