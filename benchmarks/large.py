"""One training step of a 7B and an 8B on this machine: peak memory, seconds, share of the multiply-add peak.

    python benchmarks/large.py [--models llama-2-7b qwen3-8b] [--tokens 512] [--recomputed N] [--out large.json]

The shapes are those of Llama-2-7B and Qwen3-8B; the weights are random and go straight into NF4 with double quantisation,
embedding and head into bf16, so that no larger model ever stands in memory. Rank 16 on all linear layers, one document of
`tokens` tokens, all of them supervised, AdamW; of the lowest N layers only the input is kept and the rest computed again,
of all layers where --recomputed is left out. Shares are of the FMA peak probed before and after the step. `executed` counts
forward, the second forward where there is one, and backward to the input (4 or 6 flops a weight and token, the head 4),
`useful` leaves the second forward out; terms are counted, attention is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import describe_machine, peak_rss_bytes, run_part, write_json

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

RANK = 16
TARGET_BYTES, TARGET_SHARE = 6.5e9, 0.70
SCALE = 0.02

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
}  # fmt: skip


def main() -> None:
    options = parse()
    if options.part:
        print(json.dumps(measure(options.part, options)))
        return
    shared = ["--tokens", str(options.tokens), "--steps", str(options.steps)]
    shared += ["--layers", str(options.layers)] if options.layers else []
    shared += ["--recomputed", str(options.recomputed)] if options.recomputed is not None else []
    results = []
    for name in options.models:
        results.append({"model": name, **run_part(__file__, name, shared)})
        show(results[-1])
    if options.out:
        write_json(options.out, {"benchmark": "large", "machine": describe_machine(), "results": results})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="measured steps; one before them warms up")
    parser.add_argument("--layers", type=int, help="fewer layers, to see that the script runs")
    parser.add_argument("--recomputed", type=int, help="layers computed again in backward; all if left out")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--part", choices=tuple(SHAPES), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build the model, take the steps, and say what they took."""
    import torch

    from luthier.adapters import AdapterSpec, attach, trainable_parameters
    from luthier.kernels import probe
    from luthier.linear import count_numbers
    from luthier.training.allocator import set_freed_memory_kept
    from luthier.training.recompute import decoder_layers

    set_freed_memory_kept(False)  # as in a run whose layers are recomputed
    started = time.perf_counter()
    model = build(SHAPES[name] | ({"num_hidden_layers": options.layers} if options.layers else {}))
    parameters, layers = count_numbers(model), len(decoder_layers(model))
    again = layers if options.recomputed is None else options.recomputed
    attach(model, AdapterSpec(rank=RANK), seed=0)
    trainable = [parameter for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    pack = one_document(model, options.tokens)
    build_seconds, built_bytes = time.perf_counter() - started, peak_rss_bytes()
    step(model, optimizer, pack, again)
    seconds, peaks = [], [probe.fma_peak()]
    for _ in range(options.steps):
        seconds.append(step(model, optimizer, pack, again))
        peaks.append(probe.fma_peak())
    executed, useful = flops(model, options.tokens, again / layers)
    peak, median = statistics.median(peaks), statistics.median(seconds)
    return {
        "parameters": parameters, "trainable_parameters": sum(parameter.numel() for parameter in trainable),
        "tokens": options.tokens, "layers": layers, "recomputed_layers": again,
        "step_seconds": seconds, "peak_rss_bytes": peak_rss_bytes(), "built_bytes": built_bytes,
        "build_seconds": build_seconds, "fma_flops_per_second": peaks, "executed_flops": executed, "useful_flops": useful,
        "executed_share": executed / median / peak, "useful_share": useful / median / peak,
    }  # fmt: skip


def build(content: dict[str, Any]) -> Any:
    """The model with random weights: linear layers in NF4, embedding and head in bf16, norms of ones."""
    import torch
    from torch import nn

    from luthier.linear import LowRankEmbedding, LowRankLinear
    from luthier.matrices import DenseMatrix
    from luthier.models.skeleton import build_skeleton, make_config

    model = build_skeleton(make_config(content, "benchmarks/large.py"), "benchmarks/large.py")
    generator = torch.Generator().manual_seed(0)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, LowRankLinear(random_nf4(module.out_features, module.in_features, generator)))
        elif type(module) is nn.Linear or type(module) is nn.Embedding:
            weight = torch.empty(module.weight.shape, dtype=torch.bfloat16).normal_(0, SCALE, generator=generator)
            made = LowRankLinear if type(module) is nn.Linear else LowRankEmbedding
            model.set_submodule(name, made(DenseMatrix(weight)))
        else:
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
    return model.eval()


def random_nf4(rows: int, columns: int, generator: Any) -> Any:
    """Random codes under equal scales, near SCALE: NF4 as it lies in memory, made without the weights it would come from."""
    import torch

    from luthier.matrices import NF4Matrix

    blocks = rows * columns // 64
    codes = torch.empty(rows * columns // 2, dtype=torch.uint8).random_(0, 256, generator=generator)
    scales = torch.empty(blocks, dtype=torch.uint8).random_(0, 256, generator=generator)
    nested = torch.full((-(-blocks // 256),), SCALE / 2)
    return NF4Matrix(codes, scales, (rows, columns), nested_absmax=nested, nested_offset=SCALE, dtype=torch.bfloat16)


def one_document(model: Any, tokens: int) -> Any:
    import torch

    from luthier.data.packing import Pack

    ids = torch.randint(model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    return Pack.of_texts(ids, torch.tensor([0, tokens]), torch.arange(tokens - 1))


def step(model: Any, optimizer: Any, pack: Any, recomputed: int) -> float:
    """One optimiser step with so many layers computed again in backward; returns its seconds."""
    from luthier.evaluation.loss import supervised_loss
    from luthier.training.recompute import set_recomputed

    set_recomputed(model, recomputed)
    started = time.perf_counter()
    loss = supervised_loss(model, pack) / pack.supervised_tokens
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    if not loss.isfinite():
        raise SystemExit(f"the loss must be finite; got {float(loss)}.")
    return seconds


def flops(model: Any, tokens: int, again: float) -> tuple[float, float]:
    """(executed, useful): 2 a weight and token in each pass; terms have a third product in backward, for their factors.

    again: the share of the layers that go forward twice.
    """
    from luthier.adapters.targets import low_rank_layers
    from luthier.linear import LowRankLinear

    head = model.get_output_embeddings()
    weights = term = 0
    for layer in low_rank_layers(model).values():
        if isinstance(layer, LowRankLinear) and layer is not head:
            rows, columns = layer.matrix.shape
            weights += rows * columns
            term += RANK * (rows + columns)
    head_flops = 4.0 * head.matrix.shape[0] * head.matrix.shape[1] * (tokens - 1)
    forward = 2.0 * tokens * (weights + term)
    backward = 2.0 * tokens * (weights + 2 * term)
    return (1 + again) * forward + backward + head_flops, forward + backward + head_flops


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['model']}: {result['parameters'] / 1e9:.2f} billion parameters, {result['tokens']} tokens, "
        f"{result['recomputed_layers']} of {result['layers']} layers recomputed: "
        f"{statistics.median(result['step_seconds']):.1f} s a step, peak {result['peak_rss_bytes'] / 1e9:.2f} GB "
        f"(target {TARGET_BYTES / 1e9}), {result['executed_share']:.0%} of the FMA peak (target {TARGET_SHARE:.0%}), "
        f"{result['useful_share']:.0%} without the second forward",
        flush=True,
    )


if __name__ == "__main__":
    main()
