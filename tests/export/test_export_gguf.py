"""`--to gguf`: the file is read by our own reader with equal logits, and by gguf's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exporting import adapted, logits, ours, relative, row_file
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf
from tiny import CHATML, tiny_tokenizer

import luthier
from luthier.adapters import AdapterSpec, attach, load_adapter, save_adapter
from luthier.errors import ConfigError, ModelError
from luthier.export.export import export
from luthier.export.gguf_settings import gguf_settings
from luthier.export.report import ExportReport
from luthier.models.gguf_file import read_gguf

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
# Largest logits error over the largest logit on these random models, whose weights are wide: no trained model is so bad.
BOUNDS = {"f32": 1e-4, "f16": 1e-2, "bf16": 4e-2, "q8_0": 5e-2, "q6_k": 0.1, "q4_1": 0.5, "q4_k": 0.5, "q4_0": 0.6}


def write_source(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny model whose configuration GGUF files can say: the tiny Gemmas' query scale is not."""
    from tiny import tiny_model

    model = random_model(family, **changes) if family != "mistral" else tiny_model("mistral")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def gguf_of(report: ExportReport) -> Path:
    return Path(report.out) / next(name for name in report.files if name.endswith(".gguf"))


def ids_within(length: int) -> torch.Tensor:
    return torch.arange(3, 3 + length)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_back_with_equal_logits(tmp_path: Path, family: str) -> None:
    layers = {"num_hidden_layers": 7} if family == "gemma3" else {}
    model = write_source(tmp_path / "model", family, **layers)
    adapter = adapted(tmp_path, model=model)
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype="f32", rows=0)
    loaded = luthier.load(str(gguf_of(report)))
    ids = ids_within(30)
    with torch.no_grad():
        got, expected = loaded.model(input_ids=ids).logits, ours(tmp_path)(input_ids=ids).logits
    assert relative(got, expected) <= 1e-4
    assert loaded.tokenizer.chat_template == CHATML
    assert loaded.tokenizer.eos_token_id == 2
    reader = gguf.GGUFReader(gguf_of(report))
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "blk.1.attn_output.weight"} <= names
    assert ("output.weight" in names) == (not report.tied)
    assert reader.get_field("general.type").contents() == "model"


@pytest.mark.parametrize("kind", list(BOUNDS))
def test_every_type_is_read_within_its_error(tmp_path: Path, kind: str) -> None:
    """Rows of 256, so that K-quants fit; each tensor equals what gguf's own dequantizer makes of the file."""
    write_source(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512)
    adapter = adapted(tmp_path, model=tmp_path / "model")
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype=kind, rows=0)
    loaded = luthier.load(str(gguf_of(report)))
    error = relative(logits(loaded.model), logits(ours(tmp_path)))
    assert error <= BOUNDS[kind]
    reader = gguf.GGUFReader(gguf_of(report))
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    assert tensor.tensor_type == Kind[kind.upper()]
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(loaded.model.model.layers[0].mlp.up_proj.matrix.dequantize().numpy(), read.astype(np.float32))
    output = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    assert output.tensor_type == (Kind.Q6_K if kind.startswith("q4") else Kind[kind.upper()])


def test_rows_that_a_type_does_not_divide_go_to_llama_cpps_fallback(tmp_path: Path) -> None:
    adapter = adapted(tmp_path, model=write_source(tmp_path / "model", "llama"))
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype="q4_k", rows=0)
    assert report.kinds["Q5_0"] == 13 + 2
    assert report.kinds["Q8_0"] == 1
    assert any(
        "Blocks of Q4_K do not divide the rows of 15 matrices: these are stored as Q5_0." in note for note in report.notes
    )
    assert relative(logits(luthier.load(str(gguf_of(report))).model), logits(ours(tmp_path))) <= 0.5


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_tied_matrices_are_untied_where_one_is_adapted(tmp_path: Path, target: str) -> None:
    model = write_source(tmp_path / "model", "llama", tie_word_embeddings=True)
    adapter = adapted(tmp_path, model=model, targets=["q_proj", target])
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype="f32", rows=0)
    assert not report.tied
    assert relative(logits(luthier.load(str(gguf_of(report))).model), logits(ours(tmp_path))) <= 1e-4


def test_gemma2_cannot_be_untied(tmp_path: Path) -> None:
    adapter = adapted(tmp_path, model=write_source(tmp_path / "model", "gemma2"), targets=["lm_head"])
    with pytest.raises(ModelError, match="one matrix for gemma2's head and embedding"):
        export(str(adapter), to="gguf", out=tmp_path / "out", rows=0)
    assert not (tmp_path / "out").exists()


