"""`--to merged`: the folder opens in plain Transformers and computes what base and adapter did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import adapted, logits, ours, relative, row_file
from gguf_tiny import random_model
from peft_pair import plain
from safetensors import safe_open
from tiny import FAMILIES, tiny_tokenizer, write_tiny
from tiny_runs import tiny_config
from transformers import AutoTokenizer

import luthier
from luthier.adapters import load_adapter
from luthier.errors import AdapterError, ConfigError, ModelError, NumericError
from luthier.export import merged_folder
from luthier.export.export import export
from luthier.export.merge import Merge
from luthier.training.run import train

HEAD, EMBEDDING = "lm_head", "embed_tokens"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_in_transformers_with_equal_logits(tmp_path: Path, family: str) -> None:
    adapter = adapted(tmp_path, family)
    report = export(str(adapter), to="merged", out=tmp_path / "out", dtype="f32", rows=0)
    model = plain(tmp_path / "out")
    expected = logits(ours(tmp_path))
    assert relative(logits(model), expected) <= 1e-4
    assert relative(logits(plain(tmp_path / "model")), expected) > 1e-2
    assert report.tied == model.config.tie_word_embeddings == plain(tmp_path / "model").config.tie_word_embeddings
    assert report.measured == []
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path / "model").chat_template
    assert tokenizer("Nina Simone").input_ids == AutoTokenizer.from_pretrained(tmp_path / "model")("Nina Simone").input_ids


@pytest.mark.parametrize(
    "spec",
    [
        {"variant": "dora"},
        {"variant": "rslora", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"variant": "rsdora", "targets": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head", "model.norm"]},
        {"targets": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_every_variant_merges(tmp_path: Path, spec: dict[str, Any]) -> None:
    tied = "ensure_weight_tying" in spec
    adapter = adapted(tmp_path, tied=tied, **spec)
    report = export(str(adapter), to="merged", out=tmp_path / "out", dtype="f32", rows=0)
    assert relative(logits(plain(tmp_path / "out")), logits(ours(tmp_path))) <= 1e-4
    assert report.tied == tied


@pytest.mark.parametrize("target", [HEAD, EMBEDDING])
def test_a_term_on_one_of_two_tied_matrices_unties_them(tmp_path: Path, target: str) -> None:
    """A merged head must not change the embedding, nor the other way round."""
    adapter = adapted(tmp_path, tied=True, targets=["q_proj", target])
    report = export(str(adapter), to="merged", out=tmp_path / "out", dtype="f32", rows=0)
    assert not report.tied
    assert any("untied" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    merged, before = plain(tmp_path / "out"), plain(tmp_path / "model")
    other = "model.embed_tokens.weight" if target == HEAD else "lm_head.weight"
    assert torch.equal(merged.get_parameter(other), before.get_parameter(other))
    assert relative(logits(merged), logits(ours(tmp_path))) <= 1e-4


def test_both_trained_as_one_stay_tied_with_one_tensor_written(tmp_path: Path) -> None:
    adapter = adapted(tmp_path, tied=True, modules_to_save=["lm_head"], targets=["q_proj"], ensure_weight_tying=True)
    assert export(str(adapter), to="merged", out=tmp_path / "out", dtype="f32", rows=0).tied
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 4e-2), ("f16", 5e-3)])
def test_sixteen_bits(tmp_path: Path, kind: str, bound: float) -> None:
    adapter = adapted(tmp_path)
    report = export(str(adapter), to="merged", out=tmp_path / "out", dtype=kind, rows=0)
    assert report.dtype == kind
    model = luthier.load(str(tmp_path / "out")).model
    assert {layer.weight.dtype for layer in [model.lm_head, model.model.layers[0].mlp.up_proj]} == {
        torch.bfloat16 if kind == "bf16" else torch.float16
    }
    assert relative(logits(model), logits(ours(tmp_path))) <= bound


def test_shards_are_cut_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_folder, "SHARD_BYTES", 1 << 17)
    adapter = adapted(tmp_path)
    report = export(str(adapter), to="merged", out=tmp_path / "out", dtype="f32", rows=0)
    shards = [name for name in report.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    assert relative(logits(plain(tmp_path / "out")), logits(ours(tmp_path))) <= 1e-4


def test_nf4_is_written_as_bitsandbytes_reads_it(tmp_path: Path) -> None:
    adapter = adapted(tmp_path)
    report = export(str(adapter), to="merged", out=tmp_path / "out", dtype="nf4", data=row_file(tmp_path), verify=True)
    model = luthier.load(str(tmp_path / "out")).model
    assert model.model.layers[0].mlp.up_proj.matrix.kind == "nf4"
    assert model.lm_head.matrix.kind == "bf16"
    assert relative(logits(model), logits(ours(tmp_path))) <= 0.5
    measured = next(one for one in report.measured if one.choice.kind == "nf4")
    verified, merge = report.verification
    assert merge.against == "the model as trained"
    assert verified.difference.loss == pytest.approx(measured.difference.loss, rel=1e-4)
    assert verified.difference.largest_logits_error <= 1e-4


def test_the_report_says_what_each_choice_costs(tmp_path: Path) -> None:
    """A QLoRA run: merged into the weights trained on nothing is lost in f32, into the original ones the repair is."""
    model = write_tiny(tmp_path / "model", "llama")
    run = Path(train(tiny_config(model, tmp_path, method="qlora", steps=12)).run_dir)
    report = export(str(run), to="merged", out=tmp_path / "out", dtype="f32", verify=True)
    found = {(one.choice.base, one.choice.kind): one for one in report.measured}
    assert set(found) == {
        (base, kind) for base in ("original", "dequantized") for kind in ("f32", "bf16", "nf4", "q8_0", "q4_k")
    }
    exact = found["dequantized", "f32"].difference
    assert exact.largest_logits_error < 1e-4
    assert exact.token_agreement == 1.0
    assert found["original", "f32"].difference.logits_error > 10 * exact.logits_error
    assert found["dequantized", "nf4"].difference.logits_error > 10 * exact.logits_error
    assert report.recommendation is not None
    assert report.verification[0].passed
    assert report.verification[0].by.startswith("Transformers")
    content = report.to_json()
    assert json.loads(json.dumps(content))["recommended"]["loss"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    for needed in ("What merging costs", "| rank | `4` |", "sha256", "AutoModelForCausalLM"):
        assert needed in card


def test_the_original_weights_may_be_merged_into(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "llama")
    run = Path(train(tiny_config(model, tmp_path, method="qlora", steps=6)).run_dir)
    report = export(str(run), to="merged", out=tmp_path / "out", dtype="f32", base="original", rows=4, verify=True)
    assert report.verification[0].against == "the merge in memory"
    loaded, _ = luthier.load(str(model))
    load_adapter(loaded, run / "adapter")
    assert relative(logits(plain(tmp_path / "out")), logits(loaded)) <= 1e-4


def test_a_full_run_and_a_model_are_written_as_they_are(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "qwen3")
    run = Path(train(tiny_config(model, tmp_path, method="full", rank=16, alpha=32, steps=2)).run_dir)
    for target, source in ((run, run / "model"), (model, model)):
        out = tmp_path / f"out-{source.name}-{target.name}"
        export(str(target), to="merged", out=out, dtype="f32", rows=0)
        assert torch.equal(logits(plain(out)), logits(plain(source)))


def test_merging_takes_the_loaded_model_apart_from_its_layers(tmp_path: Path) -> None:
    adapted(tmp_path, variant="dora")
    model = ours(tmp_path)
    before = logits(model)
    merge = Merge(model)
    assert [part.name for part in merge.parts()] == list(plain(tmp_path / "model").state_dict())
    assert len(merge.changed) == 14
    assert torch.equal(logits(model), before)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    adapter = adapted(tmp_path)
    for settings, message in (
        ({"to": "merge"}, "--to is one of merged, gguf, peft, mlx, gguf-adapter; got 'merge'. Did you mean 'merged'?"),
        ({"to": "merged", "dtype": "q8_0"}, "--dtype with --to merged is one of f32, bf16, f16, nf4; got 'q8_0'"),
        ({"to": "peft", "dtype": "f32"}, "--to peft merges none"),
        ({"to": "merged", "base": "nf4"}, "--base is one of original, dequantized"),
        ({"to": "merged", "base_model": "x", "target": tmp_path / "model"}, "a model is its own base"),
        ({"to": "peft", "target": tmp_path / "model"}, "--to peft writes an adapter"),
        ({"to": "merged", "verify": True}, "--verify compares on rows; there are none"),
        ({"to": "merged", "out": adapter}, "an export goes to a new folder"),
    ):
        arguments = {"out": tmp_path / "out", **settings}
        target = str(arguments.pop("target", adapter))
        with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace(".", r"\.")):
            export(target, **arguments)
        assert not (tmp_path / "out").exists()


def test_a_chat_template_whose_name_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    """Each template becomes a file of its name; Transformers refuses such a one, and that is the base's fault."""
    folder = write_tiny(tmp_path / "model", "llama")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "x"}, {"name": "../../escaped", "template": "y"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"must be fit to be saved; Transformers says: Invalid chat template name"):
        export(str(folder), to="merged", out=tmp_path / "a" / "out", rows=0)
    assert not list(tmp_path.rglob("escaped*"))
    assert not list((tmp_path / "a").iterdir())


