"""Quantise while loading, folders of bitsandbytes both ways, the cache, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_tokenizer, write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from luthier.adapters import AdapterSpec, attach, load_adapter, save_adapter, train_everything
from luthier.config import NF4Options
from luthier.errors import AdapterError, ConfigError, ModelError, PreflightError
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.matrices import DenseMatrix, GGUFMatrix, NF4Matrix
from luthier.models import load as load_module
from luthier.models.cache import discard, is_whole, seal
from luthier.models.load import check_finite, fingerprint, load
from luthier.models.quantize import quantize

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def assert_same_logits(first: Any, second: Any, tolerance: float = 1e-5) -> None:
    actual, expected = logits(first), logits(second)
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def exact(theirs: Any) -> Any:
    """Keeps bitsandbytes from repacking its weights for a faster product in bfloat16, which it does in evaluation mode."""
    from bitsandbytes.nn import Linear4bit

    for module in theirs.modules():
        if isinstance(module, Linear4bit):
            module.train()
    return theirs


def write_whole_blocks(folder: Path, family: str, dtype: torch.dtype) -> Path:
    """A tiny model whose rows are whole blocks of 64: on CPUs bitsandbytes 0.50 gives wrong numbers for some other lengths."""
    if family == "gpt2":
        return write_tiny(folder, family, dtype=dtype)
    random_model(family, intermediate_size=128).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def matrices(model: Any) -> dict[str, Any]:
    return {
        name: module.matrix for name, module in model.named_modules() if isinstance(module, (LowRankLinear, LowRankEmbedding))
    }


def with_rounded_weights(folder: Path, model: Any) -> Any:
    """The plain Transformers model of `folder` with the weights that `model` holds."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, matrix in matrices(model).items():
        layer, values = plain.get_submodule(name), matrix.dequantize()
        layer.weight.data.copy_(values.T if isinstance(layer, Conv1D) else values)
    return plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("double", [True, False])
def test_every_family_is_quantized_while_loading(tmp_path: Path, family: str, double: bool) -> None:
    folder = write_tiny(tmp_path / "model", family, dtype=torch.bfloat16)
    model, _ = load(str(folder), base="nf4", nf4=NF4Options(double_quant=double))
    plain = load(str(folder)).model
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for name, matrix in matrices(model).items():
        original = plain.get_submodule(name).matrix
        if matrix in (head.matrix, embedding.matrix):
            assert isinstance(matrix, DenseMatrix)
            assert torch.equal(matrix.weight, original.weight)
        else:
            assert isinstance(matrix, NF4Matrix)
            assert matrix.double_quant == double
            assert matrix.dtype == torch.bfloat16
            expected = NF4Matrix.quantize(original.oriented(), double=double)
            assert torch.equal(matrix.dequantize(), expected.dequantize()), name
    assert_same_logits(model, with_rounded_weights(folder, model))


