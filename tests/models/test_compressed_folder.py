"""A compressed model's folder: written, read back bit for bit, computed with, trained on; and hostile ones refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tiny import compressed_folder, set_matrix, write_folder
from safetensors.torch import load_file, save_file
from tiny import write_tiny
from transformers import AutoModelForCausalLM

from luthier import disk
from luthier.adapters import AdapterSpec, attach, load_adapter, save_adapter
from luthier.adapters.targets import low_rank_layers
from luthier.disk import sha256_of
from luthier.errors import ConfigError, LuthierError, ModelError
from luthier.linear import LowRankLinear
from luthier.matrices import DenseMatrix, FactoredMatrix, stored
from luthier.models.compressed_description import DESCRIPTION_FILE
from luthier.models.compressed_folder import stored_bytes
from luthier.models.load import fingerprint, load
from luthier.models.packed import packed_logits
from luthier.units import visible

IDS = torch.arange(3, 43)
WEIGHTS = "compressed.safetensors"
STARTS = torch.tensor([0, 17, 40])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_folder(tmp_path_factory.mktemp("compressed"))[0]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path, before = compressed_folder(tmp_path)
    after = load(str(path))
    first, second = low_rank_layers(before.model), low_rank_layers(after.model)
    assert {name: layer.matrix.kind for name, layer in first.items()} == {n: layer.matrix.kind for n, layer in second.items()}
    ours, theirs = before.model.state_dict(), after.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(logits(before.model), logits(after.model))
    assert fingerprint(before.model) == fingerprint(after.model)
    attention = after.model.model.layers[0].self_attn
    assert attention.q_proj.matrix.right is attention.v_proj.matrix.right
    assert after.model.get_output_embeddings().matrix is after.model.get_input_embeddings().matrix
    files = load_file(path / WEIGHTS)
    assert sum("right.weight" in key and not key.partition("right.weight")[2] for key in files) == 3  # one for q, k and v
    assert stored_bytes(after.model) == sum(tensor.nbytes for tensor in files.values())
    assert write_folder(after, tmp_path / "again").joinpath(WEIGHTS).read_bytes() == (path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_logits_are_those_of_the_dense_reconstruction(tmp_path: Path, family: str) -> None:
    path, _ = compressed_folder(tmp_path, family)
    model, dense = load(str(path)).model, load(str(path)).model
    for layer in low_rank_layers(dense).values():
        layer.matrix = DenseMatrix(layer.matrix.dequantize())
    expected = logits(dense)
    scale = expected.abs().max()
    assert (logits(model) - expected).abs().max() < 2e-5 * scale
    packed = packed_logits(model, IDS[:40], STARTS, torch.arange(40))
    assert (packed - packed_logits(dense, IDS[:40], STARTS, torch.arange(40))).abs().max() < 2e-5 * scale


def test_it_can_be_loaded_dense_and_in_nf4_its_factors_kept(folder: Path) -> None:
    kept, dense = load(str(folder), base="nf4"), load(str(folder), base="f32")
    kinds = {name: layer.matrix.kind for name, layer in low_rank_layers(kept.model).items()}
    assert kinds["model.layers.0.self_attn.q_proj"] == "r48/nf4,nf4"
    assert kinds["model.layers.1.mlp.down_proj"] == "nf4"
    assert any("stored in low-rank factors and kept so" in note for note in kept.notes)
    assert all(isinstance(layer.matrix, DenseMatrix) for layer in low_rank_layers(dense.model).values())


def test_an_adapter_trains_on_top_and_only_it_gets_gradients(folder: Path, tmp_path: Path) -> None:
    model = load(str(folder)).model
    attach(model, AdapterSpec(rank=4), seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".terms." not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(packed_logits(model, IDS, STARTS, torch.arange(39)), IDS[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if ".terms." not in name)
    save_adapter(model, tmp_path / "adapter")
    other = load(str(folder)).model
    load_adapter(other, tmp_path / "adapter")
    assert torch.equal(logits(model.eval()), logits(other.eval()))


def test_the_parts_are_mapped_and_not_copied(folder: Path) -> None:
    model = load(str(folder)).model
    names = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS in line]
    assert any(str(folder) in name for name in names)
    matrix = model.model.layers[0].mlp.gate_proj.matrix
    addresses = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    place = matrix.left.weight.data_ptr()
    assert any(int(start, 16) <= place < int(end, 16) for start, end in addresses)


def test_transformers_does_not_take_it_for_a_model_without_these_weights(folder: Path) -> None:
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_all_in_nf4_it_is_a_folder_of_bitsandbytes(tmp_path: Path) -> None:
    loaded = load(str(write_tiny(tmp_path / "original", "llama", dtype=torch.bfloat16)))
    for name, layer in low_rank_layers(loaded.model).items():
        if isinstance(layer, LowRankLinear) and layer is not loaded.model.get_output_embeddings():
            set_matrix(loaded.model, name, stored(layer.matrix.dequantize(), "nf4"))
    path = write_folder(loaded, tmp_path / "nf4")
    assert not (path / DESCRIPTION_FILE).exists()
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes"
    assert torch.equal(logits(load(str(path)).model), logits(loaded.model))


def test_all_in_nf4_with_norms_that_16_bits_do_not_hold_it_keeps_them_and_its_size(tmp_path: Path) -> None:
    """A folder of bitsandbytes has one dtype for all that is plain: the embedding would be written in 32 bits."""
    loaded = load(str(write_tiny(tmp_path / "original", "llama", tied=True)), base="bf16")
    for name, layer in low_rank_layers(loaded.model).items():
        if isinstance(layer, LowRankLinear) and layer is not loaded.model.get_output_embeddings():
            set_matrix(loaded.model, name, stored(layer.matrix.dequantize(), "nf4"))
    path = write_folder(loaded, tmp_path / "nf4")
    assert (path / DESCRIPTION_FILE).exists()
    files = load_file(path / WEIGHTS)
    assert files["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert files["model.norm.weight"].dtype == torch.float32
    assert torch.equal(logits(load(str(path)).model), logits(loaded.model))


def test_adapters_are_to_be_merged_before_it_is_written(folder: Path, tmp_path: Path) -> None:
    loaded = load(str(folder))
    attach(loaded.model, AdapterSpec(rank=2), seed=0)
    with pytest.raises(ConfigError, match="without adapters on it"):
        write_folder(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# hostile folders


def description(path: Path) -> dict[str, Any]:
    return json.loads((path / DESCRIPTION_FILE).read_text())


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = description(path)
    change(content)
    (path / DESCRIPTION_FILE).write_text(json.dumps(content))


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other tensors, their file described as it then is."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    entry = {
        "size_bytes": (path / WEIGHTS).stat().st_size,
        "sha256": sha256_of(path / WEIGHTS),
    }
    edited(path, lambda content: content.update(files={WEIGHTS: entry}))


Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
GATE = "model.layers.0.mlp.gate_proj"


def layer(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["layers"][name].update(values)


DESCRIPTIONS = {
    "unknown field": (lambda c: c.update(code="import os"), "code: Extra inputs are not permitted"),
    "newer": (lambda c: c.update(version=2), "must be of version 1 or less; it is of 2. Update luthier"),
    "format": (lambda c: c.update(format="pickle"), "must describe a compressed model"),
    "no format": (lambda c: c.pop("format"), "must describe a compressed model"),
    "no version": (lambda c: c.pop("version"), "must describe a compressed model"),
    "version 0": (lambda c: c.update(version=0), "must describe a compressed model"),
    "no rows but pivots": (layer(GATE, kind="p96/bf16,bf16"), "its rank is at most 64; got 96"),
    "no layers": (lambda c: c.update(layers={}), "must describe a compressed model"),
    "list": (lambda c: c["layers"].update(x=[1]), "must describe a compressed model"),
    "huge": (layer(Q, shape=[1 << 40, 64]), "sizes lie between 1 and 2147483647"),
    "negative": (layer(Q, shape=[-1, 64]), "sizes lie between 1 and 2147483647"),
    "float": (layer(Q, shape=[64.0, 64]), "must describe a compressed model"),
    "kind": (layer(Q, kind="pickle"), "'pickle' names no storage"),
    "rank": (layer(Q, kind="r4096/nf4,nf4"), "its rank is at most 64; got 4096"),
    "other rank": (layer(Q, kind="r40/nf4,nf4"), "shares a right factor of model.layers.0.self_attn.q_proj that does not fit"),
    "owner": (layer(K, right_of="model.layers.9"), "'model.layers.9' has no right factor of its own to share"),
    "circle": (layer(Q, right_of=K), "has no right factor of its own to share"),
    "own": (layer(K, right_of=None), "model.layers.0.self_attn.k_proj: an nf4 matrix needs weight.quant_state"),
    "dense share": (layer("model.layers.1.self_attn.k_proj", right_of=Q), "only factored layers share a right factor"),
    "shape": (layer(Q, shape=[128, 64]), r"q_proj.left.weight must be \(128, 48\); it is \(64, 48\)"),
    "pivots": (layer(GATE, kind="r32/bf16,bf16"), r"gate_proj.left.weight must be BF16 \(96, 32\); it is BF16 \(64, 32\)"),
    "dtype": (layer(GATE, kind="p32/f16,bf16"), r"gate_proj.left.weight must be F16 \(64, 32\); it is BF16"),
    "dense dtype": (layer("model.layers.1.mlp.down_proj", kind="bf16"), "down_proj.weight must be BF16"),
    "stranger": (
        lambda c: c["layers"].update({"model.layers.7.q": {"shape": [4, 4], "kind": "nf4"}}),
        "model.layers.7.q: an nf4 matrix needs",
    ),
    "traversal": (
        lambda c: c["files"].update({"../../etc/passwd": c["files"][WEIGHTS]}),
        "'../../etc/passwd' leads out of the folder",
    ),
    "absolute": (lambda c: c["files"].update({"/etc/passwd": c["files"][WEIGHTS]}), "leads out of the folder"),
    "absent": (lambda c: c["files"].update({"x.safetensors": c["files"][WEIGHTS]}), "x.safetensors is missing"),
    "hash": (
        lambda c: c["files"][WEIGHTS].update(sha256="0" * 64),
        "compressed.safetensors has another sha256 than when it was written",
    ),
    "size": (lambda c: c["files"][WEIGHTS].update(size_bytes=5), "compressed.safetensors must have 5 bytes"),
    "no hash": (lambda c: c["files"][WEIGHTS].update(sha256="x"), "must describe a compressed model"),
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_that_does_not_hold_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    change, message = DESCRIPTIONS[case]
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    edited(path, change)
    with pytest.raises(ModelError, match=message) as caught:
        load(str(path))
    assert len(str(caught.value)) < 4000


def put(key: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


TENSORS = {
    "places": (lambda t: t[f"{GATE}.places"].add_(t[f"{GATE}.places"] == 95), "places must hold each of 0 to 95 once"),
    "negative": (lambda t: t[f"{GATE}.places"].sub_(1), "places must hold each of 0 to 95 once"),
    "all pivots": (put(f"{GATE}.places", torch.zeros(96, dtype=torch.int32)), "places must hold each of 0 to 95 once"),
    "places dtype": (put(f"{GATE}.places", torch.zeros(96, dtype=torch.int64)), r"places must be I32 \(96,\); it is I64"),
    "missing": (lambda t: t.pop(f"{GATE}.right.weight"), "gate_proj.right.weight is missing"),
    "nf4 cut": (put(f"{Q}.left.weight", torch.zeros(8, 1, dtype=torch.uint8)), "the nf4 nibbles must have elements"),
    "blocks cut": (
        put("model.layers.1.mlp.gate_proj.weight", torch.zeros(96, 18, dtype=torch.uint8)),
        r"must be U8 \(96, 36\); it is U8 \(96, 18\)",
    ),
    "extra": (put(f"{GATE}.payload", torch.zeros(4)), "gate_proj.payload has no place in the model"),
    "no norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_as_described_are_refused(folder: Path, tmp_path: Path, case: str) -> None:
    change, message = TENSORS[case]
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    with_tensors(path, change)
    with pytest.raises(ModelError, match=message):
        load(str(path))


def test_a_head_or_embedding_in_factors_is_refused(folder: Path, tmp_path: Path) -> None:
    loaded = load(str(folder))
    table = FactoredMatrix(stored(torch.randn(512, 8), "bf16"), stored(torch.randn(8, 64), "bf16"))
    loaded.model.get_input_embeddings().matrix = loaded.model.get_output_embeddings().matrix = table
    with pytest.raises(ModelError, match="embeddings and head are stored whole"):
        load(str(write_folder(loaded, tmp_path / "out")))


ESCAPE = "\x1b[2J\u202e" + "x" * 500

NAMES = {
    "layer": lambda c: c["layers"].update({ESCAPE: {"shape": [0, 4], "kind": "nf4"}}),
    "stranger": lambda c: c["layers"].update({ESCAPE: {"shape": [4, 4], "kind": "nf4", "right_of": None}}),
    "owner": layer(K, right_of=ESCAPE),
    "kind": layer(Q, kind=ESCAPE[:40]),
    "file": lambda c: c["files"].update({ESCAPE: c["files"][WEIGHTS]}),
    "short file": lambda c: c["files"].update({"\x1b]0;x.safetensors": c["files"][WEIGHTS]}),
    "field": lambda c: c.update({ESCAPE: 1}),
    "version": lambda c: c.update(version=int("9" * 4000)),
    "shape": layer(Q, shape=[int("9" * 4000), 4]),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_what_a_description_calls_things_is_printed_harmlessly(folder: Path, tmp_path: Path, case: str) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    edited(path, NAMES[case])
    with pytest.raises(ModelError) as caught:
        load(str(path))
    message = str(caught.value)
    assert message == visible(message, lines=True)
    assert len(message) < 1500


def test_a_folder_is_hashed_once_a_process_and_again_once_it_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    hashed = []
    monkeypatch.setattr(disk, "SETTLED_NS", -(10**12))
    monkeypatch.setattr(disk, "sha256_of", lambda file: (hashed.append(file), sha256_of(file))[1])
    for _ in range(3):
        load(str(path))
    assert hashed == [path / WEIGHTS]
    about = (path / WEIGHTS).stat()
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)  # longer than a tick of the file system's clock
    (path / WEIGHTS).write_bytes(content)
    os.utime(path / WEIGHTS, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (path / WEIGHTS).stat().st_size == about.st_size
    with pytest.raises(ModelError, match="has another sha256"):
        load(str(path))


def test_a_file_that_was_written_a_moment_ago_is_hashed_every_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    (path / WEIGHTS).touch()
    hashed = []
    monkeypatch.setattr(disk, "SETTLED_NS", 10**15)
    monkeypatch.setattr(disk, "sha256_of", lambda file: (hashed.append(file), sha256_of(file))[1])
    for _ in range(2):
        load(str(path))
    assert len(hashed) == 2


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', "null", '"x"', '{"a": NaN}', "[" * 10000])
def test_what_is_no_description_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    (path / DESCRIPTION_FILE).write_text(text)
    with pytest.raises(ModelError, match=r"compression\.json"):
        load(str(path))


def test_a_folder_without_its_description_says_so(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    (path / DESCRIPTION_FILE).unlink()
    with pytest.raises(ModelError, match=r"a compressed model has compression\.json beside its weights"):
        load(str(path))


def test_weights_are_never_read_through_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "copy"))
    (path / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (path / WEIGHTS).symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(LuthierError, match="leads out of the folder"):
        load(str(path))
