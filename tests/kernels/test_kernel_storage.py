"""Stored matrices: every kind decodes as its owner's library says, native and reference to the same bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from stored import KINDS, NF4_CODE, RAGGED_KINDS, random_storage

from luthier import kernels
from luthier.errors import ShapeError
from luthier.kernels import Storage, native
from luthier.kernels.dequantize import dequantize_reference
from luthier.kernels.storage import GGUF_BLOCKS


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_gguf_kinds_decode_as_the_gguf_package_does(kind):
    storage = random_storage(kind, 6, 768)
    expected = gguf.quants.dequantize(storage.data.numpy(), gguf.GGMLQuantizationType[kind.upper()]).reshape(6, 768)
    np.testing.assert_array_equal(dequantize_reference(storage).numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_native_decoding_equals_the_reference_to_the_bit(kind):
    storage = random_storage(kind, 9, 512)
    assert torch.equal(kernels.dequantize(storage), dequantize_reference(storage))


@pytest.mark.parametrize("kind", RAGGED_KINDS)
@pytest.mark.parametrize("shape", [(5, 77), (3, 50), (1, 1), (7, 33)])
def test_ragged_rows_decode(kind, shape):
    storage = random_storage(kind, *shape)
    assert torch.equal(kernels.dequantize(storage), dequantize_reference(storage))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", native.MODES)
def test_rows_are_the_rows_of_the_matrix(kind, mode):
    storage = random_storage(kind, 9, 256)
    ids = torch.tensor([[0, 8, 3], [3, 1, 8]])
    with native.forced(mode):
        rows = kernels.rows(storage, ids)
    assert torch.equal(rows, dequantize_reference(storage)[ids])


@pytest.mark.parametrize("flush", [False, True])
def test_every_half_decodes_whether_subnormals_are_flushed_or_not(flush):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    halves = bits.view(torch.float16)[None]
    expected = torch.from_numpy(halves.numpy().astype(np.float32))
    torch.set_flush_denormal(flush)
    try:
        with native.forced("native"):
            got = kernels.dequantize(Storage.dense(halves))
    finally:
        torch.set_flush_denormal(False)
    finite = torch.isfinite(expected)
    assert torch.equal(got[finite], expected[finite])
    assert torch.equal(torch.isnan(got), torch.isnan(expected))


def test_an_id_outside_the_matrix_is_refused():
    with native.forced("native"), pytest.raises(ShapeError, match=r"ids must lie in \[0, 4\); got 1 to 4"):
        kernels.rows(random_storage("bf16", 4, 32), torch.tensor([1, 4]))


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ShapeError, match=r"storage is one of .*; got 'q4k'. Did you mean 'q4_k'"):
        Storage("q4k", (2, 256), torch.zeros(288, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Storage.dense(torch.zeros(3)), "a dense matrix has two dimensions"),
        (lambda: Storage.dense(torch.zeros(3, 4, dtype=torch.float64)), "f32, bf16 or f16; got"),
        (lambda: Storage.dense(torch.zeros(3, 8)[:, ::2]), "the f32 matrix must be contiguous"),
        (lambda: Storage("q8_0", (2, 40), torch.zeros(0, dtype=torch.uint8)), "blocks of 32 weights; got rows of 40"),
        (lambda: Storage("q8_0", (2, 64), torch.zeros(130, dtype=torch.uint8)), "must have elements 136"),
        (lambda: Storage("q8_0", (2, 64), torch.zeros(136, dtype=torch.int8)), "must be torch.uint8"),
        (lambda: Storage("nf4", (2, 64), torch.zeros(64, dtype=torch.uint8)), "needs absmax and code"),
        (lambda: nf4(absmax=torch.ones(3)), "absmax must have shape"),
        (lambda: nf4(absmax=torch.ones(2, dtype=torch.uint8)), "nested scales go with absmax in uint8"),
        (lambda: nf4(code=torch.ones(15)), "code must have shape"),
        (lambda: Storage("f32", (0, 4), torch.zeros(0, 4)), "at least one row"),
    ],
)
def test_storage_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ShapeError, match=message):
        make()


def nf4(**changed) -> Storage:
    tensors = {"absmax": torch.ones(2), "code": NF4_CODE, **changed}
    return Storage("nf4", (2, 64), torch.zeros(64, dtype=torch.uint8), **tensors)
