"""Peak memory of loading: the stored model, its largest tensor, and the runtime.

Measured in a process of its own as the high-water mark of resident memory (VmHWM), over that of the same process just
before the load. Mapped pages count once they have been read, so the check is made after every weight has been used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_tiny import random_model, write_gguf, write_random_blocks
from safetensors.torch import save_file
from tiny import tiny_tokenizer
from transformers import LlamaConfig

from luthier import kernels
from luthier.matrices.nf4 import CONVERTED_ELEMENTS

LAYERS, HIDDEN, INTER, VOCABULARY = 7, 1024, 4096, 16384
SLACK_BYTES = 24 << 20  # tokenizer, module objects, and what the allocators keep

MEASURE = """
import sys
from pathlib import Path

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

import torch
from luthier.models.load import load
torch.set_num_threads(1)
warm = load(sys.argv[2]).model
with torch.no_grad():
    warm(input_ids=torch.arange(3, 11)[None])
before = peak()
base = None if sys.argv[3] == "asis" else sys.argv[3]
model = load(sys.argv[1], base=base).model
loaded = peak()
read = [matrix.detach()[:, :1].max() for matrix in model.parameters() if matrix.ndim == 2]
print(loaded - before, peak() - before)
"""

WRITE = """
from luthier.config import NF4Options
from luthier.models.quantize import quantize
quantize(sys.argv[1], sys.argv[4], nf4=NF4Options())
print(0, peak() - before)
"""

LINEAR = LAYERS * (3 * INTER * HIDDEN + 3 * HIDDEN * HIDDEN)
REST = VOCABULARY * HIDDEN + HIDDEN + LAYERS * 2 * HIDDEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 llama of about 250 MB in shards of about 32 MB."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    shapes = {"mlp.gate_proj": (INTER, HIDDEN), "mlp.up_proj": (INTER, HIDDEN), "mlp.down_proj": (HIDDEN, INTER)}
    shapes |= {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    shapes |= {"self_attn.k_proj": (HIDDEN // 2, HIDDEN), "self_attn.v_proj": (HIDDEN // 2, HIDDEN)}
    shapes |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    outer = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shards = [outer, *({f"model.layers.{i}.{name}.weight": shape for name, shape in shapes.items()} for i in range(LAYERS))]
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(shards):
        tensors = {name: (0.02 * torch.randn(shape, generator=generator)).to(torch.bfloat16) for name, shape in shard.items()}
        save_file(tensors, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes in one GGUF file, all matrices in random Q8_0 blocks, about 135 MB."""
    path = tmp_path_factory.mktemp("blocks") / "large.gguf"
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    shapes = {"ffn_gate": (INTER, HIDDEN), "ffn_up": (INTER, HIDDEN), "ffn_down": (HIDDEN, INTER)}
    shapes |= {"attn_q": (HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    shapes |= {"attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN)}
    matrices = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    norms = [f"blk.{layer}.{name}.weight" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    matrices["token_embd.weight"] = VOCABULARY, HIDDEN
    return write_random_blocks(path, config, matrices, [*norms, "output_norm.weight"])


def measure(folder: Path, warm: Path, base: str, out: Path | None = None) -> tuple[int, int]:
    """Bytes that the peak rose by until the model was loaded, and until every page of it had been read.

    out: the model is quantised and written there instead, and the second number is the rise until then.
    """
    script = MEASURE if out is None else MEASURE[: MEASURE.index("base = None")] + WRITE
    command = [sys.executable, "-c", script, str(folder), str(warm), base, str(out)]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {key: os.environ[key] for key in ("LUTHIER_KERNELS_LIBRARY", "LUTHIER_KERNELS") if key in os.environ}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    loaded, used = (int(word) for word in done.stdout.split())
    return loaded, used


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc")


@needs_proc
def test_quantizing_while_loading_takes_the_quantized_model_and_one_tensor(folder: Path, tiny_llama: Path) -> None:
    """4.127 bits a weight of the linear layers, embeddings in 16 bits, and the tensor that is being converted in 16 bits."""
    if kernels.active().mode != "native":
        pytest.skip("without the compiled library the reference quantises through wide temporaries")
    loaded, used = measure(folder, tiny_llama, "nf4")
    quantized, largest = LINEAR * 4.127 / 8, 2 * INTER * HIDDEN
    assert loaded <= quantized + largest + SLACK_BYTES
    assert used <= quantized + 2 * REST + largest + SLACK_BYTES
    assert used >= 0.9 * (quantized + 2 * REST)


@needs_proc
def test_converting_blocks_while_loading_takes_the_quantized_model_and_one_tensor(blocks: Path, tmp_path: Path) -> None:
    """From a GGUF file: of the tensor that is being converted its blocks, and a few rows in float32."""
    if kernels.active().mode != "native":
        pytest.skip("without the compiled library the reference quantises through wide temporaries")
    warm = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", Kind.Q8_0)
    loaded, used = measure(blocks, warm, "nf4")
    quantized, largest, embedding = LINEAR * 4.127 / 8, INTER * HIDDEN, VOCABULARY * HIDDEN * 34 // 32
    one = largest * 34 // 32 + 4 * CONVERTED_ELEMENTS
    assert blocks.stat().st_size > 130e6
    assert loaded <= quantized + one + SLACK_BYTES
    assert used <= quantized + embedding + one + SLACK_BYTES
    assert used >= 0.9 * (quantized + embedding)


@needs_proc
def test_writing_a_quantized_model_takes_nothing_beside_it(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    if kernels.active().mode != "native":
        pytest.skip("without the compiled library the reference quantises through wide temporaries")
    _, used = measure(folder, tiny_llama, "nf4", tmp_path / "nf4")
    quantized, largest = LINEAR * 4.127 / 8, 2 * INTER * HIDDEN
    written = sum(file.stat().st_size for file in (tmp_path / "nf4").glob("*.safetensors"))
    assert written == pytest.approx(quantized + 2 * REST, rel=0.01)
    assert used <= quantized + 2 * REST + largest + SLACK_BYTES


@needs_proc
@pytest.mark.parametrize(("base", "bytes_each"), [("asis", 2), ("f32", 4)])
def test_peak_is_the_stored_model_and_its_largest_tensor(folder: Path, tiny_llama: Path, base: str, bytes_each: int) -> None:
    largest = VOCABULARY * HIDDEN
    loaded, used = measure(folder, tiny_llama, base)
    stored = (LINEAR + REST) * bytes_each
    assert max(loaded, used) <= stored + largest * bytes_each + SLACK_BYTES
    assert used >= 0.9 * stored  # every page was counted, or this measured nothing
    if base == "asis":
        assert loaded <= largest * bytes_each + SLACK_BYTES  # weights whose dtype stays are mapped, not read
