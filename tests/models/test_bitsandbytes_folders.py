"""NF4 folders in both directions: what is written here opens in Transformers with bitsandbytes, what they write opens here.

Weights are compared as both dequantise them, bit for bit, in rows that are whole blocks: on CPUs bitsandbytes 0.50 reads the
scales of some other lengths wrong.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_tiny import random_model
from tiny import FAMILIES, tiny_tokenizer, write_tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from luthier.config import NF4Options
from luthier.linear import LowRankLinear
from luthier.matrices import DenseMatrix, NF4Matrix
from luthier.models.load import load
from luthier.models.quantize import quantize

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS = list(itertools.product([True, False], [True, False], [True, False]))  # double, tied, sharded
IDS = torch.arange(3, 43).reshape(2, 20)


def write_source(folder: Path, family: str, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model whose rows are whole blocks of 64."""
    if family == "gpt2":
        return write_tiny(folder, family, tied, dtype)
    changes: dict[str, Any] = {"intermediate_size": 128, "tie_word_embeddings": tied}
    if family == "gpt_neox":
        changes["num_key_value_heads"] = None
    random_model(family, **changes).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def theirs_in(model: Any) -> dict[str, torch.Tensor]:
    """Every weight that bitsandbytes holds in 4 bits, in numbers."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    return {
        name: bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state) for name, layer in layers.items()
    }


def ours_in(model: Any) -> dict[str, NF4Matrix]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    return {name: layer.matrix for name, layer in layers.items() if isinstance(layer.matrix, NF4Matrix)}


def assert_same_weights(ours: Any, theirs: Any) -> None:
    numbers, matrices = theirs_in(theirs), ours_in(ours)
    assert numbers
    assert sorted(numbers) == sorted(matrices)
    for name, weight in numbers.items():
        assert torch.equal(matrices[name].dequantize(weight.dtype), weight), name
    plain = {key: tensor for key, tensor in theirs.state_dict().items() if tensor.is_floating_point() and "absmax" not in key}
    own = ours.state_dict()
    compared = 0
    for key, tensor in plain.items():
        if key in own and "quant_map" not in key:
            assert torch.equal(own[key].to(torch.float32), tensor.to(torch.float32)), key
            compared += 1
    assert compared > 4


@pytest.mark.parametrize(("double", "tied", "sharded"), KINDS)
def test_ours_opens_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, double: bool, tied: bool, sharded: bool) -> None:
    if sharded:
        monkeypatch.setattr("luthier.models.quantize.SHARD_BYTES", 30_000)
    folder = write_source(tmp_path / "model", "llama", tied, torch.bfloat16)
    report = quantize(str(folder), tmp_path / "nf4", nf4=NF4Options(double_quant=double))
    assert (len(list(Path(report.folder).glob("*.safetensors"))) > 1) == sharded
    theirs = AutoModelForCausalLM.from_pretrained(report.folder, device_map={"": "cpu"})
    assert_same_weights(load(report.folder).model, theirs)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_every_family_opens_there(tmp_path: Path, family: str) -> None:
    folder = write_source(tmp_path / "model", family, family != "olmo2", torch.bfloat16)
    report = quantize(str(folder), tmp_path / "nf4", nf4=NF4Options())
    theirs = AutoModelForCausalLM.from_pretrained(report.folder, device_map={"": "cpu"})
    assert_same_weights(load(report.folder).model, theirs)


def save_theirs(folder: Path, target: Path, double: bool, **save: Any) -> Any:
    """The model of `folder` quantised and saved by Transformers with bitsandbytes; returns it."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    for module in theirs.modules():  # in evaluation mode bitsandbytes repacks weights for a product in bfloat16
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()
    theirs.save_pretrained(target, **save)
    tiny_tokenizer().save_pretrained(target)
    return theirs


@pytest.mark.parametrize(("double", "tied", "sharded"), KINDS)
def test_theirs_opens_here(tmp_path: Path, double: bool, tied: bool, sharded: bool) -> None:
    folder = write_source(tmp_path / "model", "qwen2", tied)
    theirs = save_theirs(folder, tmp_path / "theirs", double, **({"max_shard_size": "60KB"} if sharded else {}))
    assert (len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1) == sharded
    model, _ = load(str(tmp_path / "theirs"))
    assert all(matrix.double_quant == double for matrix in ours_in(model).values())
    assert_same_weights(model, theirs)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with torch.no_grad():
        actual, expected = model(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_theirs_written_again_is_the_same(tmp_path: Path) -> None:
    """A folder of bitsandbytes that goes through `quantize` keeps its codes and scales: nothing is rounded twice."""
    folder = write_source(tmp_path / "model", "llama", False)
    theirs = save_theirs(folder, tmp_path / "theirs", True)
    report = quantize(str(tmp_path / "theirs"), tmp_path / "again", nf4=NF4Options())
    assert report.notes == []
    assert_same_weights(load(report.folder).model, theirs)
    asked = NF4Options(double_quant=False, skip_modules=("v_proj",))
    report = quantize(str(tmp_path / "theirs"), tmp_path / "third", nf4=asked)
    (note,) = report.notes
    assert note.startswith("14 weights (model.layers.0.self_attn.q_proj.weight, ")
    assert note.endswith("are in NF4 already and kept so: double quantisation and skip_modules change nothing.")
    assert_same_weights(load(report.folder).model, theirs)
    settings = json.loads((tmp_path / "third" / "config.json").read_text())["quantization_config"]
    assert settings["bnb_4bit_use_double_quant"] is True
    assert settings["llm_int8_skip_modules"] == ["lm_head"]


def test_theirs_can_be_widened(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "model", "gpt2", True)
    theirs = save_theirs(folder, tmp_path / "theirs", True)
    wide, _ = load(str(tmp_path / "theirs"), base="f32")
    for name, weight in theirs_in(theirs).items():
        matrix = wide.get_submodule(name).matrix
        assert isinstance(matrix, DenseMatrix)
        assert torch.equal(matrix.dequantize(), weight.to(torch.float32)), name


def test_fp4_and_int8_of_bitsandbytes_are_refused_by_name(tmp_path: Path) -> None:
    from luthier.errors import ModelError

    folder = write_source(tmp_path / "model", "llama", False)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"})
    theirs.save_pretrained(tmp_path / "fp4")
    tiny_tokenizer().save_pretrained(tmp_path / "fp4")
    message = r"must be bitsandbytes nf4 or a GGUF file; these are bitsandbytes fp4.*Use the original model; --method qlora"
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path / "fp4"))
    config = json.loads((tmp_path / "fp4" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "fp4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load(str(tmp_path / "fp4"))
