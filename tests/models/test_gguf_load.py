"""GGUF models: logits equal the Transformers model they were made from; quantized blocks dequantize as gguf.quants has it."""

from __future__ import annotations

import gc
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import ARCHITECTURES, random_blocks, random_model, write_gguf
from transformers import AutoModelForCausalLM

from luthier.errors import ModelError
from luthier.matrices import NF4Matrix
from luthier.models.gguf_checkpoint import BLOCKS, GGUFCheckpoint
from luthier.models.gguf_config import config_content
from luthier.models.gguf_file import _Header, read_gguf
from luthier.models.gguf_names import to_gguf, to_transformers
from luthier.models.load import load

IDS = torch.arange(3, 83).reshape(2, 40)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def assert_same_logits(loaded: Any, reference: Any) -> None:
    with torch.no_grad():
        actual, expected = loaded(input_ids=IDS).logits, reference(input_ids=IDS).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in ARCHITECTURES for tied in (True, False) if (family, tied) != ("gemma2", False)],
)
def test_logits_equal_those_of_the_source(tmp_path: Path, family: str, tied: bool) -> None:
    layers = 7 if family == "gemma3" else 2  # of Gemma 3's layers every sixth is another kind
    source = random_model(family, num_hidden_layers=layers, tie_word_embeddings=tied)
    loaded = load(str(write_gguf(tmp_path / "tiny.gguf", source, family)))
    assert type(loaded.model) is type(source)
    assert loaded.source.kind == "gguf"
    assert (loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight) == tied
    assert set(loaded.model.state_dict()) == set(source.state_dict())
    assert_same_logits(loaded.model, source)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_stored_types(tmp_path: Path, kind: Kind) -> None:
    """16-bit types and blocks stay as stored, and hold exactly the numbers that gguf.quants reads."""
    source = random_model("llama")
    loaded = load(str(write_gguf(tmp_path / "tiny.gguf", source, "llama", kind)))
    stored = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind, torch.uint8)
    assert loaded.model.model.layers[0].mlp.up_proj.weight.dtype == stored
    assert loaded.model.dtype == (torch.float32 if stored == torch.uint8 else stored)
    rounded = {
        name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind))
        if value.ndim == 2
        else value
        for name, value in source.state_dict().items()
    }
    source.load_state_dict(rounded)
    assert_same_logits(loaded.model, source)
    assert torch.equal(
        loaded.model.model.layers[1].self_attn.q_proj.matrix.dequantize(), rounded["model.layers.1.self_attn.q_proj.weight"]
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_blocks_are_mapped_and_rows_that_move_are_copied(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", Kind.Q4_1)
    model = load(str(path)).model
    gc.collect()
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(edge, 16) for edge in line.split()[0].split("-")] for line in lines]

    def mapped(module: Any) -> bool:
        return any(start <= module.weight.data_ptr() < end for start, end in ranges)

    layer = model.model.layers[0]
    assert mapped(layer.mlp.up_proj)
    assert mapped(layer.self_attn.v_proj)
    assert mapped(model.model.embed_tokens)
    assert not mapped(layer.self_attn.q_proj)
    assert not mapped(layer.self_attn.k_proj)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K])
def test_types_without_a_kernel_are_converted_only_when_asked(tmp_path: Path, kind: Kind) -> None:
    """They would grow to float32 without a word: ten times their size. nf4 keeps head and embedding, and says so."""
    source = random_model("llama", hidden_size=256, intermediate_size=256)
    blocks = dict.fromkeys(("blk.0.ffn_up.weight", "blk.1.attn_k.weight", "token_embd.weight"), kind)
    path = write_gguf(tmp_path / "tiny.gguf", source, "llama", Kind.F16, blocks=blocks)
    for base in (None, "asis"):
        with pytest.raises(ModelError) as caught:
            load(str(path), base=base)  # type: ignore[arg-type]
        assert str(caught.value) == (
            "a matrix stays as it is stored only in f32, bf16, f16, nf4, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k; "
            f"{path} has 3 others:\n"
            f"  - model.embed_tokens.weight: {kind.name}\n"
            f"  - model.layers.0.mlp.up_proj.weight: {kind.name}\n"
            f"  - model.layers.1.self_attn.k_proj.weight: {kind.name}\n"
            "Try --base nf4, which quantizes them anew while loading, --base bf16, or another quantization of the model, "
            "such as Q4_K_M."
        )
    wide = load(str(path), base="f32")
    assert wide.notes == []
    up = torch.from_numpy(gguf.quants.dequantize(random_blocks((256, 256), kind), kind))
    assert torch.equal(wide.model.model.layers[0].mlp.up_proj.weight, up)
    nf4 = load(str(path), base="nf4")
    assert nf4.notes == [
        f"model.embed_tokens.weight is stored in {kind.name}, which has no kernel here: held in float32, {512 * 256 * 4} bytes."
    ]
    assert isinstance(nf4.model.model.layers[0].mlp.up_proj.matrix, NF4Matrix)
    assert nf4.model.model.embed_tokens.weight.dtype == torch.float32
    assert torch.equal(nf4.model.model.embed_tokens.weight, wide.model.model.embed_tokens.weight)


