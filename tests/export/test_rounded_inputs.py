"""Our forward with its inputs rounded as llama.cpp rounds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import row_file
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from gguf_tiny import random_model, write_gguf
from peft_pair import randomize

from luthier.adapters import AdapterSpec, attach, trainable_parameters
from luthier.adapters.targets import low_rank_layers
from luthier.export.compare import difference_to, model_logits, reference_of
from luthier.export.rounding import as_taken, rounded_logits
from luthier.export.subject import open_subject, rows_of

X = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None]


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0"])
def test_beside_blocks_of_32_it_is_q8_0(kind: str) -> None:
    expected = quants.dequantize(quants.quantize(X.numpy(), Kind.Q8_0), Kind.Q8_0)
    # gguf rounds with the scale in float32 and keeps it in float16, as ggml does.
    assert np.allclose(as_taken(X, kind).numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_beside_blocks_of_256_it_is_a_127th_of_the_largest(kind: str) -> None:
    blocks, steps = X.reshape(-1, 256), X.reshape(-1, 256).abs().amax(1, keepdim=True) / 127
    codes = as_taken(X, kind).reshape(-1, 256) / steps
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert bool(((codes - blocks / steps).abs() <= 0.5 + 1e-4).all())


def test_beside_plain_numbers_it_is_their_dtype() -> None:
    assert torch.equal(as_taken(X, "f32"), X)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        assert torch.equal(as_taken(X, kind), X.to(dtype).to(torch.float32))
    assert torch.equal(as_taken(torch.zeros(1, 32), "q8_0"), torch.zeros(1, 32))


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """Matrices in float32 move nothing, those in blocks do, and neither for longer than it is asked for."""
    for kind, least, most in ((Kind.F32, 0, 1e-6), (Kind.Q8_0, 1e-3, 0.1)):
        subject = open_subject(str(write_gguf(tmp_path / f"{kind.name}.gguf", random_model("llama"), "llama", kind)))
        model, examples = subject.model, rows_of(subject, row_file(tmp_path), 4)
        attach(model, AdapterSpec(rank=4, alpha=8), seed=1)
        with torch.no_grad():
            randomize([parameter for _, parameter in trainable_parameters(model)])
        reference, matrices = reference_of(model, examples), [one.matrix for one in low_rank_layers(model).values()]
        moved = difference_to(reference, rounded_logits(model, reference)).logits_error
        assert least <= moved <= most, kind
        after = [one.matrix for one in low_rank_layers(model).values()]
        assert all(one is other for one, other in zip(matrices, after, strict=True))
        assert difference_to(reference, model_logits(model, reference)).logits_error == 0


def test_a_term_takes_what_was_not_rounded(tmp_path: Path) -> None:
    from luthier.export.rounding import _Rounding
    from luthier.kernels import Term

    subject = open_subject(str(write_gguf(tmp_path / "q.gguf", random_model("llama"), "llama", Kind.Q8_0)))
    layer = subject.model.model.layers[0].self_attn.v_proj
    x, A, B = X[:, :64].contiguous(), torch.randn(4, 64), torch.randn(32, 4)
    got = _Rounding(layer.matrix).matmul(x, None, Term(A, B, 0.5))
    expected = as_taken(x, "q8_0") @ layer.matrix.dequantize().T + 0.5 * (x @ A.T) @ B.T
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-3)
