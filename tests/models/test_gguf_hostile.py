"""GGUF files from strangers: whatever is wrong with one, there is one ModelError and no large allocation."""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf

from luthier.errors import ModelError
from luthier.models.gguf_file import read_gguf
from luthier.models.load import load

EXTRA_BYTES = 1 << 30
MUTATIONS = 300


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model("llama"), "llama", Kind.Q4_1).read_bytes()


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process grow by EXTRA_BYTES at most; beyond, allocations fail."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def assert_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with little_memory(), pytest.raises(ModelError, match=message):
        load(str(path))


def header(tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes, too few for a header"),
        (b"GGUF", "it has 4 bytes"),
        (header(magic=b"GGML"), "it begins with b'GGML', not b'GGUF'"),
        (header(version=1), "its version is 1, not 2 or 3"),
        (header(version=3 << 24), "its version is 50331648"),
        (header(tensors=1 << 63), "it claims 9223372036854775808 tensors"),
        (header(keys=(1 << 64) - 1), "it claims 0 tensors and 18446744073709551615 keys"),
        (header(keys=3), "it ends at byte 24, inside its header"),
        (header(keys=1) + struct.pack("<Q", 1 << 62), "inside its header"),
        (header(keys=1) + text(b"\xff\xfe") + bytes(16), "not UTF-8"),
        (header(keys=1) + text(b"a") + struct.pack("<I", 99), "'a' has the unknown type 99"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 60), "'a' claims 1152921504606846976 elements"),
        (header(keys=1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1), "'a' is an array of arrays"),
        (header(keys=2) + 2 * (text(b"a") + struct.pack("<II", 4, 1)), "key 'a' appears twice"),
        (
            header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 33),
            "general.alignment is 33, not a power of two",
        ),
        (header(tensors=1) + text(b"t") + struct.pack("<I", 9), "tensor 't' has 9 dimensions"),
        (header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 32, 77, 0), "tensor 't' has the unknown type 77"),
        (
            header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 31, 2, 0),
            r"shape \(31,\) and offset 0, which do not fit type Q4_0",
        ),
        (header(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), "tensor 't' ends at byte"),
        (header(tensors=1) + text(b"t") + struct.pack("<IQIQ", 1, 32, 0, 1 << 63), "tensor 't' ends at byte"),
        (
            header(tensors=2)
            + text(b"a")
            + struct.pack("<IQIQ", 1, 32, 0, 0)
            + text(b"b")
            + struct.pack("<IQIQ", 1, 32, 0, 96)
            + bytes(512),
            "tensors 'a' and 'b' overlap",
        ),
        (header(tensors=2) + 2 * (text(b"t") + struct.pack("<IQIQ", 1, 8, 0, 0)) + bytes(512), "tensor 't' appears twice"),
        (header(tensors=1) + text(b"t") + struct.pack("<IQQIQ", 2, 32, 0, 0, 0) + bytes(512), r"shape \(0, 32\)"),
    ],
)
def test_headers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    assert_refused(tmp_path, content, message)


def test_arrays_may_not_add_up_to_a_large_allocation(tmp_path: Path) -> None:
    """A byte in the file is eight in memory: three arrays of the allowed length are one too many."""
    count = 1 << 22
    array = struct.pack("<IIQ", 9, 7, count) + bytes(count)
    content = header(keys=3) + b"".join(text(name) + array for name in (b"a", b"b", b"c"))
    assert_refused(tmp_path, content, "'c' claims 4194304 elements")


@pytest.mark.parametrize("part", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, whole: bytes, part: float) -> None:
    assert_refused(tmp_path, whole[: int(len(whole) * part)], "is not a whole GGUF file")


def test_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        read_gguf(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_random_mutations(tmp_path: Path, whole: bytes, seed: int) -> None:
    """Bytes of the header changed at random: it loads, or there is a ModelError, and nothing else."""
    rng = random.Random(seed)
    end = len(whole) - sum(tensor.size_bytes for tensor in _tensors(tmp_path, whole))
    path = tmp_path / "mutated.gguf"
    refused = 0
    for _ in range(MUTATIONS // 3):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            _mutate(content, rng, end)
        path.write_bytes(content)
        with little_memory():
            try:
                load(str(path))
            except ModelError:
                refused += 1
    assert refused > MUTATIONS // 3 // 10


def _tensors(tmp_path: Path, whole: bytes) -> list:
    (tmp_path / "whole.gguf").write_bytes(whole)
    return list(read_gguf(tmp_path / "whole.gguf").tensors.values())


def _mutate(content: bytearray, rng: random.Random, end: int) -> None:
    place = rng.randrange(end)
    kind = rng.randrange(4)
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[place : place + 8] = rng.choice((bytes(8), b"\xff" * 8, struct.pack("<Q", rng.getrandbits(33))))
    elif kind == 2:
        del content[place : place + rng.randrange(1, 9)]
    else:
        content[place] = rng.randrange(256)