def test_types_that_nothing_here_reads_are_refused_by_name(tmp_path: Path) -> None:
    source = random_model("llama", hidden_size=256, intermediate_size=256)
    path = write_gguf(tmp_path / "tiny.gguf", source, "llama", Kind.F16, blocks={"blk.0.ffn_up.weight": Kind.IQ4_XS})
    message = r"tensors must be stored as F32, F16, BF16, Q4_0, .*; got\n  - blk\.0\.ffn_up\.weight: IQ4_XS\nTry another"
    for base in (None, "nf4"):
        with pytest.raises(ModelError, match=message):
            load(str(path), base=base)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0])
def test_a_file_whose_tensors_lie_at_odd_addresses(tmp_path: Path, kind: Kind) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", kind)
    shifted = write_shifted(path, tmp_path / "shifted.gguf")
    first, second = load(str(path)).model, load(str(shifted)).model
    for module in second.modules():
        if hasattr(module, "matrix"):
            assert module.matrix.weight.data_ptr() % 2 == 0
    assert_same_logits(second, first)


def write_shifted(path: Path, target: Path) -> Path:
    """The same file with general.alignment 1, its first tensor at an odd place: offsets stay, what they count from moves."""
    content = path.read_bytes()
    header = _Header(content, len(content))  # type: ignore[arg-type]
    _, tensors = header.read()
    start = min(tensor.offset_bytes for tensor in tensors.values())
    added = [_key(b"general.alignment", 4, struct.pack("<I", 1))]
    if (header.position + len(added[0])) % 2 == 0:
        added.append(_key(b"a", 0, b"\0"))  # a key that nobody reads, of an odd length
    (keys,) = struct.unpack_from("<Q", content, 16)
    counts = content[:16] + struct.pack("<Q", keys + len(added))
    target.write_bytes(counts + b"".join(added) + content[24 : header.position] + content[start:])
    return target


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize("base", ["f32", "bf16", "f16"])
def test_base_converts(tmp_path: Path, base: str) -> None:
    source = random_model("llama")
    loaded = load(str(write_gguf(tmp_path / "tiny.gguf", source, "llama", Kind.Q8_0)), base=base)  # type: ignore[arg-type]
    exact = load(str(tmp_path / "tiny.gguf"), base="f32")
    wanted = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[base]
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == (torch.float32 if value.ndim == 1 else wanted), name
        assert torch.equal(value, exact.model.state_dict()[name].to(value.dtype)), name


