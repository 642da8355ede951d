"""What is refused when an adapter folder is read or written, and how it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft_pair import logits, ours, randomize, write_model
from safetensors.torch import load_file, save_file

from luthier.adapters import AdapterSpec, attach, load_adapter, save_adapter, trainable_parameters
from luthier.adapters.files import staged_folder
from luthier.errors import AdapterError, LuthierError, NumericError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("refusals") / "model", "llama", False)


@pytest.fixture
def model(folder: Path) -> torch.nn.Module:
    return ours(folder)


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """A saved adapter with one target."""
    model = ours(folder)
    attach(model, AdapterSpec(rank=2, targets=["layers.0.self_attn.q_proj"]), seed=0)
    return save_adapter(model, tmp_path / "adapter", base_name="the/base")


def change_config(adapter: Path, **fields) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def refusal(model: torch.nn.Module, adapter: Path, kind: type[LuthierError] = AdapterError) -> str:
    before = logits(model)
    with pytest.raises(kind) as caught:
        load_adapter(model, adapter)
    assert torch.equal(logits(model), before)
    assert not any("terms" in name for name, _ in model.named_parameters())
    return str(caught.value).replace(str(adapter), "ADAPTER")


EXPRESSIONS = {
    "peft_type is 'IA3'; only 'LORA' is supported": {"peft_type": "IA3"},
    "layer_replication is set: it repeats layers of the base model": {"layer_replication": [[0, 2]]},
    "trainable_token_indices is set: it trains single rows of the embedding (trainable tokens)": {
        "trainable_token_indices": [1]
    },
    "target_parameters is set: it adapts bare parameters, not layers": {"target_parameters": ["experts.down_proj"]},
    "alora_invocation_tokens is set: it starts only after certain tokens (aLoRA)": {"alora_invocation_tokens": [1]},
    "bias is 'all': it trains biases of the base model": {"bias": "all"},
    "init_lora_weights is 'pissa_niter_4': it changed the base weights. Convert it to plain LoRA in PEFT first": {
        "init_lora_weights": "pissa_niter_4"
    },
    "r must be a whole number; got '8'": {"r": "8"},
    "use_dora must be true or false; got 1": {"use_dora": 1},
    "rank_pattern must be a mapping; got [1]": {"rank_pattern": [1]},
    "target_modules must be a list of names or a regular expression; it is missing": {"target_modules": None},
    "'(' must be a regular expression; missing ) at position 1": {"layers_pattern": ["h", "("]},
    "layers_to_transform must be a list of layer numbers or one; got ['a']": {"layers_to_transform": ["a"]},
}


@pytest.mark.parametrize("message", EXPRESSIONS)
def test_what_cannot_be_expressed_is_named(model: torch.nn.Module, adapter: Path, message: str) -> None:
    change_config(adapter, **EXPRESSIONS[message])
    assert (
        refusal(model, adapter)
        == f"the adapter must be a LoRA of linear layers and embeddings; ADAPTER/adapter_config.json:\n  - {message}"
    )


def test_settings_out_of_range(model: torch.nn.Module, adapter: Path) -> None:
    change_config(adapter, r=0)
    assert (
        refusal(model, adapter) == "ADAPTER/adapter_config.json: rank must be a whole number of at least 1; got 0. Try rank=16."
    )


def test_a_field_that_nobody_knows_is_said_and_ignored(model: torch.nn.Module, adapter: Path) -> None:
    change_config(adapter, sparkle=True, dull=None)
    assert load_adapter(model, adapter).notes == [
        "adapter_config.json: the field 'sparkle' is not known here and has no effect."
    ]


def test_targets_that_match_nothing_here(model: torch.nn.Module, adapter: Path) -> None:
    change_config(adapter, target_modules=["q_proj", "c_attn"])
    assert refusal(model, adapter) == (
        "every entry of target_modules must match a layer; nothing matches 'c_attn'. "
        "The adapter was made for another kind of model."
    )
    change_config(adapter, target_modules=["layers.0.self_attn.q_proj"], modules_to_save=["score"])
    assert refusal(model, adapter) == "every entry of modules_to_save must match a module; nothing matches 'score'."


def test_all_misfits_come_at_once_with_both_shapes(model: torch.nn.Module, adapter: Path) -> None:
    def change(state) -> None:
        del state[f"{Q0}.lora_A.weight"]
        state[f"{Q0}.lora_B.weight"] = torch.zeros(96, 2)
        state["base_model.model.lm_head.weight"] = torch.zeros(512, 64)

    change_weights(adapter, change)
    assert refusal(model, adapter).splitlines() == [
        "the adapter must fit the model; ADAPTER:",
        f"  - {Q0}.lora_A.weight is missing; it must be (2, 64)",
        "  - base_model.model.lm_head.weight (512, 64) has no place in the adapter",
        f"  - {Q0}.lora_B.weight must be (64, 2); it is (96, 2)",
        "Load the base model it was made on. It was made on 'the/base'.",
    ]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(model: torch.nn.Module, adapter: Path, value: float) -> None:
    change_weights(adapter, lambda state: state[f"{Q0}.lora_A.weight"].view(-1)[5:6].fill_(value))
    message = refusal(model, adapter, NumericError)
    assert message.startswith(f"ADAPTER/adapter_model.safetensors must be finite; NaN or Inf in:\n  - {Q0}.lora_A.weight\n")


def test_an_adapter_with_nan_is_not_saved(model: torch.nn.Module, tmp_path: Path) -> None:
    attach(model, AdapterSpec(rank=2, targets=["q_proj"]), seed=0)
    with torch.no_grad():
        trainable_parameters(model)[0][1].fill_(torch.nan)
    with pytest.raises(NumericError, match="an adapter that is saved must be finite"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base(folder: Path, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    save_file({key: tensor * 1.02 for key, tensor in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    model = ours(other)
    message = refusal(model, adapter)
    assert message == (
        "an adapter works on the base model it was made on; ADAPTER: its weights differ by 0.02 of their size, "
        "more than rounding to 16 bits can. It was made on 'the/base'. Load that model, or pass other_base=True if you mean it."
    )
    notes = load_adapter(model, adapter, other_base=True).notes
    assert len(notes) == 1
    assert notes[0].startswith("The adapter was made on another base: its weights differ by 0.02")


def test_the_same_base_stored_in_16_bits_is_the_same_base(folder: Path, adapter: Path) -> None:
    import luthier

    for base in ("bf16", "f16"):
        model, _ = luthier.load(str(folder), base=base)
        assert load_adapter(model, adapter).notes == []


def test_another_size_of_model(adapter: Path, tmp_path: Path) -> None:
    from tiny import tiny_config, tiny_tokenizer
    from transformers import AutoModelForCausalLM

    config = tiny_config("llama")
    config.hidden_size, config.head_dim = 32, 16
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    message = refusal(ours(tmp_path / "small"), adapter)
    assert f"{Q0}.lora_A.weight must be (2, 32); it is (2, 64)" in message


def test_a_saved_embedding_must_be_the_models_own(model: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    attach(model, AdapterSpec(rank=2, targets=["embed_tokens"]), seed=0)
    adapter = save_adapter(model, tmp_path / "adapter", base_name="the/base")
    (adapter / "luthier_base.json").unlink()
    assert load_adapter(ours(folder), adapter).notes == [
        "The adapter brings no luthier_base.json: names and shapes fit, and the embedding saved with it (model.embed_tokens); "
        "that this is the base it was trained on, 'the/base', cannot be checked."
    ]
    change_weights(adapter, lambda state: state["base_model.model.model.embed_tokens.base_layer.weight"].mul_(1.1))
    assert "the weights of model.embed_tokens saved with it differ by 0.1 of their size." in refusal(ours(folder), adapter)


def test_pickles_are_never_opened(model: torch.nn.Module, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert refusal(model, adapter) == (
        "adapter weights must be in adapter_model.safetensors; ADAPTER holds adapter_model.bin, a pickle, which could run code "
        "and is never opened. Convert it where you trust it: load it in PEFT and call save_pretrained."
    )


def test_files_that_are_missing_or_damaged(model: torch.nn.Module, adapter: Path, tmp_path: Path) -> None:
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    for damaged in (weights[:-10], weights[:50], b"", b"\xff" * 64):
        (adapter / "adapter_model.safetensors").write_bytes(damaged)
        assert refusal(model, adapter).startswith("ADAPTER/adapter_model.safetensors must be a whole safetensors file; ")
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    (adapter / "luthier_base.json").write_text('{"version": 1}')
    assert (
        refusal(model, adapter)
        == "ADAPTER/luthier_base.json must be as it was saved; KeyError: 'name'. Copy the adapter again."
    )
    for text, message in (
        ("{", "must be readable JSON"),
        ("[]", "must hold one JSON object; it holds a list"),
        ("[" * 100_000, "must be readable JSON"),
    ):
        (adapter / "adapter_config.json").write_text(text)
        assert message in refusal(model, adapter)
    (adapter / "adapter_config.json").unlink()
    assert refusal(model, adapter) == (
        "an adapter is a folder with adapter_config.json and adapter_model.safetensors; "
        "ADAPTER has no adapter_config.json. Check the path."
    )
    assert "has no adapter_config.json and no adapter_model.safetensors" in refusal(model, tmp_path / "nowhere")
    for name in ("x" * 5000, "a\0b"):
        assert refusal(model, tmp_path / name).startswith("an adapter is a folder ")


def test_tensors_of_another_kind(model: torch.nn.Module, adapter: Path) -> None:
    change_weights(adapter, lambda state: state.update({f"{Q0}.lora_A.weight": torch.zeros(2, 64, dtype=torch.int8)}))
    assert refusal(model, adapter).endswith(
        "adapter tensors must be float32, bfloat16 or float16; ADAPTER/adapter_model.safetensors:\n"
        f"  - {Q0}.lora_A.weight is int8"
    )


def test_terms_tied_to_each_other_are_not_trained(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft_pair import made_by_peft

    folder = write_model(tmp_path / "model", "llama", True)
    made_by_peft(folder, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(AdapterError, match="terms on tied head and embedding cannot be trained as one"):
        load_adapter(ours(folder), tmp_path / "adapter", trainable=True)


def test_saving_replaces_an_adapter_and_nothing_else(model: torch.nn.Module, adapter: Path, tmp_path: Path) -> None:
    attach(model, AdapterSpec(rank=3), seed=1)
    randomize([parameter for _, parameter in trainable_parameters(model)])
    save_adapter(model, adapter)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 3
    assert sorted(tmp_path.iterdir()) == [adapter]
    (adapter / "notes.txt").write_text("mine")
    with pytest.raises(
        AdapterError, match=r"a folder to save in must be new, empty, or hold an earlier save alone; .* holds notes\.txt\."
    ):
        save_adapter(model, adapter)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match=r"a folder to save in must be new or a folder; .* is a file"):
        save_adapter(model, tmp_path / "file")
    with pytest.raises(AdapterError, match=r"could not be written; .*choose another folder"):
        save_adapter(model, tmp_path / "file" / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file"]


def test_a_save_that_fails_leaves_the_old_one(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}

    def fail(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    def interrupt() -> None:
        with staged_folder(adapter, frozenset(before)) as stage:
            (stage / "half").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    monkeypatch.setattr("os.fsync", fail)
    with (
        pytest.raises(AdapterError, match=r"could not be written; \[Errno 28\] No space left on device\. Free some space"),
        staged_folder(adapter, frozenset(before)) as stage,
    ):
        (stage / "new").write_text("")
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert list(tmp_path.iterdir()) == [adapter]


def test_a_model_card_beside_the_adapter_stays(model: torch.nn.Module, adapter: Path) -> None:
    (adapter / "README.md").write_text("by hand")
    attach(model, AdapterSpec(rank=3), seed=1)
    save_adapter(model, adapter)
    assert (adapter / "README.md").read_text() == "by hand"


def test_a_save_killed_between_its_renames_comes_back(model: torch.nn.Module, adapter: Path) -> None:
    adapter.rename(adapter.with_name(f".{adapter.name}.0123abcd.old"))
    assert load_adapter(model, adapter).targets == ["model.layers.0.self_attn.q_proj"]
    assert [path.name for path in adapter.parent.iterdir()] == [adapter.name]


def test_a_pattern_that_matches_nothing_is_said_and_dropped(model: torch.nn.Module, adapter: Path, tmp_path: Path) -> None:
    """As in PEFT, which loads such adapters: the pattern cannot change what the adapter computes."""
    expected = logits(ours_with(adapter, model))
    change_config(adapter, rank_pattern={"k_proj": 7, "q_proj": 2}, alpha_pattern={"layers.9.q_proj": 64})
    again = ours(Path(model.config._name_or_path))
    report = load_adapter(again, adapter)
    assert report.notes == [
        "adapter_config.json: rank_pattern 'k_proj' matches none of the adapter's layers and has no effect.",
        "adapter_config.json: alpha_pattern 'layers.9.q_proj' matches none of the adapter's layers and has no effect.",
    ]
    assert torch.equal(logits(again), expected)
    written = json.loads((save_adapter(again, tmp_path / "again") / "adapter_config.json").read_text())
    assert (written["rank_pattern"], written["alpha_pattern"]) == ({"q_proj": 2}, {})


def ours_with(adapter: Path, model: torch.nn.Module) -> torch.nn.Module:
    load_adapter(model, adapter)
    return model


def test_an_adapter_without_a_record_says_what_was_not_checked(model: torch.nn.Module, adapter: Path) -> None:
    (adapter / "luthier_base.json").unlink()
    change_config(adapter, base_model_name_or_path=None)
    assert load_adapter(model, adapter).notes == [
        "The adapter brings no luthier_base.json: names and shapes fit; that this is the base it was trained on "
        "cannot be checked."
    ]


def test_json_that_means_two_things_or_never_ends(model: torch.nn.Module, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr("luthier.strict_json.MAX_JSON_BYTES", 100_000)
    contents = {
        '{"peft_type": "LORA", "r": 2, "r": 4}': "the key 'r' appears twice with different values",
        '{"lora_alpha": NaN}': "it holds NaN",
        '{"a": "' + "x" * 200_000 + '"}': "it is longer than 100000 bytes",
    }
    whole = (adapter / "adapter_config.json").read_text()
    for content, message in contents.items():
        (adapter / "adapter_config.json").write_text(content)
        assert f"adapter_config.json must be readable JSON; {message}" in refusal(model, adapter)
    (adapter / "adapter_config.json").write_text(whole)
    record = (adapter / "luthier_base.json").read_text()
    for change in ({"values": ["a"]}, {"values": [[1.0], [2.0, 3.0]]}, {"shape": 3}, {"values": [float("inf")]}):
        content = json.loads(record)
        content["matrices"]["model.layers.0.self_attn.q_proj"] |= change
        (adapter / "luthier_base.json").write_text(json.dumps(content))
        refusal(model, adapter)


WEIGHT_LIES = {
    "overlap": '{"%s.lora_A.weight":{"dtype":"F32","shape":[2,64],"data_offsets":[0,512]},'
    '"%s.lora_B.weight":{"dtype":"F32","shape":[64,2],"data_offsets":[256,768]}}',
    "beyond the end": '{"%s.lora_A.weight":{"dtype":"F32","shape":[2,1000000],"data_offsets":[0,8000000]},"%s":{}}',
    "one name twice": '{"%s.lora_A.weight":{"dtype":"F32","shape":[64],"data_offsets":[0,256]},'
    '"%s.lora_A.weight":{"dtype":"F32","shape":[64],"data_offsets":[256,512]}}',
}


@pytest.mark.parametrize("lie", WEIGHT_LIES)
def test_weight_headers_that_lie(model: torch.nn.Module, adapter: Path, lie: str) -> None:
    header = (WEIGHT_LIES[lie] % (Q0, Q0)).encode()
    (adapter / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(512))
    message = refusal(model, adapter)
    assert "must be a whole safetensors file" in message or "must fit the model" in message


@pytest.mark.parametrize("shape", [(0, 64), (64, 2), (2, 64, 1), (128,), (2, 65)])
def test_factors_of_another_shape(model: torch.nn.Module, adapter: Path, shape: tuple[int, ...]) -> None:
    change_weights(adapter, lambda state: state.update({f"{Q0}.lora_A.weight": torch.zeros(shape)}))
    assert f"{Q0}.lora_A.weight must be (2, 64); it is {shape}" in refusal(model, adapter)


def test_an_expression_that_takes_for_ever_is_refused(model: torch.nn.Module, adapter: Path, monkeypatch) -> None:
    monkeypatch.setattr("luthier.adapters.spec.MATCH_SECONDS", 0.05)
    change_config(adapter, target_modules=r"(?:\w|\w\w|\w\w\w|\.)*(?<=z)")
    with pytest.raises(AdapterError, match=r"a pattern must match within 0\.05 s; '.*' does not on model\.layers"):
        load_adapter(model, adapter)


def test_numbers_too_large_for_a_float_are_refused(model: torch.nn.Module, adapter: Path) -> None:
    change_config(adapter, lora_alpha=10**400)
    with pytest.raises(AdapterError, match="alpha"):
        load_adapter(model, adapter)