def test_skip_modules_stay_as_they_are(tiny_llama: Path) -> None:
    model, _ = load(str(tiny_llama), base="nf4", nf4=NF4Options(skip_modules=("down_proj", "layers.1.self_attn")))
    kept = sorted(name for name, matrix in matrices(model).items() if isinstance(matrix, DenseMatrix))
    assert kept == sorted(
        ["lm_head", "model.embed_tokens"]
        + [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
        + [f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"]
    )
    with pytest.raises(ConfigError, match=r"every entry of skip_modules must match a linear layer:\n.*'up_porj' .*'up_proj'"):
        load(str(tiny_llama), base="nf4", nf4=NF4Options(skip_modules=("up_porj",)))


def test_an_unknown_storage_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="base storage is one of f32, bf16, f16, nf4, asis; got 'nf5'"):
        load(str(tiny_llama), base="nf5")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    folder = write_tiny(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreflightError, match=rf"finite; model\.layers\.1\.mlp\.up_proj\.weight: .*got {value} at \[3, 4\]"):
        load(str(folder), base="nf4")
    with pytest.raises(PreflightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: 1 of 6144 values"):
        check_finite(load(str(folder)).model)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_nothing_is_written_of_a_model_that_is_not_finite(tmp_path: Path, name: str) -> None:
    """The weights that are not quantised are looked at too."""
    folder = write_tiny(tmp_path / "model", tied=False)
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[7] = float("inf")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PreflightError, match=rf"the base weights must be finite; NaN or Inf in:\n  - {re.escape(name)}: 1 of"):
        quantize(str(folder), tmp_path / "nf4", nf4=NF4Options())
    assert not (tmp_path / "nf4").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("double", [True, False])
def test_a_written_folder_opens_in_bitsandbytes_and_here(tmp_path: Path, family: str, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    folder = write_whole_blocks(tmp_path / "model", family, torch.bfloat16)
    skipped = {"gpt2": "c_proj"}.get(family, "v_proj")
    report = quantize(str(folder), tmp_path / "nf4", nf4=NF4Options(double_quant=double, skip_modules=(skipped,)))
    ours, tokenizer = load(report.folder)
    assert report.quantized == sum(isinstance(matrix, NF4Matrix) for matrix in matrices(ours).values())
    assert any(name.endswith(skipped) for name in report.kept)
    assert_same_logits(ours, load(str(folder), base="nf4", nf4=NF4Options(double, (skipped,))).model, 1e-6)
    assert (
        tokenizer.chat_template == AutoTokenizer.from_pretrained(report.folder).chat_template == tiny_tokenizer().chat_template
    )

    theirs = AutoModelForCausalLM.from_pretrained(report.folder, device_map={"": "cpu"})
    assert theirs.dtype == torch.bfloat16
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layers = {name: module for name, module in theirs.named_modules() if isinstance(module, Linear4bit)}
    assert sorted(layers) == sorted(name for name, matrix in matrices(ours).items() if isinstance(matrix, NF4Matrix))
    for name, layer in layers.items():
        weight = dequantize_4bit(layer.weight, layer.weight.quant_state)
        assert torch.equal(weight, matrices(ours)[name].dequantize(weight.dtype)), name
    assert_same_logits(exact(theirs), ours, 2e-2)  # in bfloat16, as the folder says


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_of_bitsandbytes_opens_here(tmp_path: Path, family: str, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder = write_whole_blocks(tmp_path / "model", family, torch.float32)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map={"": "cpu"}, dtype=torch.float32
    )
    exact(theirs).save_pretrained(tmp_path / "theirs")
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    model, _ = load(str(tmp_path / "theirs"))
    assert any(isinstance(matrix, NF4Matrix) for matrix in matrices(model).values())
    assert_same_logits(model, theirs)
    assert_same_logits(model, load(str(folder), base="nf4", nf4=NF4Options(double_quant=double)).model, 1e-6)
    wide, _ = load(str(tmp_path / "theirs"), base="f32")
    assert all(isinstance(matrix, DenseMatrix) for matrix in matrices(wide).values())
    assert_same_logits(wide, model)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ("nf4", "'nf4'"),
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path: Path, settings: object, named: str) -> None:
    folder = write_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=rf"must be bitsandbytes nf4 or a GGUF file; these are {named}\. Use the original"):
        load(str(folder))