def asis_adapter(tmp_path: Path, kind: Kind, **spec: Any) -> tuple[Path, Path]:
    """A GGUF base, and an adapter on its blocks as they are."""
    base = write_gguf(tmp_path / "base.gguf", random_model("llama", hidden_size=256, intermediate_size=256), "llama", kind)
    model, _ = luthier.load(str(base))
    attach(model, AdapterSpec(rank=4, **spec), seed=1)
    from peft_pair import randomize

    from luthier.adapters import trainable_parameters

    with torch.no_grad():
        randomize([parameter for _, parameter in trainable_parameters(model)])
    return base, save_adapter(model, tmp_path / "adapter", base_name=str(base))


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0])
def test_blocks_of_a_gguf_base_that_nothing_changes_stay_as_they_are(tmp_path: Path, kind: Kind) -> None:
    base, adapter = asis_adapter(tmp_path, kind, targets=["up_proj"])
    rows = row_file(tmp_path)
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype="asis", data=rows, rows=2, verify=True)
    before, after = read_gguf(base), read_gguf(gguf_of(report))
    assert set(before.tensors) == set(after.tensors)
    for name, tensor in before.tensors.items():
        same = np.array_equal(before.data(tensor, mapped=False), after.data(after.tensors[name], mapped=False))
        assert same == ("ffn_up" not in name), name
        assert after.tensors[name].kind == (tensor.kind if same else Kind.Q8_0)
    assert {key: value for key, value in before.metadata.items() if key.startswith("tokenizer.")} == {
        key: value for key, value in after.metadata.items() if key.startswith("tokenizer.")
    }
    model, _ = luthier.load(str(base))
    load_adapter(model, adapter)
    assert relative(logits(luthier.load(str(gguf_of(report))).model), logits(model)) <= 0.05


def test_a_small_change_is_lost_on_the_grid_it_came_from_and_kept_asis(tmp_path: Path) -> None:
    """A tenth of a step of Q4_1 put back into Q4_1 is rounded away; in q8_0, which asis takes, it is not."""
    base = write_gguf(tmp_path / "base.gguf", random_model("llama"), "llama", Kind.Q4_1)
    model, _ = luthier.load(str(base))
    attach(model, AdapterSpec(rank=4, targets=["up_proj"]), seed=1)
    layer = model.model.layers[0].mlp.up_proj
    stored, term = layer.matrix.dequantize(), layer.terms["default"]
    with torch.no_grad():
        term.lora_B.normal_(generator=torch.Generator().manual_seed(2))
        term.lora_B *= 0.007 * stored.abs().max() / term.delta().std()
    change = term.delta().detach()
    save_adapter(model, tmp_path / "adapter", base_name=str(base))
    lost = {}
    for kind in ("q4_1", "asis"):
        report = export(str(tmp_path / "adapter"), to="gguf", out=tmp_path / kind, dtype=kind, rows=0)
        written = luthier.load(str(gguf_of(report))).model.model.layers[0].mlp.up_proj.matrix.dequantize()
        lost[kind] = float((written - stored - change).norm() / change.norm())
    assert lost["q4_1"] > 0.8
    assert lost["asis"] < 0.4


def test_a_form_that_is_not_as_good_is_told(tmp_path: Path) -> None:
    adapter = adapted(tmp_path, model=write_source(tmp_path / "model", "llama"))
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype="q4_0", data=row_file(tmp_path))
    assert any(note.startswith("This form is not as good as what was trained: it writes the same") for note in report.notes)
    assert report.recommended is not None
    assert report.recommended.choice.kind in ("f16", "q8_0")


def test_asis_needs_blocks(tmp_path: Path) -> None:
    from tiny_runs import tiny_config

    from luthier.training.run import train

    run = train(tiny_config(write_source(tmp_path / "model", "llama"), tmp_path, method="qlora", steps=2)).run_dir
    with pytest.raises(ConfigError, match="keeps the blocks of a GGUF base; this one is in nf4"):
        export(run, to="gguf", out=tmp_path / "out", dtype="asis", rows=0)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "partial": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "linear"), ("llama", "llama3"), ("qwen2", "yarn"), ("phi3", "longrope"), ("phi3", "partial")]
)
def test_rotary_settings_are_read_back(tmp_path: Path, family: str, kind: str) -> None:
    changes: dict[str, Any] = {"rope_parameters": ROPES[kind]}
    if kind == "longrope":
        changes["original_max_position_embeddings"] = 128
    model = write_source(tmp_path / "model", family, **changes)
    report = export(str(model), to="gguf", out=tmp_path / "out", dtype="f32", rows=0)
    loaded, before = luthier.load(str(gguf_of(report))).model, luthier.load(str(model)).model
    assert relative(logits(loaded), logits(before)) <= 1e-4


def test_settings_that_no_file_can_say_are_all_named(tmp_path: Path) -> None:
    model = luthier.load(str(write_source(tmp_path / "model", "qwen3", attention_bias=True))).model
    model.config.hidden_act = "gelu"
    model.config.rope_parameters = {"rope_type": "proportional", "rope_theta": 1e4}
    with pytest.raises(ModelError) as caught:
        gguf_settings(model)
    for named in ("the activation gelu", "biases of k_proj, o_proj, q_proj, v_proj", "rotary scaling of type proportional"):
        assert named in str(caught.value)
    gpt2 = adapted(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ModelError, match="GGUF files are written for llama, mistral"):
        export(str(gpt2), to="gguf", out=tmp_path / "out", rows=0)


def test_a_modelfile_and_a_card_stand_beside_the_file(tmp_path: Path) -> None:
    adapter = adapted(tmp_path, model=write_source(tmp_path / "model", "llama"))
    report = export(str(adapter), to="gguf", out=tmp_path / "out", dtype="q8_0", data=row_file(tmp_path), verify=True)
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert f"FROM ./{gguf_of(report).name}" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n" in text
    assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n' in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-cli -m adapter-q8_0.gguf" in card
    assert "What merging costs" in card
    assert report.verification[0].by == "luthier's reader"
    measured = next(one for one in report.measured if one.choice.kind == "q8_0")
    assert report.verification[0].difference.loss == pytest.approx(measured.difference.loss, rel=1e-4)
    assert json.dumps(report.to_json())
