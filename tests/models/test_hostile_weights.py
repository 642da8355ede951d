"""Weight files and JSON from strangers: headers that lie, names that lead nowhere, files without end."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from luthier import strict_json
from luthier.errors import ModelError, PreflightError
from luthier.models import checkpoint
from luthier.models.checkpoint import SafetensorsCheckpoint
from luthier.models.load import load
from luthier.strict_json import read_json

INDEX = "model.safetensors.index.json"
EXTRA_BYTES = 1 << 30
ROTATES_TOO_MUCH = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "llama")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "llama", max_shard_size="60KB")


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


def refused(folder: Path, message: str) -> str:
    with little_memory(), pytest.raises(ModelError, match=message) as caught:
        load(str(folder))
    return str(caught.value)


def write_header(path: Path, header: str, data: bytes = bytes(64), length: int | None = None) -> None:
    content = header.encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)


def entry(name: str = "a", dtype: str = "F32", shape: str = "[4]", offsets: str = "[0,16]") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


LIES = {
    "the data ends before the tensor does": "{" + entry(shape="[400]", offsets="[0,1600]") + "}",
    "the shape says more than the offsets": "{" + entry(shape="[400]", offsets="[0,64]") + "}",
    "a shape whose product overflows": "{" + entry(shape=f"[{1 << 62},{1 << 62}]", offsets="[0,64]") + "}",
    "a shape of 2^64": "{" + entry(shape=f"[{1 << 64}]", offsets="[0,64]") + "}",
    "a negative shape": "{" + entry(shape="[-4]", offsets="[0,64]") + "}",
    "offsets the wrong way round": "{" + entry(offsets="[16,0]") + "}",
    "negative offsets": "{" + entry(offsets="[-16,0]") + "}",
    "tensors that overlap": "{" + entry("a", "F32", "[8]", "[0,32]") + "," + entry("b", "F32", "[12]", "[16,64]") + "}",
    "a hole between tensors": "{" + entry("a", offsets="[0,16]") + "," + entry("b", shape="[8]", offsets="[32,64]") + "}",
    "data that no tensor holds": "{" + entry(offsets="[0,16]") + "}",
    "an unknown dtype": "{" + entry(dtype="F31", shape="[16]", offsets="[0,64]") + "}",
    "one name twice": "{" + entry("a", shape="[8]", offsets="[0,32]") + "," + entry("a", shape="[8]", offsets="[32,64]") + "}",
    "metadata that is no text": '{"__metadata__":{"a":1},' + entry(shape="[16]", offsets="[0,64]") + "}",
    "a list": "[]",
    "nothing": "{}",
    "deeply nested": "[" * 100_000,
    "not UTF-8": '{"\udcff":1}',
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_headers_that_lie(single: Path, lie: str) -> None:
    path = single / "model.safetensors"
    content = LIES[lie].encode("utf-8", "surrogateescape")
    path.write_bytes(struct.pack("<Q", len(content)) + content + bytes(64))
    message = refused(single, r"damaged or cut short|has no place in the model|is missing")
    assert str(single) in message


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 27) + 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_safetensors_headers_of_another_length(single: Path, length: int) -> None:
    write_header(single / "model.safetensors", "{" + entry(shape="[16]", offsets="[0,64]") + "}", length=length)
    refused(single, r"model\.safetensors is damaged or cut short")


def test_a_weight_in_two_shards_is_refused(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    state = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file(state | {name: tensor + 1}, second)
    refused(sharded, rf"{name} is in {first.name} and in {second.name}")


def test_weights_that_are_in_no_file(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, r"model\.ghost\.weight is not in .*, where the index puts it")


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a/" * 3000 + "b", "circle.safetensors", "folder.safetensors", "pipe.safetensors"]
)
def test_names_that_lead_to_no_file(sharded: Path, name: str) -> None:
    (sharded / "circle.safetensors").symlink_to("circle.safetensors")
    (sharded / "folder.safetensors").mkdir()
    os.mkfifo(sharded / "pipe.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    message = refused(sharded, "is missing|leads out of the folder")
    assert len(message) < 1000


@pytest.mark.parametrize("name", ["\ud800", "\u0000", "~/x", "file:///etc/passwd", "C:\\x", "//host/share"])
def test_names_that_are_no_names(sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "is missing|leads out of the folder")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", INDEX])
def test_json_without_end_or_sense(sharded: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        '{"a": [' + "[" * 50_000: "nested too deeply|Expecting",
        '{"a": NaN}': "it holds NaN",
        '{"a": 1, "a": 2}': "the key 'a' appears twice with different values",
        '{"a": "' + "x" * 200_000 + '"}': "it is longer than 100000 bytes",
    }
    monkeypatch.setattr(strict_json, "MAX_JSON_BYTES", 100_000)
    for content, message in contents.items():
        (sharded / file).write_text(content)
        refused(sharded, message)
    (sharded / file).unlink()
    os.mkfifo(sharded / file)
    refused(sharded, "it is no regular file|is a pipe or a device|has neither")


def test_json_that_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "dtype": "f32", "dtype": "f32", "size": -1.5e3}')
    assert read_json(path) == {"time_step_limit": [0.0, float("inf")], "dtype": "f32", "size": -1500.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": 9999}, "no model can be built|pad_token_id"),
        ({"rope_parameters": ROTATES_TOO_MUCH}, "partial_rotary_factor must be above 0 and at most 1; got 1000000000.0"),
        ({"head_dim": 1 << 30}, "head_dim must be between"),
        ({"max_position_embeddings": -1}, "max_position_embeddings must be between 1 and"),
        ({"rms_norm_eps": "tiny"}, "not a valid llama configuration"),
        ({"layer_types": ["full_attention"] * 7}, "configuration"),
        ({"vocab_size": 1 << 23}, r"must be \(8388608, 64\)"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers|configuration"),
        ({"hidden_act": ["silu"]}, "configuration"),
        ({"dtype": "float31"}, "configuration"),
        ({"dtype": float("inf")}, "configuration"),
        ({"to_dict": 1}, "configuration"),
    ],
)  # fmt: skip
def test_configurations_that_ask_for_too_much_or_make_no_sense(single: Path, changes: dict[str, Any], message: str) -> None:
    path = single / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(single, message)


def test_a_computed_buffer_without_bounds(tmp_path: Path) -> None:
    """GPT-J computes a table of sines as long as the context it claims."""
    folder = write_tiny(tmp_path, "llama")
    config = {"model_type": "gptj", "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 1 << 30, "rotary_dim": 16}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    refused(folder, r"no model can be built from this configuration; ValueError: it asks for a computed buffer of \d+ bytes")


def test_weights_of_another_size_cost_no_memory(single: Path) -> None:
    """A file may hold gigabytes of zeros in no space on the disk; shapes are compared before anything is read."""
    size = 8 << 30
    state = load_file(single / "model.safetensors")
    del state["model.embed_tokens.weight"]
    save_file(state, single / "model-1.safetensors")
    header = "{" + entry("model.embed_tokens.weight", shape=f"[{size // 256},64]", offsets=f"[0,{size}]") + "}"
    write_header(single / "model-2.safetensors", header, b"")
    os.truncate(single / "model-2.safetensors", (single / "model-2.safetensors").stat().st_size + size)
    (single / "model.safetensors").unlink()
    weight_map = dict.fromkeys(state, "model-1.safetensors") | {"model.embed_tokens.weight": "model-2.safetensors"}
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight must be \(512, 64\); it is \(33554432, 64\)"):
        load(str(single))


def test_a_file_larger_than_any_memory_has_its_header_read(single: Path) -> None:
    """Torch maps a whole file as if it were written to, which the system refuses where it is larger than all memory."""
    size = 1 << 45
    header = "{" + entry("a", shape=f"[{size // 4}]", offsets=f"[0,{size}]") + "}"
    path = single / "model.safetensors"
    write_header(path, header, b"")
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("the file system has no files of that size")
    assert SafetensorsCheckpoint(single).shape("a") == (size // 4,)


def test_a_file_that_cannot_be_mapped_is_no_fault_of_the_program(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "unable to mmap 141107505472 bytes from file: Cannot allocate memory (12)"

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(reason)

    weights = SafetensorsCheckpoint(single)
    monkeypatch.setattr(checkpoint, "safe_open", refuse)
    size = (single / "model.safetensors").stat().st_size
    for mapped in (True, False):
        with pytest.raises(PreflightError, match=rf"no larger than this machine can map.*has {size} bytes\. Cut it in shards"):
            weights.tensor("model.norm.weight", mapped=mapped)
    reason = "unable to open file in read-write mode: Too many open files (24)"
    with pytest.raises(RuntimeError, match="Too many open files"):
        weights.tensor("model.norm.weight", mapped=True)


def test_nan_in_a_plain_weight_loads_and_is_found(single: Path) -> None:
    from luthier.models.load import check_finite

    state = load_file(single / "model.safetensors")
    state["model.layers.0.input_layernorm.weight"][7] = float("nan")
    save_file(state, single / "model.safetensors", metadata={"format": "pt"})
    model = load(str(single)).model
    with pytest.raises(PreflightError, match=r"model\.layers\.0\.input_layernorm\.weight: 1 of 64 values"):
        check_finite(model)
    assert not torch.isfinite(model.model.layers[0].input_layernorm.weight).all()