def test_damaged_parts_are_all_named(tmp_path: Path, tiny_llama: Path) -> None:
    report = quantize(str(tiny_llama), tmp_path / "nf4", nf4=NF4Options())
    state = load_file(Path(report.folder) / "model.safetensors")
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    del state[f"{first}.absmax"]
    state[f"{second}.absmax"] = state[f"{second}.absmax"][:-1]
    state["model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__fp4"] = torch.zeros(1, dtype=torch.uint8)
    save_file(state, Path(report.folder) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(report.folder)
    message = str(caught.value)
    assert f"{first}: an nf4 matrix is stored in several tensors; missing: weight.absmax" in message
    assert f"{second}: absmax must have shape" in message
    assert "model.layers.0.mlp.down_proj.weight is stored as fp4" in message


def test_the_cache_is_keyed_by_content_and_mapped_the_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny(tmp_path / "model")
    options = NF4Options(cache=True)
    first, _ = load(str(folder), base="nf4", nf4=options)
    assert len(list((tmp_path / "cache" / "nf4").iterdir())) == 1

    def fail(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("quantised again")

    with monkeypatch.context() as patch:
        patch.setattr(NF4Matrix, "quantize", fail)
        again, _ = load(str(folder), base="nf4", nf4=options)
    assert_same_logits(again, first, 0.0)
    assert fingerprint(again) == fingerprint(first)
    load(str(folder), base="nf4", nf4=NF4Options(cache=True, double_quant=False))
    assert len(list((tmp_path / "cache" / "nf4").iterdir())) == 2
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    changed, _ = load(str(folder), base="nf4", nf4=options)
    assert len(list((tmp_path / "cache" / "nf4").iterdir())) == 3
    assert not torch.equal(logits(changed), logits(first))


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def _flip_a_code(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _forge(file: Path) -> None:
    """Weights of another model under a seal that fits them."""
    state = {key: value for key, value in load_file(file).items() if key.startswith("model.layers.0.mlp.up_proj.weight")}
    save_file({key.replace("up_proj", "no_proj"): value for key, value in state.items()}, file)
    seal(file.parent)


def _forge_garbage(file: Path) -> None:
    file.write_bytes(b"garbage")
    seal(file.parent)


@pytest.mark.parametrize("damage", [_cut_short, _flip_a_code, Path.unlink, _forge, _forge_garbage])
def test_a_damaged_cache_is_removed_and_made_again(tmp_path: Path, tiny_llama: Path, damage: Callable[[Path], None]) -> None:
    options = NF4Options(cache=True)
    first = load(str(tiny_llama), base="nf4", nf4=options).model
    (kept,) = (tmp_path / "cache" / "nf4").iterdir()
    damage(kept / "model.safetensors")
    loaded = load(str(tiny_llama), base="nf4", nf4=options)
    assert loaded.notes == [f"The quantized weights kept in {kept} were damaged; they are removed and made again."]
    assert_same_logits(loaded.model, first, 0.0)
    again = load(str(tiny_llama), base="nf4", nf4=options)
    assert again.notes == []
    assert_same_logits(again.model, first, 0.0)


def test_a_cache_that_cannot_be_written_to_is_read(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = NF4Options(cache=True)
    first = load(str(tiny_llama), base="nf4", nf4=options).model
    monkeypatch.setattr("luthier.models.cache.os.access", lambda *_: False)
    monkeypatch.setattr(NF4Matrix, "quantize", lambda *_args, **_keys: pytest.fail("quantised again"))
    assert_same_logits(load(str(tiny_llama), base="nf4", nf4=options).model, first, 0.0)
    with pytest.raises(PreflightError, match=r"the cache must be a folder that can be written to; .*/cache/nf4 is not\. Set"):
        load(str(tiny_llama), base="nf4", nf4=NF4Options(cache=True, double_quant=False))


def test_a_file_in_place_of_the_cached_folder_is_removed(tmp_path: Path, tiny_llama: Path) -> None:
    load(str(tiny_llama), base="nf4", nf4=NF4Options(cache=True))
    (kept,) = (tmp_path / "cache" / "nf4").iterdir()
    discard(kept)
    kept.write_text("garbage")
    assert "were damaged" in load(str(tiny_llama), base="nf4", nf4=NF4Options(cache=True)).notes[0]
    assert is_whole(kept)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_gguf_file_goes_to_nf4_with_its_embedding_in_blocks(tmp_path: Path, family: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model(family), family, Kind.Q8_0)
    asis, nf4 = load(str(path)).model, load(str(path), base="nf4", nf4=NF4Options(cache=True)).model
    for name, matrix in matrices(nf4).items():
        own = asis.get_submodule(name).matrix
        assert isinstance(own, GGUFMatrix)
        if matrix in (nf4.get_input_embeddings().matrix, nf4.get_output_embeddings().matrix):
            assert torch.equal(matrix.weight, own.weight)
        else:
            assert torch.equal(matrix.dequantize(), NF4Matrix.quantize(own.dequantize()).dequantize())
    assert_same_logits(load(str(path), base="nf4", nf4=NF4Options(cache=True)).model, nf4, 0.0)
    report = quantize(str(path), tmp_path / "folder", nf4=NF4Options())
    assert_same_logits(load(report.folder).model, nf4)
    with safe_open(Path(report.folder) / "model.safetensors", "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "F32"


def test_progress_is_told_in_bytes(tiny_llama: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    load(str(tiny_llama), base="nf4", progress=lambda *call: calls.append(call))
    assert {stage for stage, _, _ in calls} == {"quantizing"}
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == calls[-1][2]


def test_large_models_are_written_in_shards(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.models.quantize.SHARD_BYTES", 30_000)
    report = quantize(str(tiny_llama), tmp_path / "nf4", nf4=NF4Options())
    weight_map = json.loads((Path(report.folder) / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 3
    for name, file in weight_map.items():
        assert weight_map[name.partition(".weight.")[0] + ".weight" if ".weight." in name else name] == file
    assert_same_logits(load(report.folder).model, load(str(tiny_llama), base="nf4").model, 0.0)
    with pytest.raises(ConfigError, match="a quantized model goes to a new folder"):
        quantize(str(tiny_llama), tmp_path / "nf4", nf4=NF4Options())


@pytest.mark.parametrize("storage", ["nf4", "gguf"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapters_on_blocks(tmp_path: Path, tiny_llama: Path, storage: str, variant: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", Kind.Q4_1) if storage == "gguf" else tiny_llama
    base = "nf4" if storage == "nf4" else None
    model = load(str(path), base=base).model
    before = logits(model)
    spec = AdapterSpec(rank=4, variant=variant, targets=["q_proj", "down_proj", "embed_tokens"])
    attach(model, spec, seed=0)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter", base_name=str(path))
    again = load(str(path), base=base).model
    load_adapter(again, tmp_path / "adapter")
    assert_same_logits(again, model, 1e-6)


def test_an_adapter_for_nf4_goes_on_the_same_base_in_16_bits_with_a_note(tmp_path: Path, tiny_llama: Path) -> None:
    model = load(str(tiny_llama), base="nf4").model
    attach(model, AdapterSpec(rank=4), seed=0)
    save_adapter(model, tmp_path / "adapter")
    notes = load_adapter(load(str(tiny_llama), base="bf16").model, tmp_path / "adapter").notes
    assert any("trained on weights stored in f32 and nf4, here they are in bf16" in note for note in notes)
    other = write_tiny(tmp_path / "other", dtype=torch.float32)
    state = {name: torch.randn_like(tensor) for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="more than rounding to"):
        load_adapter(load(str(other)).model, tmp_path / "adapter")


def test_training_every_weight_refuses_nf4_and_widens_blocks(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(AdapterError, match=r"14 matrices are stored in nf4.*--method qlora"):
        train_everything(load(str(tiny_llama), base="nf4").model)
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", Kind.Q8_0)
    model = load(str(path)).model
    before = logits(model)
    train_everything(model)
    assert all(isinstance(matrix, DenseMatrix) for matrix in matrices(model).values())
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


def test_scales_of_blocks_are_checked(tmp_path: Path, tiny_llama: Path) -> None:
    model = load(str(tiny_llama), base="nf4").model
    check_finite(model)
    model.model.layers[0].mlp.up_proj.matrix.nested_absmax[0] = float("nan")
    with pytest.raises(PreflightError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: 6144 of 6144 values"):
        check_finite(model)


def test_quantized_models_generate(tiny_llama: Path) -> None:
    model, tokenizer = load_module.load(str(tiny_llama), base="nf4")
    ids = tokenizer("The quick brown", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), with_rounded_weights(tiny_llama, model).generate(ids, **options))
