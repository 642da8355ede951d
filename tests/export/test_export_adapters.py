"""Adapters in the forms of llama.cpp, mlx-lm and PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from exporting import adapted, logits, ours, relative, row_file
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf
from peft_pair import with_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_tiny

import luthier
from luthier.adapters import load_adapter
from luthier.adapters.targets import low_rank_layers
from luthier.config import NF4Options
from luthier.errors import AdapterError, ConfigError, NumericError
from luthier.export.export import export
from luthier.export.gguf_adapter import read_adapter
from luthier.export.subject import open_subject
from luthier.linear import LowRankLinear, LowRankTerm
from luthier.models.quantize import quantize

SPECS: list[dict[str, Any]] = [
    {},
    {"variant": "rslora"},
    {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3.0}},
    {"variant": "rslora", "rank_pattern": {"k_proj": 1, "down_proj": 7}},
    {"targets": ["embed_tokens", "lm_head", "v_proj"]},
]


def delta_of(model: Any, name: str) -> torch.Tensor:
    term = model.get_submodule(name).terms["default"]
    assert isinstance(term, LowRankTerm)
    return term.delta().detach()


@pytest.mark.parametrize(
    ("family", "spec"), [*(("llama", spec) for spec in SPECS), *((family, {}) for family in ("mistral", "qwen2", "phi3"))]
)
def test_gguf_adapter_is_read_back(tmp_path: Path, family: str, spec: dict[str, Any]) -> None:
    adapter = adapted(tmp_path, family, tied=False, **spec)
    report = export(str(adapter), to="gguf-adapter", out=tmp_path / "out", data=row_file(tmp_path), verify=True)
    (verified, *_) = report.verification
    assert verified.passed
    assert verified.difference.largest_logits_error <= 1e-4
    path = tmp_path / "out" / "adapter-adapter.gguf"
    model = ours(tmp_path)
    read = read_adapter(path, model.config)
    for name, (A, B) in read.pairs.items():
        assert torch.allclose(read.scaling(name) * B @ A, delta_of(model, name), atol=1e-5), name
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.type").contents() == "lora"


def test_gguf_adapter_scale_and_rows(tmp_path: Path) -> None:
    """alpha sqrt(r) of an rsLoRA of one rank, B untouched but for its rows; folded into B where ranks differ."""
    adapter = adapted(tmp_path, variant="rslora", targets=["q_proj", "v_proj"])
    export(str(adapter), to="gguf-adapter", out=tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter-adapter.gguf")
    assert reader.get_field("adapter.lora.alpha").contents() == pytest.approx(8 * 2)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    model = ours(tmp_path)
    layer = model.model.layers[0].self_attn
    B = layer.q_proj.terms["default"].lora_B.detach()
    permuted = B.reshape(4, 2, 8, 4).swapaxes(1, 2).reshape(64, 4)
    assert torch.equal(torch.from_numpy(tensors["blk.0.attn_q.weight.lora_b"].copy()), permuted)
    assert torch.equal(torch.from_numpy(tensors["blk.0.attn_v.weight.lora_b"].copy()), layer.v_proj.terms["default"].lora_B)
    assert torch.equal(torch.from_numpy(tensors["blk.0.attn_q.weight.lora_a"].copy()), layer.q_proj.terms["default"].lora_A)


@pytest.mark.parametrize(
    ("tied", "spec", "message"),
    [
        (False, {"variant": "dora"}, r"has a magnitude \(DoRA\)"),
        (False, {"modules_to_save": ["lm_head"]}, r"lm_head is trained whole \(modules_to_save\)"),
        (True, {"targets": ["lm_head"]}, "lm_head shares its matrix with model.embed_tokens"),
        (True, {"targets": ["embed_tokens"]}, "model.embed_tokens shares its matrix with lm_head"),
    ],
)
def test_what_llama_cpp_cannot_add_is_refused(tmp_path: Path, tied: bool, spec: dict[str, Any], message: str) -> None:
    adapter = adapted(tmp_path, tied=tied, **spec)
    with pytest.raises(AdapterError, match=message) as caught:
        export(str(adapter), to="gguf-adapter", out=tmp_path / "out")
    assert "Export the merged model: --to gguf" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", [*SPECS, {"variant": "dora", "targets": ["q_proj", "up_proj"]}])
def test_mlx_and_back(tmp_path: Path, spec: dict[str, Any]) -> None:
    """What mlx-lm computes from the file, y = x W^T + scale (x a) b, is what was trained; and it is read back as that."""
    adapter = adapted(tmp_path, tied=False, **spec)
    (verified,) = export(str(adapter), to="mlx", out=tmp_path / "mlx", data=row_file(tmp_path), verify=True).verification
    assert verified.by == "luthier's reader"
    assert verified.passed
    settings = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert settings["fine_tune_type"] == ("dora" if spec.get("variant") == "dora" else "lora")
    assert settings["num_layers"] == 2
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    model = ours(tmp_path)
    for name in {key.rpartition(".")[0] for key in tensors}:
        delta = settings["lora_parameters"]["scale"] * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
        expected = delta_of(model, name)
        linear = isinstance(model.get_submodule(name), LowRankLinear)
        assert torch.allclose(delta.T if linear else delta, expected if linear else expected.T, atol=1e-5), name
    back = open_subject(str(tmp_path / "mlx"))
    assert relative(logits(back.model), logits(model)) <= 1e-5
    export(str(tmp_path / "mlx"), to="peft", out=tmp_path / "peft")
    assert relative(logits(with_peft(tmp_path / "model", tmp_path / "peft")), logits(model)) <= 1e-4


def test_an_adapter_of_mlx_lm_is_read(tmp_path: Path) -> None:
    """Made by hand as mlx-lm writes it: the last layer only, its own names and orientation."""
    folder = tmp_path / "mlx"
    folder.mkdir()
    write_tiny(tmp_path / "model", "llama")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 3, generator=generator), torch.randn(3, 64, generator=generator)
    name = "model.layers.1.self_attn.q_proj"
    save_file({f"{name}.lora_a": a, f"{name}.lora_b": b}, folder / "adapters.safetensors")
    parameters = {"rank": 3, "scale": 0.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    settings = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"does not name one\. Give it with --model"):
        open_subject(str(folder))
    subject = open_subject(str(folder), base_model=str(tmp_path / "model"))
    assert torch.allclose(delta_of(subject.model, name), 0.5 * (a @ b).T, atol=1e-5)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"fine_tune_type": "full"}))
    with pytest.raises(AdapterError, match="read as lora or dora"):
        open_subject(str(folder), base_model=str(tmp_path / "model"))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({f"{name}.lora_a": a, "model.layers.9.x.lora_a": b}, folder / "adapters.safetensors")
    with pytest.raises(AdapterError) as caught:
        open_subject(str(folder), base_model=str(tmp_path / "model"))
    assert "model.layers.9.x is not a layer of the model" in str(caught.value)
    assert f"{name}.lora_b is missing" in str(caught.value)
    save_file({f"{name}.lora_a": a[0, 0].clone(), f"{name}.lora_b": b[0]}, folder / "adapters.safetensors")
    with pytest.raises(AdapterError, match=r"q_proj.lora_a has shape \(\), where 2 dimensions are expected"):
        open_subject(str(folder), base_model=str(tmp_path / "model"))


def test_an_mlx_folder_remembers_its_base(tmp_path: Path) -> None:
    """Trained on NF4, it is read back on NF4, and another base is refused; without a record nothing is claimed of the base."""
    quantize(str(write_tiny(tmp_path / "plain", "llama")), tmp_path / "nf4", nf4=NF4Options())
    adapter = adapted(tmp_path, model=tmp_path / "nf4")
    export(str(adapter), to="mlx", out=tmp_path / "mlx", data=row_file(tmp_path), verify=True)
    back = open_subject(str(tmp_path / "mlx"), base_model=str(tmp_path / "plain"))
    assert {layer.matrix.kind for layer in low_rank_layers(back.model).values()} >= {"nf4"}
    assert back.base_note is not None
    assert "trained on the base in NF4" in back.base_note
    other = shutil.copytree(tmp_path / "plain", tmp_path / "other")
    weights = {name: -tensor for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="more than rounding to"):
        open_subject(str(tmp_path / "mlx"), base_model=str(other))
    (tmp_path / "mlx" / "luthier_base.json").unlink()
    blocks = write_gguf(tmp_path / "blocks.gguf", random_model("llama"), "llama", Kind.Q4_1)
    unknown = open_subject(str(tmp_path / "mlx"), base_model=str(blocks))
    assert unknown.base_note is not None
    assert "What the adapter was trained on is not recorded" in unknown.base_note


def test_what_is_wrong_with_an_adapter_of_mlx_lm_is_said_of_its_own_files(tmp_path: Path) -> None:
    """Not of the copy in another layout that is made of it."""
    export(str(adapted(tmp_path)), to="mlx", out=tmp_path / "mlx", rows=0)
    settings = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    for key, value in (("scale", 0), ("scale", -1.0), ("dropout", 7)):
        changed = settings | {"lora_parameters": settings["lora_parameters"] | {key: value}}
        (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(AdapterError, match=r"scale must be above 0, dropout at least 0 and below 1; .*mlx/adapter_config"):
            open_subject(str(tmp_path / "mlx"))
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    first = min(tensors)
    save_file({**tensors, first: tensors[first].int()}, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(AdapterError, match=f"{first} is int32"):
        open_subject(str(tmp_path / "mlx"))
    tensors[first][0, 0] = float("nan")
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(NumericError, match=f"mlx/adapters.safetensors must be finite; NaN or Inf in:\n  - {first}"):
        open_subject(str(tmp_path / "mlx"))


def test_half_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    adapter = adapted(tmp_path)
    settings = adapter / "adapter_config.json"
    settings.write_text("[1]")
    with pytest.raises(AdapterError, match=r"adapter_config\.json must hold one JSON object\. Copy the adapter again"):
        open_subject(str(adapter))
    settings.unlink()
    with pytest.raises(AdapterError, match=r"beside its weights; .* has adapter_model\.safetensors alone"):
        open_subject(str(adapter))
    for name in ("z" * 300, "~nobody-here/x"):
        with pytest.raises(ConfigError, match="a model's name must lead to something readable"):
            open_subject(name)


@pytest.mark.parametrize(
    ("family", "tied", "spec", "message"),
    [
        ("gpt2", None, {}, "the layers of gpt2, which it calls otherwise"),
        ("llama", False, {"modules_to_save": ["lm_head"]}, "lm_head trained whole"),
        ("llama", False, {"variant": "dora", "targets": ["embed_tokens"]}, "the magnitude of model.embed_tokens"),
        ("llama", True, {"targets": ["embed_tokens"]}, "a term on model.embed_tokens alone"),
    ],
)
def test_what_mlx_lm_cannot_hold_is_refused(
    tmp_path: Path, family: str, tied: bool | None, spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        export(str(adapted(tmp_path, family, tied=tied, **spec)), to="mlx", out=tmp_path / "out")


@pytest.mark.parametrize("spec", [*SPECS[:4], {"variant": "dora"}, {"modules_to_save": ["lm_head"]}])
def test_peft_opens_every_variant(tmp_path: Path, spec: dict[str, Any]) -> None:
    adapter = adapted(tmp_path, tied=False, **spec)
    report = export(str(adapter), to="peft", out=tmp_path / "out", data=row_file(tmp_path), verify=True)
    (verified,) = report.verification
    assert verified.by.startswith("PEFT")
    assert verified.difference.largest_logits_error <= 1e-4
    assert set(report.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "luthier_base.json"}
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    model, _ = luthier.load(str(tmp_path / "model"))
    load_adapter(model, tmp_path / "out")
    assert torch.equal(logits(model), logits(ours(tmp_path)))
    assert "PeftModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()


def test_what_an_adapter_was_trained_on_is_said(tmp_path: Path) -> None:
    """On other weights than those it was trained on an adapter computes something else."""
    plain_base = adapted(tmp_path / "plain")
    assert export(str(plain_base), to="peft", out=tmp_path / "plain" / "out").notes == []
    quantize(str(tmp_path / "plain" / "model"), tmp_path / "nf4", nf4=NF4Options(double_quant=False))
    export(str(adapted(tmp_path / "qlora", model=tmp_path / "nf4")), to="peft", out=tmp_path / "qlora" / "out")
    assert "bnb_4bit_use_double_quant=False" in (tmp_path / "qlora" / "out" / "README.md").read_text()
    blocks = write_gguf(tmp_path / "blocks.gguf", random_model("llama"), "llama", Kind.Q4_1)
    (note,) = export(str(adapted(tmp_path / "asis", model=blocks)), to="gguf-adapter", out=tmp_path / "asis" / "out").notes
    assert "trained on the blocks of blocks.gguf (q4_1)" in note