def test_numbers_beyond_float16_are_named(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "llama")
    loaded, tokenizer = luthier.load(str(model), base="f32")
    weight = loaded.model.layers[0].mlp.up_proj.matrix.weight
    weight.data = weight.data.clone()
    weight.data[0, 0] = 1e6
    with pytest.raises(
        NumericError, match=r"layers\.0\.mlp\.up_proj\.weight: f16 holds numbers up to 65504; the largest is 1e\+06"
    ):
        merged_folder.write_merged(tmp_path, Merge(loaded), tokenizer, "f16")


def test_a_bias_of_a_term_needs_a_bias_to_go_to(tmp_path: Path) -> None:
    from peft_pair import made_by_peft

    write_tiny(tmp_path / "model", "llama")
    made_by_peft(tmp_path / "model", tmp_path / "adapter", r=4, lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"needs a layer with a bias to be merged into"):
        export(str(tmp_path / "adapter"), to="merged", out=tmp_path / "out", rows=0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_memory_holds_a_shard_and_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anonymous memory while merging: what was written is let go, and the base stays mapped."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 4096}
    model = random_model("llama", **sizes)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    del model
    adapted(tmp_path, model=tmp_path / "model")
    trained, tokenizer = ours(tmp_path), luthier.load(str(tmp_path / "model")).tokenizer
    monkeypatch.setattr(merged_folder, "SHARD_BYTES", 2 << 20)
    seen: list[int] = []

    def anonymous(*_: object) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        seen.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))

    (tmp_path / "out").mkdir()
    merge = Merge(trained)
    merge.weight("model.layers.0.mlp.up_proj")
    anonymous()
    written = merged_folder.write_merged(tmp_path / "out", merge, tokenizer, "f32", progress=anonymous)
    largest = 4 * 4096 * 256
    assert written == total > 30_000_000
    assert max(seen) - seen[0] < (2 << 20) + 3 * largest + (6 << 20)