@pytest.mark.parametrize("base", ["f32", "f16", "nf4"])
def test_blocks_are_converted_by_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """gguf.quants holds several temporaries of a tensor's size in float32 beside it."""
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", Kind.Q8_0)
    monkeypatch.setattr("luthier.models.gguf_checkpoint.dequantize", lambda *_: pytest.fail("read by gguf.quants"))
    load(str(path), base=base)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_type_dequantizes_as_gguf_does(tmp_path: Path, kind: Kind) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 6, 2 * max(block, 256)
    data = np.random.default_rng(0).integers(0, 60, (rows, columns // block * block_bytes), np.uint8)  # finite as f16 too
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(read_gguf(tmp_path / "one.gguf"), 2, 2)
    (name,) = checkpoint.names()
    assert name == "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.shape(name) == (rows, columns)
    expected = torch.from_numpy(gguf.quants.dequantize(data, kind))
    assert torch.equal(checkpoint.tensor(name, mapped=True), expected)


def test_llama3_rope_scaling(tmp_path: Path) -> None:
    """The converter writes Llama 3's scaling as one factor a frequency."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    source = random_model("llama", rope_parameters=rope)
    plain = 1.0 / 500000.0 ** (np.arange(0, 16, 2, dtype=np.float32) / 16)
    factors = plain / source.model.rotary_emb.inv_freq.numpy()
    assert factors.max() > 4
    path = tmp_path / "tiny.gguf"
    write_gguf(path, source, "llama", extra={"rope_freqs.weight": factors.astype(np.float32)})
    assert_same_logits(load(str(path)).model, source)


def test_phi3_long_rope(tmp_path: Path) -> None:
    short, long = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.3 * i for i in range(8)]
    for original in (16, 64):  # shorter than the text: the long factors; longer: the short ones
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long}
        rope |= {"original_max_position_embeddings": original}
        source = random_model(
            "phi3", rope_parameters=rope, original_max_position_embeddings=original, max_position_embeddings=512
        )
        path = tmp_path / f"tiny{original}.gguf"
        extra = {
            "rope_factors_short.weight": np.array(short, np.float32),
            "rope_factors_long.weight": np.array(long, np.float32),
        }
        factor = float(source.model.rotary_emb.attention_scaling)
        assert factor > 1
        write_gguf(path, source, "phi3", extra=extra, **{"ARCH.rope.scaling.attn_factor": factor})
        assert_same_logits(load(str(path)).model, source)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_heads_that_are_turned_in_part(tmp_path: Path, family: str) -> None:
    """Only Phi-3's class in Transformers does that; the others would turn whole heads without a word."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    source = random_model(family, **({"rope_parameters": rope} if family == "phi3" else {}))
    path = write_gguf(tmp_path / "tiny.gguf", source, family, **{"ARCH.rope.dimension_count": 8})
    if family == "phi3":
        model = load(str(path)).model
        assert model.model.rotary_emb.inv_freq.shape == (4,)
        assert_same_logits(model, source)
    else:
        with pytest.raises(ModelError, match=rf"{family}\.rope\.dimension_count must be the head size, 16; got 8"):
            load(str(path))
    path = write_gguf(tmp_path / "odd.gguf", source, family, **{"ARCH.rope.dimension_count": 7})
    with pytest.raises(ModelError, match=r"rope\.dimension_count must be (even and at most|the head size,) 16; got 7"):
        load(str(path))


def test_llama_biases_and_unequal_head_size(tmp_path: Path) -> None:
    source = random_model("llama", attention_bias=True, mlp_bias=True, head_dim=32)
    loaded = load(str(write_gguf(tmp_path / "tiny.gguf", source, "llama")))
    assert loaded.model.model.layers[0].self_attn.q_proj.bias is not None
    assert_same_logits(loaded.model, source)


def test_names_go_both_ways() -> None:
    for family, architecture in ARCHITECTURES.items():
        names = gguf.get_tensor_name_map(architecture, 2)
        for name in random_model(family, tie_word_embeddings=family == "gemma2").state_dict():
            if family == "gemma2" and name == "lm_head.weight":
                continue  # always tied, so gguf has no name for it
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert to_gguf(name, family) == theirs
            assert to_transformers(theirs, family) == name


@pytest.mark.parametrize("architecture", ["mamba", "bert", "gpt2", "", "llama4"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", **{"general.architecture": architecture})
    file = read_gguf(path)
    file.metadata["general.architecture"] = architecture
    with pytest.raises(ModelError, match=rf"must be one of llama, qwen2, qwen3, gemma2, gemma3, phi3; got '{architecture}'"):
        config_content(file)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"adapter.type": "lora"}, "holds an adapter, not a model"),
        ({"ARCH.expert_count": 8}, "mixtures of experts are not supported"),
        ({"ARCH.embedding_length": None}, r"llama\.embedding_length must be a positive integer; got None"),
        ({"ARCH.block_count": 5000}, "num_hidden_layers must be between 1 and 1024; got 5000"),
        ({"ARCH.block_count": 3}, r"model\.layers\.2\.mlp\.up_proj\.weight is missing"),
        ({"ARCH.rope.freq_base": float("nan")}, "must be a positive number; got nan"),
        ({"ARCH.rope.scaling.type": "weird"}, "must be none, linear or yarn; got 'weird'"),
        ({"ARCH.attention.head_count": 7}, "not a multiple of the number of att"),
        ({"ARCH.rope.dimension_count": 1 << 31}, r"llama\.rope\.dimension_count must be the head size, 16; got 2147483648"),
        ({"ARCH.feed_forward_length": 100}, r"mlp\.up_proj\.weight must be \(100, 64\); it is \(96, 64\)"),
        ({"tokenizer.ggml.model": "rwkv"}, r"tokenizer\.ggml\.model must be gpt2 or llama; got 'rwkv'"),
        ({"tokenizer.ggml.pre": "unheard-of"}, r"tokenizer\.ggml\.pre must be one of .*; got 'unheard-of'"),
    ],
)
def test_metadata_that_makes_no_model(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", **keys)
    with pytest.raises(ModelError, match=message):
        load(str(path))


def test_generates_as_the_source_does(tmp_path: Path) -> None:
    source: AutoModelForCausalLM = random_model("qwen2")
    model, tokenizer = load(str(write_gguf(tmp_path / "tiny.gguf", source, "qwen2")))
    ids = tokenizer("The quick brown", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), source.generate(ids, **options))
    assert model.generation_config.eos_token_id == 2
