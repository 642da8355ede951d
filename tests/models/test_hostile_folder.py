"""Transformers folders from strangers: nothing outside is read, no code runs, no pickle is opened, errors say what to do."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from luthier.errors import ModelError
from luthier.models.load import load

INDEX = "model.safetensors.index.json"


def refused(folder: Path, message: str) -> str:
    with pytest.raises(ModelError, match=message) as caught:
        load(str(folder))
    assert caught.value.exit_code == 3
    return str(caught.value)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "llama", max_shard_size="60KB")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "llama")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "sub/../../outside.safetensors", "/ABSOLUTE", "..\\outside.safetensors", "\0", ""]
)
def test_index_that_leads_out(sharded: Path, name: str) -> None:
    outside = sharded.parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(64)}, outside)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name.replace("/ABSOLUTE", str(outside))
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "leads out of the folder")


def test_shard_that_is_a_link_out(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.rename(sharded.parent / "outside.safetensors")
    shard.symlink_to(sharded.parent / "outside.safetensors")
    refused(sharded, f"'{shard.name}' leads out of the folder")


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--o--m"
    folder = write_tiny(repository / "snapshots" / "abc", "llama", max_shard_size="60KB")
    (repository / "blobs").mkdir()
    for number, shard in enumerate(sorted(folder.glob("*.safetensors"))):
        shard.rename(repository / "blobs" / str(number))
        shard.symlink_to(Path("../../blobs") / str(number))
    load(str(folder))


def test_all_problems_of_the_shards_are_told_at_once(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    second.write_bytes(b"garbage")
    message = refused(sharded, "the weights of .* must be whole")
    assert f"{first.name} is damaged or cut short" in message
    assert f"{second.name} is damaged or cut short" in message


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    refused(sharded, f"{shard.name} is missing")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\ud800"]
)
def test_garbage_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(sharded, "weight_map")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        b"\x93NUMPY" + bytes(200),
        bytes(1000),
    ],
)
def test_garbage_weights(single: Path, content: bytes) -> None:
    (single / "model.safetensors").write_bytes(content)
    refused(single, "damaged or cut short|is missing")


def test_pickles_are_never_opened(single: Path) -> None:
    (single / "model.safetensors").unlink()
    marker = single.parent / "ran"
    (single / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(str(marker))))
    refused(single, "pytorch_model.bin, which are pickles and could run code, so they are never opened")
    assert not marker.exists()


class _Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ["llama", "not_of_transformers"])
def test_code_of_the_folder_never_runs(single: Path, kind: str) -> None:
    marker = single.parent / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass C: pass\nclass M: pass\nclass T: pass\n"
    (single / "evil.py").write_text(code)
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit_json(single / "config.json", auto_map=auto_map, model_type=kind)
    edit_json(single / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    if kind == "llama":
        load(str(single))
    else:
        refused(
            single,
            r"model_type must be one Transformers knows; got 'not_of_transformers'\. It asks to run its own code \(auto_map\)",
        )
    assert not marker.exists()


def test_quantized_weights_are_refused(single: Path) -> None:
    edit_json(single / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    refused(single, r"quantized weights must be bitsandbytes nf4 or a GGUF file; these are gptq\.")


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "3", "\ufeff{}", "[" * 100_000, "{}", '{"model_type": 5}', '{"model_type": "lama"}']
)
def test_garbage_config(single: Path, content: str) -> None:
    (single / "config.json").write_text(content)
    refused(single, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -64}, "hidden_size must be between 1 and"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 1 << 40}, "hidden_size must be between 1 and"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be between 1 and 1024"),
        ({"num_hidden_layers": 1000, "hidden_size": 1 << 20}, "are more than any model has"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* has no place in the model"),
        ({"vocab_size": 500}, r"model\.embed_tokens\.weight must be \(500, 64\); it is \(512, 64\)"),
        ({"hidden_act": "no_such"}, "no model can be built"),
        ({"rope_parameters": {"rope_type": "no_such"}}, "no model can be built|not a valid llama configuration"),
        ({"num_attention_heads": 5}, "not a valid llama configuration"),
        ({"model_type": "t5"}, "t5 is not"),
        ({"model_type": "gemma3"}, "must be of text alone"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
    ],
)
def test_config_that_makes_no_sense(single: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(single / "config.json", **changes)
    refused(single, message)


def test_integer_weights_are_refused(single: Path) -> None:
    tensors = load_file(single / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
    save_file(tensors, single / "model.safetensors")
    refused(single, r"model\.layers\.0\.mlp\.up_proj\.weight must be stored in f32, bf16 or f16; it is not")


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}'])
def test_tokenizer_missing_or_damaged(single: Path, content: str | None) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (single / name).unlink()
    if content is not None:
        (single / "tokenizer.json").write_text(content)
    refused(single, "the folder must hold a whole tokenizer")


def test_garbage_generation_config(single: Path) -> None:
    (single / "generation_config.json").write_text("{")
    refused(single, "generation_config.json' is not valid|generation_config.json must be valid")


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, r"a model folder holds config\.json; .* does not\. Check the path, or download the model again")
